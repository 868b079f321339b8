import contextlib
import dataclasses
import importlib.metadata
import json
import os
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import Siglip2VisionModel

from granvit import predict
from granvit.data.loader import GranDataset
from granvit.eval.curves import panels
from granvit.model import GranViT, GranViTProcessor
from granvit.train.__main__ import run_preset
from granvit.train.checkpoint import Checkpoints
from granvit.train.presets import PRESETS
from granvit.train.run import train
from granvit.train.summary import mean


@pytest.fixture(scope="module")
def finished(small_config, tmp_path_factory):
    """A finished run with its control, and its configuration. What it said is next to its folder, in said.txt."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = dataclasses.replace(small_config, output=str(folder), control=True)
    with (folder.parent / "said.txt").open("w") as said, contextlib.redirect_stdout(said):
        train(config)
    return config, folder


def training_lines(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "evaluation" not in line]


def weights_of(folder: Path, phase: str) -> dict[str, torch.Tensor]:
    """The model's tensors in a phase's final checkpoint, read as anybody would."""
    path = Checkpoints(folder / "checkpoints", 1).final(phase)
    tensors = load_file(path / "rank-00000.safetensors")
    return {name.removeprefix("model."): value for name, value in tensors.items()}


def without_time(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_run_leaves_what_the_documentation_names(finished):
    config, folder = finished
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "export/config.json",
        "export/encoder/preprocessor_config.json",
        "report/index.html",
        "report/summary.json",
    ):
        assert (folder / name).is_file(), name
    answers = json.loads((folder / "report" / "predictions.json").read_text())
    names = [f"{stage}{blind}" for stage in ("pretrain", "adapt") for blind in ("", " other_image", " text_only")]
    assert list(answers) == ["before", *names] and len({len(a) for a in answers.values()}) == 1
    lines = training_lines(folder)
    counted = [(line["stage"], line["step"]) for line in lines]
    stages = (config.warmup, config.pretrain, config.adapt)
    assert counted == [(stage.name, step) for stage in stages for step in range(1, stage.steps + 1)]
    for line in lines:
        assert {"loss", "loss_caption", "loss_distill", "regions", "tokens", "seconds"} <= line.keys()
        # the first step's features are the first that are standardised by
        assert (line["loss_distill"] != 0) == (line["stage"] == "pretrain" and line["step"] > 1)
    pretrain = [line for line in lines if line["stage"] == "pretrain"]
    for line in pretrain:
        assert line["loss"] == pytest.approx(line["loss_caption"] + line["loss_distill"], rel=1e-6)


def test_the_summary_has_every_stage_floor_and_control(finished):
    config, folder = finished
    summary = json.loads((folder / "report" / "summary.json").read_text())
    stages = summary["mean"]["stages"]
    assert set(stages["pretrain"]) == {"before", "after", "other_image", "text_only"}
    assert set(stages["adapt"]) == {"before", "after", "other_image", "text_only", "control"}
    for metrics in (*stages["pretrain"].values(), *stages["adapt"].values()):
        assert {"bbox2caption_rouge_l", "caption2bbox_acc50", "natural_caption2bbox_miou"} <= metrics.keys()
    assert {"most_frequent", "blind", "centre_box", "whole_image", "mean_box"} <= summary["floors"].keys()
    assert summary["versions"]["torch"] == importlib.metadata.version("torch")
    assert stages["adapt"]["before"] == stages["pretrain"]["after"]


def test_the_curves_find_every_series_in_a_runs_lines(finished):
    config, folder = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curves = panels(lines, json.loads((folder / "report" / "summary.json").read_text()))
    titles = " ".join(panel["title"] for panel in curves["panels"])
    for what in ("Loss", "ROUGE-L", "ACC@0.5", "distillation", "rank", "deviation", "Gradient", "Learning rate"):
        assert what in titles


def test_frozen_groups_are_byte_equal_and_the_others_learn(finished):
    config, folder = finished
    weights = {phase: weights_of(folder, phase) for phase in ("warmup", "pretrain", "adapt")}

    def changed(before: str, after: str, group: str) -> bool:
        names = [name for name in weights[before] if name.startswith(group)]
        assert names
        return any(not torch.equal(weights[before][name], weights[after][name]) for name in names)

    assert not changed("warmup", "pretrain", "llm.")
    assert changed("warmup", "pretrain", "encoder.") and changed("warmup", "pretrain", "projector.")
    assert not changed("pretrain", "adapt", "encoder.")
    assert changed("pretrain", "adapt", "llm.") and changed("pretrain", "adapt", "projector.")


def test_the_control_starts_from_the_warm_llm_and_a_random_encoder(finished, tmp_path):
    config, folder = finished
    known = {phase: weights_of(folder, phase) for phase in ("warmup", "pretrain")}
    control = weights_of(folder / "control", "adapt")  # stage 2 leaves the encoder as it was
    encoder = [name for name in control if name.startswith("encoder.")]
    assert all(torch.equal(control[name], known["warmup"][name]) for name in encoder)
    learnt = [name for name in encoder if "norm" not in name and "weight" in name]
    assert learnt and not any(torch.equal(control[name], known["pretrain"][name]) for name in learnt)
    lines = [json.loads(line) for line in (folder / "control" / "metrics.jsonl").read_text().splitlines()]
    ours = [line for line in training_lines(folder) if line["stage"] == "adapt"]
    assert lines[0]["stage"] == "adapt" and lines[0]["tokens"] == ours[0]["tokens"]


def test_the_export_is_the_model_and_its_encoder_opens_in_transformers(finished):
    _, folder = finished
    model = GranViT.from_pretrained(folder / "export")
    GranViTProcessor.from_pretrained(folder / "export")
    trained = weights_of(folder, "adapt")
    ours = model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in trained.items())
    encoder = Siglip2VisionModel.from_pretrained(folder / "export" / "encoder")
    assert encoder.config.hidden_size == model.config.vision_config.hidden_size


def test_the_same_command_again_does_nothing_twice(finished):
    config, folder = finished
    before = (folder / "metrics.jsonl").read_text()
    train(config)
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_run_says_each_stage_and_each_evaluation_with_its_floors(finished):
    config, folder = finished
    said = [line[9:] for line in (folder.parent / "said.txt").read_text().splitlines()]  # without the time
    floors = json.loads((folder / "floors.json").read_text())
    best = 100 * max(floor.get("bbox2caption_rouge_l", 0) for floor in floors.values())
    starts = [line for line in said if line.endswith("steps")]
    assert starts == [f"warmup: {config.warmup.steps} steps", f"pretrain: {config.pretrain.steps} steps",
                      f"adapt: {config.adapt.steps} steps", f"control: {config.adapt.steps} steps"]  # fmt: skip
    evaluations = ["before pretrain"]
    for stage in ("pretrain", "adapt"):
        evaluations += [f"after {stage}", f"after {stage}, shown another image", f"after {stage}, shown no image"]
    evaluations += ["control: adapt on a random encoder"]
    for title in evaluations:
        measuring, figures = (line for line in said if line.startswith(f"{title}: "))
        assert measuring == f"{title}: measuring"
        assert f"(floor {best:.1f})" in figures and "exact match" in figures and "boxes ACC@0.5" in figures
    assert not any("%|" in line or "Writing model shards" in line for line in said)


def test_the_last_lines_say_figures_places_and_a_command_that_works(finished, capsys):
    config, folder = finished
    result, report, model, command = (folder.parent / "said.txt").read_text().splitlines()[-4:]
    after = json.loads((folder / "report" / "summary.json").read_text())["mean"]["stages"]["adapt"]["after"]
    for label, metric in (
        ("captions ROUGE-L", "bbox2caption_rouge_l"), ("exact match", "bbox2caption_exact"),
        ("boxes ACC@0.5", "caption2bbox_acc50"),
    ):  # fmt: skip
        assert f"{label} {100 * after[metric]:.1f} (floor " in result
    assert report.endswith(f"report: {folder / 'report' / 'index.html'}")
    assert f"model: {folder / 'export'} " in model
    words = command.split("granvit predict ")[1].split()
    assert predict.main(words) == 0 and len(capsys.readouterr().out.splitlines()) == 1


def test_a_finished_command_says_so_without_loading_anything(finished, capsys, monkeypatch):
    config, folder = finished
    monkeypatch.setitem(sys.modules, "granvit.train.run", None)  # importing it fails
    monkeypatch.setenv("RANK", "0")
    command = ["smoke", "--config", str(folder / "config.yaml")]
    run_preset(command)
    said = [line[9:] for line in capsys.readouterr().out.splitlines()]
    assert said[0] == f"{folder} is finished"
    assert said[1:] == [line[9:] for line in (folder.parent / "said.txt").read_text().splitlines()[-4:]]
    monkeypatch.setenv("RANK", "1")
    run_preset(command)
    assert not capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        run_preset([*command, "--seed", "7"])


def test_several_seeds_are_averaged(small_config, tmp_path):
    short = {
        name: dataclasses.replace(getattr(small_config, name), steps=1) for name in ("warmup", "pretrain", "adapt")
    }
    short["pretrain"] = dataclasses.replace(small_config.pretrain, steps=None, epochs=1, packs=None, images=30)
    config = dataclasses.replace(small_config, output=str(tmp_path / "run"), seeds=2, **short)
    train(config)
    for seed in ("seed-0", "seed-1"):
        counts = json.loads((tmp_path / "run" / seed / "counts.json").read_text())["pretrain"]
        lines = [line for line in training_lines(tmp_path / "run" / seed) if line["stage"] == "pretrain"]
        assert len(lines) == counts["steps"]
        assert sum(line["images"] for line in lines) == len(GranDataset(small_config.data.path))
    summary = json.loads((tmp_path / "run" / "report" / "summary.json").read_text())
    assert [run["seed"] for run in summary["runs"]] == [0, 1]
    values = [run["stages"]["adapt"]["after"]["caption2bbox_miou"] for run in summary["runs"]]
    assert summary["mean"]["stages"]["adapt"]["after"]["caption2bbox_miou"] == pytest.approx(sum(values) / 2)
    assert (tmp_path / "run" / "report" / "index.html").is_file()


def test_a_mixture_is_trained_on_by_its_weights_and_evaluated_by_dataset(small_config, sample_set, tmp_path, capsys):
    rows = datasets.load_from_disk(str(sample_set))
    few = {name: rows[name].select(range(0, len(rows[name]), 3)) for name in ("train", "test")}
    datasets.DatasetDict(few).save_to_disk(tmp_path / "few")
    few_steps = {"steps": 3, "packs": 4}
    stages = ("warmup", "pretrain", "adapt")
    short = {stage: dataclasses.replace(getattr(small_config, stage), **few_steps) for stage in stages}
    paths = (str(sample_set), str(tmp_path / "few"))
    data = dataclasses.replace(small_config.data, path=paths, weights=(1.0, 3.0))
    config = dataclasses.replace(small_config, output=str(tmp_path / "run"), data=data, **short)
    train(config)
    name = sample_set.name
    said = capsys.readouterr().out
    assert f"train: {name}, {len(rows['train'])} images, 25.0 % of those drawn" in said and "75.0 % of those" in said
    lines = training_lines(tmp_path / "run")
    assert all(line[f"images {name}"] + line["images few"] == line["images"] for line in lines)
    assert sum(line["images few"] for line in lines) > 0.6 * sum(line["images"] for line in lines)
    summary = json.loads((tmp_path / "run" / "report" / "summary.json").read_text())
    assert summary["data"]["shares"] == {name: 0.25, "few": 0.75}
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "few: 75.0 % of the images drawn" in page and "<th>dataset few<small>" in page
    after = summary["mean"]["stages"]["adapt"]["after"]
    assert {"caption2bbox_acc50", f"dataset {name}/caption2bbox_acc50", "dataset few/caption2bbox_acc50"} <= set(after)
    prints = json.loads((tmp_path / "run" / "data.json").read_text())["train"]
    assert [part["name"] for part in prints] == [name, "few"] and len({part["fingerprint"] for part in prints}) == 2
    other = dataclasses.replace(data, path=paths[::-1])
    with pytest.raises(ValueError, match="not the one that the run"):
        train(dataclasses.replace(config, data=other))


def test_another_configuration_in_the_same_folder_is_refused_with_the_difference(finished):
    config, _ = finished
    with pytest.raises(ValueError, match="seed: 0 there, 5 now"):
        train(dataclasses.replace(config, seed=5))


@pytest.mark.parametrize("name", ["compact", "paper"])
def test_the_large_presets_take_their_steps(sample_set, tmp_path, name):
    """With small models, but their own sequences, image sizes, forms of boxes, distillation and precision."""
    preset = PRESETS[name]
    few = {"steps": 1, "epochs": None, "packs": 1, "images": None, "warmup_steps": 0}
    config = dataclasses.replace(
        preset,
        output=str(tmp_path / "run"),
        data=dataclasses.replace(preset.data, path=str(sample_set), eval_images=2, workers=1),
        model=dataclasses.replace(
            preset.model, encoder=None, llm=None, encoder_width=32, encoder_layers=1, encoder_heads=2, llm_width=32,
            llm_layers=1, llm_heads=2, vocabulary=400,
        ),
        pretrain=dataclasses.replace(preset.pretrain, **few | {"steps": 2}),
        adapt=dataclasses.replace(preset.adapt, **few),
        control=False,
        device="cpu",
    )  # fmt: skip
    train(config)
    lines = training_lines(tmp_path / "run")
    assert [line["stage"] for line in lines] == ["pretrain", "pretrain", "adapt"] and lines[1]["loss_distill"] > 0


def test_a_finished_run_keeps_what_it_measured_when_asked_again(finished):
    config, folder = finished
    summary = folder / "report" / "summary.json"
    before = json.loads(summary.read_text())
    logs = (folder / "metrics.jsonl", folder / "control" / "metrics.jsonl")
    lines = [json.loads(line) for path in logs for line in path.read_text().splitlines()]
    train(dataclasses.replace(config, log_every=7, data=dataclasses.replace(config.data, workers=2)))
    after = json.loads(summary.read_text())
    assert after["runs"] == before["runs"] and after["commit"] == before["commit"]
    assert after["seconds"] >= after["runs"][0]["seconds"] == pytest.approx(sum(line["seconds"] for line in lines))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "abacus"}, "device: 'abacus' can't be used here"),
        ({"data.capacity": 40}, "data.capacity is 40; an image takes up to 9 tokens"),
        ({"model.llm": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_a_setting_that_can_not_be_built_claims_no_folder(small_config, tmp_path, change, message):
    ((name, value),) = change.items()
    owner, _, field = name.rpartition(".")
    new = {field: value} if not owner else {owner: dataclasses.replace(getattr(small_config, owner), **{field: value})}
    with pytest.raises((ValueError, OSError), match=message):
        train(dataclasses.replace(small_config, output=str(tmp_path / "run"), **new))
    assert not (tmp_path / "run").exists()


def test_a_dataset_without_regions_is_refused_before_training(small_config, sample_set, tmp_path):
    split = datasets.load_from_disk(str(sample_set))
    split["test"] = split["test"].map(lambda row: {"regions": [], "caption": "something"})
    split.save_to_disk(tmp_path / "data")
    data = dataclasses.replace(small_config.data, path=str(tmp_path / "data"))
    with pytest.raises(ValueError, match="its split test has no region"):
        train(dataclasses.replace(small_config, output=str(tmp_path / "run"), data=data))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_left_alone(small_config, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds no run"):
        train(dataclasses.replace(small_config, output=str(tmp_path)))
    assert sorted(os.listdir(tmp_path)) == ["thesis.txt"]


def test_a_folder_that_is_no_dataset_is_named_and_claims_nothing(small_config, tmp_path):
    data = dataclasses.replace(small_config.data, path=str(tmp_path))
    with pytest.raises(ValueError, match="no dataset at"):
        train(dataclasses.replace(small_config, output=str(tmp_path / "run"), data=data))
    assert not (tmp_path / "run").exists()


def test_mean_keeps_what_every_run_has():
    assert mean([{"a": {"x": 1.0, "y": 2.0}}, {"a": {"x": 3.0}}]) == {"a": {"x": 2.0}}
