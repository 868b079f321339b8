"""bench/evidence.py at a size that runs in seconds, and the tables and figures made of its rows."""

import importlib
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
NO_ROWS = {f"evidence-{name}.png" for name in ("tuned", "quality", "scaling")}


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("evidence")


@pytest.fixture
def tables(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    performance = importlib.import_module("performance")
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    performance.kept.cache_clear()
    yield importlib.import_module("evidence_tables")
    performance.kept.cache_clear()  # the files of a test are gone


@pytest.mark.parametrize("size", ["small", "compact"])
def test_every_variant_is_a_run_and_changes_something(evidence, monkeypatch, tmp_path, size):
    monkeypatch.setattr(evidence, "with_data", lambda config: config)
    monkeypatch.setattr(evidence, "part_of", lambda path, part, folder, first: f"every {part}")
    variants = {name: variant for part in evidence.PARTS.values() for name, variant in part.items()}
    chosen = evidence.SIZES[size]
    configs = {name: evidence.config_of(chosen, variant, 0, tmp_path) for name, variant in variants.items()}
    whole = configs.pop(importlib.import_module("evidence_variants").WHOLE)
    for name, config in configs.items():
        assert config != whole or variants[name].wrong or name == "boxes token by token", name
    assert configs["boxes token by token"].adapt.steps == 2 * whole.adapt.steps
    assert evidence.SEEDS.keys() == evidence.PARTS.keys()


@pytest.mark.slow
def test_a_row_says_what_the_audit_left_out_and_is_not_trained_twice(evidence, monkeypatch, tmp_path):
    from granvit.data.sample import cached_sample

    few = "--threads 1 --device cpu --model.encoder-width 64 --model.encoder-layers 2 --model.llm-layers 2"
    steps = " ".join(f"--{stage}.steps {steps}" for stage, steps in (("warmup", 5), ("pretrain", 10), ("adapt", 5)))
    path = cached_sample(400, pages=0.05)
    size = evidence.Size(f"smoke {few} {steps} --data.path {path}", "", "", asked=10, probed=200, part=8)
    monkeypatch.setitem(evidence.SIZES, "tiny", size)
    row = evidence.measured("tiny", "quality", "30 % wrong, audited", 0, tmp_path)
    audit = {name: sum(of[name] for of in row["audit"].values()) for name in row["audit"]["natural"]}
    assert audit["wrong"] == pytest.approx(0.3 * audit["checked"], rel=0.05)
    assert 0 < audit["wrong_left_out"] < audit["left_out"] < audit["checked"]
    assert row["regions"] == audit["checked"] - audit["left_out"]
    assert row["pretrain"]["steps"] == 10 and row["adapt"]["steps"] == 5
    assert row["encoder"]["probe"].keys() == row["encoder"]["pixels"].keys() and row["photographs"]

    def trained(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(evidence.Run, "new_phase", trained)
    again = evidence.measured("tiny", "quality", "30 % wrong, audited", 0, tmp_path)
    assert again["adapt"]["metrics"] == row["adapt"]["metrics"]


def test_tables_show_means_and_ranges(tables, tmp_path):
    def row(variant, seed, kind, said):
        metrics = {"bbox2caption_kind": said, "natural_caption2bbox_acc50": 0.5, "natural_caption2bbox_acc75": 0.25}
        stage = {"metrics": metrics, "regions_asked": 1234, "images": 617}
        return {
            "size": "small", "variant": variant, "seed": seed, "device": "a CPU", "commit": "abc", "regions": 1000,
            "encoder": {
                "probe": {"kind linear 1x1": kind}, "pixels": {"kind linear 1x1": 0.2},
                "counts": {"train": {"regions": 5}, "test": {"regions": 6}},
            },
            "pretrain": stage, "adapt": stage, "pretrain_pace": 0.5, "adapt_pace": 0.25,
            "boxes_a_second": {"one step": 300.0, "token by token": 200.0},
        }  # fmt: skip

    guesses = {"blind": {"bbox2caption_kind": 0.01}, "mean_box": {"natural_caption2bbox_acc50": 0.02}}
    floors = {"size": "small", "variant": "floors", "floors": guesses, "device": "counted", "commit": "abc"}
    rows = [row(tables.WHOLE, 0, 0.5, 0.3), row(tables.WHOLE, 1, 0.7, 0.2), row(tables.RANDOM, 0, 0.1, 0.0), floors]
    others = (tables.ONE_QUESTION, "no self-distillation", "boxes token by token", tables.ONE_STEP)
    rows += [row(name, 0, 0.4, 0.1) for name in others]
    (tmp_path / "evidence.json").write_text(json.dumps(rows))
    lines = tables.table("questions")
    kinds = "60.0 (50.0 to 70.0) |  |  | 25.0 (20.0 to 30.0)"
    assert f"| {tables.WHOLE}, per cent | 2 | {kinds} |  | 50.0 (50.0 to 50.0) | 25.0 (25.0 to 25.0) |" in lines
    assert f"| {tables.ONE_QUESTION} | 1 | -10.0 |  |  | -20.0 |  | +0.0 | +0.0 |" in lines  # against seed 0 alone
    assert "abc" in lines[-1] and "boxes as location tokens" not in "".join(lines)
    lines = tables.probe()
    assert "| one vector | before stage 1 |  |  |  |  | 10.0 |  |" in lines
    assert "| one vector | mean colour |  |  |  |  | 20.0 |  |" in lines and "5 regions" in lines[-1]
    lines = tables.parts()
    assert "| stage 2 alone, on a random encoder | 1 |  | 0.0 |  | 50.0 | 25.0 |" in lines
    assert "| best guess without the image |  |  | 1.0 |  | 2.0 |  |" in lines
    assert "| the whole method | 1,000 | 1,234 | 1,234 |" in tables.asked()
    assert "10 % of cases before it, in 60 % after" in tables.summary()[0] and "of 2 seeds" in tables.summary()[-1]
    assert "0.50" in tables.pace()[0] and "0.25" in tables.pace()[0]
    assert tables.table("quality") == [tables.NOT_YET]
    assert "1.50 times" in tables.speed()[0] and "1.5 times" in tables.summary()[1]
    assert "0.75 25 % and 25 %" in tables.summary()[1]
    drawn = importlib.import_module("evidence_figures")
    drawn.draw(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {f"evidence-{n}.png" for n in drawn.FIGURES} - NO_ROWS
    left, *_ = drawn.of_table("questions").axes
    assert [label.get_text() for label in left.get_yticklabels()] == [tables.ONE_QUESTION]
    assert left.lines[1].get_xdata() == pytest.approx([-10])  # against seed 0 alone; the first line is the mark at 0


def test_scaling_has_no_figure_where_no_seed_is_common(tables, tmp_path):
    rows = [{"size": "small", "variant": tables.WHOLE, "seed": 1}, {"size": "small", "variant": tables.PART, "seed": 0}]
    (tmp_path / "evidence.json").write_text(json.dumps(rows))
    assert importlib.import_module("evidence_figures").of_scaling() is None


def test_without_rows_it_says_so(tables, tmp_path):
    others = ("probe", "parts", "asked", "pace", "speed", "audits", "photographs", "summary")
    made = [*map(tables.table, tables.TABLES), *(getattr(tables, name)() for name in others)]
    assert all(lines == [tables.NOT_YET] for lines in made)
    importlib.import_module("evidence_figures").draw(tmp_path)
    assert not list(tmp_path.glob("*.png"))
