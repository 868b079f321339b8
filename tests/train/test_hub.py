"""Models and datasets to the Hugging Face hub, which is a stand-in here that speaks as much of its interface."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from granvit.data.__main__ import main as data
from granvit.export import main as export
from granvit.train.card import write_card
from tests.helpers.fake_hub import fake_hub

HELPER = Path(__file__).parents[1] / "helpers" / "by_the_hub.py"


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, processor = tiny()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    region = {"box": [0.1, 0.1, 0.9, 0.9], "caption": "a red wall", "kind": "natural"}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "regions": [region]}) + "\n")
    assert data(["convert", "jsonl", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "rows")]) == 0
    return tmp_path / "rows"


def test_a_model_and_a_dataset_go_to_the_hub_and_come_back(model, rows, tmp_path):
    with fake_hub(token="hf_of_a_test") as (there, repositories, visibility):
        online = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
        environment = online | there | {"HF_HOME": str(tmp_path / "cache")}
        command = [sys.executable, HELPER, model, rows]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    private = {name for name, asked in visibility.items() if asked == "private"}
    assert private == {"models/me/whole", "datasets/me/rows"}
    assert visibility["models/me/encoder"] is None  # the owner's default
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["codes"] == [0, 0, 0] and result["same features"] and result["same weights"]
    assert result["captions"][0] == result["captions"][1] and result["rows"] == 1
    assert 'GranViT.from_pretrained("me/whole")' in result["card"] and "FOLDER" not in result["card"]
    assert 'AutoModel.from_pretrained("me/whole", subfolder="encoder")' in result["card"]
    uploaded = repositories["datasets/me/rows"]
    assert set(uploaded) == {path.name for path in rows.iterdir() if not path.name.startswith(".")}
    assert not [name for files in repositories.values() for name in files if name.startswith((".", "/"))]


def test_what_cant_be_pushed_is_said(model, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for token, message in ((None, "no token of the hub"), ("hf_ü", "beyond ASCII"), ("hf_a b", "spaces")):
        monkeypatch.setattr("huggingface_hub.get_token", lambda token=token: token)
        assert export([str(model), "--push-to-hub", "me/whole", "--output", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert message in said and "hf auth login" in said and str(token) not in said
        assert not (tmp_path / "out").exists()  # nor was the model loaded
    assert export([str(model), "--push-to-hub", "a/b/c"]) == 2
    assert "'a/b/c' can't be a repository's name" in capsys.readouterr().err
    for words in (["--private", "--output", str(tmp_path / "out")], []):
        with pytest.raises(SystemExit):
            export([str(model), *words])
        assert "--push-to-hub OWNER/NAME" in capsys.readouterr().err
    assert data(["push", str(model), "me/rows"]) != 0
    assert "is no dataset that convert" in capsys.readouterr().err
    (rows / ".unfinished").mkdir()
    assert data(["push", str(rows), "me/rows"]) != 0
    assert "holds unfinished work" in capsys.readouterr().err


def test_a_hub_that_cant_be_reached_is_said(model, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_of_a_test")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: huggingface_hub.hf_api.HfApi("http://127.0.0.1:9"))
    assert export([str(model), "--push-to-hub", "me/whole"]) == 1
    assert "the hub did not take me/whole" in (said := capsys.readouterr().err) and "hf upload" not in said
    folder = tmp_path / "o u t"
    assert export([str(model), "--push-to-hub", "me/whole", "--private", "--output", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert f"as granvit in {folder}" in out and (folder / "model.safetensors").is_file()
    assert "the hub did not take me/whole" in err and f"`hf upload me/whole '{folder}' . --private` sends it" in err


def test_the_card_names_the_stock_form_of_a_model_that_has_it(model, tiny, tmp_path):
    tiny(box_style="text", box_format="text", pixel_shuffle=2, cell_positions=False)[0].save_pretrained(tmp_path)
    for folder in (tmp_path, model):
        write_card(folder, "granvit")
    assert "--format lfm2-vl" in (tmp_path / "README.md").read_text()
    assert "--format lfm2-vl" not in (model / "README.md").read_text()
