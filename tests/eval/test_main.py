"""python -m granvit.eval, on a tiny untrained model."""

import io
import json
import math
import re
from unittest.mock import Mock

import datasets
import pytest
import ranks
import yaml
from launching import run_ranks
from rich.console import Console

from granvit.eval import evaluation, loading
from granvit.eval.__main__ import main
from granvit.eval.names import figure_name
from granvit.eval.terminal import frequent_sources, print_figures, table

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


@pytest.fixture
def data(gran_rows, tmp_path):
    """A folder with a Gran dataset of the splits train and test."""
    rows = gran_rows(
        [
            ("a", [(LEFT, "a cat", "natural"), (RIGHT, "a dog", "natural")], "photos"),
            ("b", [(LEFT, "Total 12", "ocr")], "pages"),
        ]
    )
    splits = {"train": rows, "test": rows, "bare": gran_rows([("a", [], "photos")])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    return tmp_path / "data"


def test_a_model_is_measured_beside_the_floors(saved, data, tmp_path, capsys):
    out = tmp_path / "result.json"
    assert main([str(saved[0]), "--data", str(data), "--json", str(out), "--blind", "--device", "cpu"]) == 0
    result = json.loads(out.read_text())
    assert result["counts"]["bbox2caption"] == len(
        [p for p in result["predictions"] if p["task"] == "bbox2caption"]
    )
    assert result["floors"]["most_frequent"]["ocr_exact"] == 1.0
    assert set(result["blind"]) == {"other image", "text alone"}
    assert (
        result["metrics"]["caption2bbox_unparsed"]
        == sum(p["predicted_box"] is None for p in result["predictions"] if p["task"] == "caption2bbox")
        / result["counts"]["caption2bbox"]
    )
    shown = capsys.readouterr().out
    for name, value in result["metrics"].items():
        of, called = figure_name(name)
        if "_small" not in name and "_large" not in name and "/" not in name:
            number = f"{value:.2f}" if "cider" in name else f"{100 * value:.1f}"
            assert re.search(rf"^{of}\b(?:.*\n)(?:  .*\n)*?  {called} +{number}\b", shown, re.M), name
    assert "all: 3" in shown and "not text: 2" in shown and "pages of text: 1" in shown


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(saved, gran_rows, tmp_path, capsys):
    """A broken picture too, which one of them alone meets, is counted once; weights in bfloat16."""
    rows = [(f"{'i' * i}", [(LEFT, f"a cat {i}", "natural"), (RIGHT, f"{i}", "ocr")], f"{i % 2}") for i in range(1, 9)]
    rows = gran_rows([*rows, ("broken", [(LEFT, "a dog", "natural")], "0")])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "data")
    options = ["--data", str(tmp_path / "data"), "--batch-size", "2", "--precision", "bfloat16", "--blind"]
    options = [str(saved[0]), *options, "--fault-budget", "0.2", "--device", "cpu", "--json"]
    run_ranks(ranks.measure, 2, *options, str(tmp_path / "two.json"), seconds=120)
    assert main([*options, str(tmp_path / "one.json")]) == 0
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two and one["counts"]["bbox2caption"] == 16
    assert "left out: 1 of 9 rows have faults (image 1)" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["run", "run/export"])
