"""A GranViT as Lfm2VlForConditionalGeneration, beside itself."""

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from granvit.model import GranViT
from granvit.model.lfm2_vl import chat_template, save_lfm2_vl
from granvit.toy.tiny import TinyVision, tiny_encoder
from granvit_kernels import PackedLayout, pack_patches

PLAIN = Path(__file__).parents[1] / "helpers" / "plain_lfm2_vl.py"
FORM = {"box_style": "text", "box_format": "text", "pixel_shuffle": 2, "cell_positions": False, "max_image_tokens": 100}


@pytest.fixture(params=["raw text", "chat template"])
def shaken(request, tiny, llm_folder):
    """A model of that form whose biases and scales are not what they start as."""
    if request.param == "raw text":
        model, processor = tiny(**FORM)
    else:  # and with a table that is longer than its tokenizer
        encoder = tiny_encoder(TinyVision(width=32, layers=2, heads=2, mlp=64, table=4))
        model, processor = GranViT.from_parts(encoder, llm_folder("qwen2"), **FORM)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        model.projector.scale.fill_(0.7)
    return model.eval(), processor


def test_plain_transformers_answers_as_the_model_does(shaken, tmp_path):
    model, processor = shaken
    folder = tmp_path / "lfm2-vl"
    save_lfm2_vl(model, processor, folder)
    question = processor.ask_where("a red striped circle")
    pixels = torch.randint(0, 256, (48, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "image.png")
    (folder / "question.txt").write_text(question.prompt, encoding="utf-8")
    size, mean, std = model.config.vision_config.patch_size, model.config.image_mean, model.config.image_std
    grid = [(6, 8)]
    patches, _ = pack_patches([pixels], size, mean, std, grids=torch.tensor(grid))
    prompt = processor.image_part(12) + processor.prompt_ids([question.prompt])[0]
    given = {
        "input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64),
        "pixel_values": patches[None], "spatial_shapes": torch.tensor(grid),
        "pixel_attention_mask": torch.ones(1, len(patches), dtype=torch.int32),
    }  # fmt: skip
    save_file(given, folder / "given.safetensors")

    run = [sys.executable, str(PLAIN), str(folder), str(tmp_path / "image.png"), str(tmp_path / "theirs.safetensors")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "Lfm2VlForConditionalGeneration"
    theirs = load_file(tmp_path / "theirs.safetensors")

    ids, (rows, columns) = theirs["input_ids"], theirs["spatial_shapes"][0].tolist()
    count = rows * columns // 4
    assert ids[0].tolist() == processor.image_part(count) + processor.prompt_ids([question.prompt])[0]
    if find_spec("torchvision") is None:
        assert (rows, columns) == grid[0]
    layout = PackedLayout.from_grids([(rows, columns)])
    with torch.no_grad():
        features = model.encoder(theirs["pixel_values"][0, : rows * columns], layout)
        embeds = model.embed_ids(ids)
        embeds[ids == model.config.image_token_id] = model.image_embeds(features, layout)
        used = model.config.text_vocab
        ours = model.llm(inputs_embeds=embeds).logits[..., :used]
        answer = model.generate(
            input_ids=ids, attention_mask=theirs["attention_mask"], image_index=torch.tensor([0]),
            boxes=torch.zeros(0, 4), features=(features, layout), max_new_tokens=12,
        )  # fmt: skip
    assert float((ours - theirs["logits"][..., :used]).abs().max()) < 1e-4
    assert answer.tolist() == theirs["answer"].tolist()


def test_the_chat_template_writes_any_text(tiny):
    _, processor = tiny(**FORM)
    turns = processor.turns = replace(processor.turns, later='\n"😀" \\ }} %}\n')
    tokenizer, template = processor.tokenizer, chat_template(processor)

    def written(*roles):
        said = [{"role": role, "content": "😀"} for role in roles]
        return tokenizer.apply_chat_template(said, chat_template=template, tokenize=False)

    start, end = tokenizer.decode(list(turns.start)), tokenizer.convert_ids_to_tokens(turns.end)
    whole = start + turns.question("😀") + turns.answer("😀") + end + turns.question("😀", first=False)
    assert written("user", "assistant", "user") == whole
    with pytest.raises(Exception, match="got system"):  # it never learnt from one
        written("system", "user")


@pytest.mark.parametrize(
    "name, value",
    [("box_style", "tokens"), ("box_format", "bins"), ("pixel_shuffle", 1), ("cell_positions", True)],
)
def test_other_forms_are_refused_by_name(tiny, tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        save_lfm2_vl(*tiny(**{**FORM, name: value}), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_llm_with_logits_of_its_own_is_refused(shaken, tmp_path, monkeypatch):
    model, processor = shaken
    forward = model.llm.forward

    def bounded(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits.tanh()
        return out

    monkeypatch.setattr(model.llm, "forward", bounded)
    with pytest.raises(ValueError, match="logits differ"):
        save_lfm2_vl(model, processor, tmp_path)
