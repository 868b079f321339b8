"""python -m granvit.export, of runs finished and under way."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel

from granvit.eval.loading import find_encoder
from granvit.export import main
from granvit.metrics_log import MetricsLog
from granvit.model import GranViT, VisionEncoder
from granvit.train.card import write_card
from granvit.train.presets import load_config, save_config
from granvit.train.retention import checkpoints_of
from granvit.train.run import train


@pytest.fixture(scope="module")
def run(small_config, tmp_path_factory):
    """A finished run of stage 1."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    stage = replace(small_config.pretrain, steps=3, warmup_steps=0)
    none = replace(small_config.adapt, steps=0)
    train(replace(small_config, output=str(folder), pretrain=stage, adapt=none, checkpoint_every=2))
    return folder


def weights(folder):
    return GranViT.from_pretrained(folder).state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_finished_run_gives_its_export_again(run, tmp_path, capsys):
    assert main([str(run), "--output", str(tmp_path / "again")]) == 0
    assert equal(weights(tmp_path / "again"), weights(run / "export"))
    assert str(run) in capsys.readouterr().out


def test_a_run_under_way_gives_its_newest_checkpoint(run, tmp_path):
    going = tmp_path / "going"
    shutil.copytree(run, going, ignore=shutil.ignore_patterns("config.json", "result.json"))
    (last,) = [path for path in checkpoints_of(going / "checkpoints", "pretrain") if path.name.endswith("-final")]
    assert main([str(going), "--output", str(tmp_path / "newest")]) == 0
    assert equal(weights(tmp_path / "newest"), weights(run / "export"))
    shutil.rmtree(last)
    assert main([str(going), "--output", str(tmp_path / "earlier")]) == 0
    assert not equal(weights(tmp_path / "earlier"), weights(run / "export"))


def test_a_run_on_the_sample_set_gives_its_checkpoint(run, tmp_path, monkeypatch, capsys):
    going = tmp_path / "going"
    shutil.copytree(run, going, ignore=shutil.ignore_patterns("export"))
    config = load_config(going / "config.yaml")
    save_config(replace(config, data=replace(config.data, path=None)), going / "config.yaml")
    monkeypatch.setattr("granvit.train.splits.cached_sample", lambda *_, **__: config.data.path)
    assert main([str(going), "--output", str(tmp_path / "model")]) == 0
    assert equal(weights(tmp_path / "model"), weights(run / "export"))
    # A tokenizer made of other data's text would read and write other words.
    (going / "data.json").write_text('{"train": {"rows": 1}}')
    assert main([str(going), "--output", str(tmp_path / "wrong")]) == 2
    assert "not the one that the run" in capsys.readouterr().err and not (tmp_path / "wrong").exists()


def test_the_encoder_is_there_when_stage_1_has_ended(run, tmp_path):
    going = tmp_path / "going"
    shutil.copytree(run / "export" / "encoder", going / "export" / "encoder")
    (going / "config.yaml").touch()
    assert find_encoder(going) == going / "export" / "encoder"
    assert main([str(run), "--output", str(tmp_path / "encoder"), "--format", "encoder"]) == 0
    theirs = AutoModel.from_pretrained(tmp_path / "encoder").state_dict()
    assert equal(theirs, VisionEncoder.from_siglip2(run / "export" / "encoder").to_transformers().state_dict())


def test_the_card_says_what_the_run_did(run, tmp_path):
    command = [str(run), "--output", str(tmp_path / "model"), "--license", "apache-2.0"]
    assert main(command) == 0
    for folder, pipeline in (("model", "image-text-to-text"), ("model/encoder", "image-feature-extraction")):
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", pipeline)
        assert "| `pretrain` | encoder, projector | 3 |" in card.text
        measured = [line for line in MetricsLog(run / "metrics.jsonl").lines() if line.get("evaluation") == "after"]
        assert f"| captions of boxes: ROUGE-L | {100 * measured[-1]['bbox2caption_rouge_l']:.1f} |" in card.text
        assert "boxes of sentences" not in card.text  # stage 1 doesn't teach them
    assert "| `warmup` |" in ModelCard.load(tmp_path / "model" / "README.md").text
    assert "None is chosen yet" in ModelCard.load(run / "export" / "encoder" / "README.md").text


def test_the_card_of_a_checkpoint_ends_there(run, tmp_path):
    going = tmp_path / "going"
    shutil.copytree(run, going, ignore=shutil.ignore_patterns("export", "result.json"))
    checkpoint = checkpoints_of(going / "checkpoints", "pretrain")[0]
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"step": 2}))
    write_card(tmp_path, "lfm2-vl", going, checkpoint)
    card = ModelCard.load(tmp_path / "README.md").text
    assert "| `pretrain` | encoder, projector | 2 |" in card and "None were measured" in card


def test_a_card_keeps_what_files_say_as_text(run, tmp_path):
    config = load_config(run / "config.yaml")
    evil = tmp_path / "a`|<b>\n# x"
    evil.mkdir()
    (evil / "README.md").write_text('---\nlicense: "mit |\\n\\n# x <b>"\n1: 2\n---\n')
    other = tmp_path / "run"
    shutil.copytree(run, other)
    data = json.loads((run / "data.json").read_text())
    data = {f"{split} | <b>": part | {"fingerprint": "0\n# x"} for split, part in data.items()}
    (other / "data.json").write_text(json.dumps(data))
    result = {"seed": "<b>\n# x", "device": "<b>", "commit": "<b>", "versions": {"torch": "<b>"}}
    (other / "result.json").write_text(json.dumps(result))
    save_config(replace(config, data=replace(config.data, path=str(evil))), other / "config.yaml")
    write_card(tmp_path, "encoder", other)
    card = (tmp_path / "README.md").read_text()
    assert "| `a  <b> # x` | `train   <b>` |" in card and "| `mit    # x <b>` | `0 # x` |" in card
    assert "\n# x" not in card and "<b>" not in re.sub("`[^`]*`", "", card)
    write_card(tmp_path, "encoder")
    assert "Not known here" in (tmp_path / "README.md").read_text()


def test_what_cant_be_exported_is_said(run, tmp_path, capsys):
    assert main([str(run), "--output", str(tmp_path / "model"), "--format", "lfm2-vl"]) == 2
    assert "box_style" in capsys.readouterr().err
    assert main([str(tmp_path), "--output", str(tmp_path / "model")]) == 2
    assert "no model in" in capsys.readouterr().err
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    assert main([str(tmp_path / "begun"), "--output", str(tmp_path / "model")]) == 2
    assert "no config.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(run), "--output", str(run)])
    assert "already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(run), "--output", str(run / "exported")])
    assert "in the folder of a run" in capsys.readouterr().err