def test_a_run_is_asked_about_its_own_test_set(saved, data, tmp_path, capsys, place):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "export").symlink_to(saved[0] / "export")
    config = {"data": {"path": str(data), "images": 9, "pages": 0.05}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    assert main([str(tmp_path / place), "--device", "cpu", "--json", str(tmp_path / "result.json")]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["data"] == str(data)
    (tmp_path / "run" / "config.yaml").write_text("data: [}")
    assert main([str(tmp_path / place), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "config.yaml does not say which data the run had" in said and "line 1, column" in said and "Mark" not in said


def test_the_sample_set_is_that_of_a_run_without_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "cached_sample", lambda images, seed, pages: tmp_path / f"{images} {seed} {pages}")
    (tmp_path / "config.yaml").write_text("data: {path: null, images: 200, pages: 0.05}")
    assert loading.own_data(tmp_path) == [str(tmp_path / "200 0 0.05")]
    (tmp_path / "seed-0").mkdir()
    monkeypatch.setattr(loading, "cached_sample", None)
    assert main([str(tmp_path)]) == 2 and "is a run of several seeds; choose one of" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("data: {path: [a, b], images: 200, pages: 0.05}")
    assert loading.own_data(tmp_path / "seed-0") == ["a", "b"]


def test_ctrl_c_is_said_in_a_line(saved, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "answer", Mock(side_effect=KeyboardInterrupt))
    out = tmp_path / "result.json"
    assert main([str(saved[0]), "--data", str(data), "--device", "cpu", "--json", str(out)]) == 130
    assert capsys.readouterr().err.endswith("stopped: nothing was written\n") and not out.exists()


def test_figures_that_no_json_can_hold_leave_the_old_result(saved, data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "summarise", lambda predictions: {"bbox2caption_exact": math.nan})
    out = tmp_path / "result.json"
    out.write_text("old")
    assert main([str(saved[0]), "--data", str(data), "--device", "cpu", "--json", str(out)]) == 2
    assert out.read_text() == "old"


def test_without_a_train_split_the_missing_floors_are_said(saved, data, tmp_path, capsys):
    datasets.DatasetDict({"test": datasets.load_from_disk(data)["test"]}).save_to_disk(tmp_path / "bare")
    assert main([str(saved[0]), "--data", str(tmp_path / "bare"), "--limit", "1", "--device", "cpu"]) == 0
    assert "no floors: split must be one of ['test']" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere"}, "no model at nowhere: it is not there"),
        ({"--data": "nowhere"}, "no dataset at nowhere"),
        ({"--split": "dev"}, "split must be one of"),
        ({"--device": "foo"}, "device: 'foo' can't be used here"),
        ({"--precision": "float8"}, "precision: got 'float8', accepted are 'float32', 'bfloat16'"),
        ({"--data": ""}, "is no run (no config.yaml in it or above), so it has no test set; give --data DIR"),
        ({"--split": "bare"}, "nothing to ask: none of 1 rows has a region"),
    ],
)
def test_what_cannot_be_used_is_one_line(saved, data, capsys, change, message):
    options = {"model": str(saved[0]), "--data": str(data), "--split": "test"} | change
    code = main([options.pop("model"), *(part for item in options.items() for part in item)])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("granvit eval: error: ") and message in error


def test_numbers_out_of_range_are_usage_errors(capsys):
    with pytest.raises(SystemExit):
        main(["model", "--data", "data", "--batch-size", "0"])
    assert "--batch-size must be at least 1, got 0" in capsys.readouterr().err


def test_a_result_that_could_not_be_written_is_said_before_the_work(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["model", "--data", "data", "--json", str(tmp_path / "none" / "result.json")])
    assert "there is no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["model", "--data", "data", "--json", str(tmp_path)])
    assert "it is a folder; give a file" in capsys.readouterr().err


def test_a_sources_name_is_text_and_no_markup():
    source, shown = "[red]\x1b[31m", io.StringIO()
    name = f"{source}/bbox2caption_exact"
    drawn = table("[b]title", [name], {"model": {name: 0.5}}, [source], {f"{source}/": 1234})
    Console(file=shown, width=100).print(drawn)
    shown = shown.getvalue()
    assert "[b]title" in shown and "[red]\\x1b[31m: 1,234" in shown and "50.0" in shown and "\x1b" not in shown


def test_of_a_hundred_sources_the_most_frequent_are_shown_in_80_columns_and_all_written(
    saved, gran_rows, tmp_path, capsys
):
    names = [f"https://example.org/a/very/long/path/of/a/crawl/{'x' * 20}/{i:03}" for i in range(100)]
    rows = [(f"row-{i}", [(LEFT, f"a cat {i}", "natural")], name) for i, name in enumerate(names)]
    rows += [(f"more-{i}", [(LEFT, f"a dog {i}", "natural"), (RIGHT, "Total", "ocr")], "photos") for i in range(3)]
    rows += [(f"some-{i}", [(LEFT, f"a hat {i}", "natural")], names[7]) for i in range(2)]
    rows = gran_rows(rows)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "data")
    out = tmp_path / "[bold]results :dog:" / "result.json"
    out.parent.mkdir()
    options = ["--data", str(tmp_path / "data"), "--json", str(out), "--device", "cpu", "--blind"]
    assert main([str(saved[0]), *options]) == 0
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines() if out.name not in line) <= 80
    assert shown.index("photos: 6") < shown.index("https://"), "the most frequent first"
    assert f"and 96 more sources of 192 questions, 2 or fewer each: all are in {out}\n" in shown
    assert f"written to {out}\n" in shown
    metrics = json.loads(out.read_text())["metrics"]
    assert {f"{name}/bbox2caption_exact" for name in names} <= metrics.keys()


def test_a_source_of_a_tasks_name_and_none_have_their_rows():
    names = [f"{source}bbox2caption_exact" for source in ("", "caption2bbox-train/", "/")]
    shown = io.StringIO()
    figures = dict.fromkeys(names, 0.5)
    asked = {"bbox2caption": 3, "caption2bbox-train/bbox2caption": 2, "/bbox2caption": 1}
    print_figures(Console(file=shown, width=100), {"model": figures}, asked)
    shown = shown.getvalue()
    assert "all: 3" in shown and "caption2bbox-train: 2" in shown and "no source named: 1" in shown
    assert "Boxes" not in shown


def test_frequent_sources_are_counted_over_tasks():
    asked = {"bbox2caption": 9, "natural_bbox2caption": 9, "a/b/bbox2caption": 4, "a/b/caption2bbox": 2}
    asked["c/bbox2caption"] = 5
    assert frequent_sources(asked) == (["a/b", "c"], {})
    shown, hidden = frequent_sources(asked | {f"source {i}/bbox2caption": i for i in range(1, 9)})
    assert shown == ["source 8", "source 7", "a/b", "source 6", "c"] and hidden["source 5"] == 5
