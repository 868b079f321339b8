"""Files of a run that are missing, damaged or cut short: a report names them, or does without."""

import errno
import json
import re
from pathlib import Path
from unittest.mock import Mock

import datasets
import pytest
from reported import HOSTILE, LEFT, caption, lay_out, metrics

from granvit.eval.report import write_report


@pytest.mark.parametrize("missing", ["metrics.jsonl", "report/summary.json", "report/predictions.json"])
def test_an_unfinished_run_is_said(tmp_path, summary, missing):
    run = lay_out(tmp_path / "run", summary)
    (run / missing).unlink()
    with pytest.raises(ValueError, match=f"no finished run: {missing} is missing"):
        write_report(run)


SUMMARY, ANSWERS = "report/summary.json", "report/predictions.json"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (SUMMARY, lambda text: text[:-9], "Expecting"),
        (SUMMARY, lambda text: "[]", "it is [], not an object"),
        (SUMMARY, lambda text: text.replace('"floors"', '"lost"'), "it has no floors"),
        (SUMMARY, lambda text: text.replace('"runs": [', '"runs": [3, '), "runs[0] is 3, not an object"),
        (SUMMARY, lambda text: text.replace('"control"', '"lost"', 1), "runs[0].stages.adapt has no control"),
        (SUMMARY, lambda text: text.replace("0.01", "NaN"), "whole_image.caption2bbox_acc50 is nan, not a finite"),
        (SUMMARY, lambda text: text.replace("0.25", "1e308"), "blind.bbox2caption_rouge_l is 1e+308, not"),
        (SUMMARY, lambda text: text.replace("0.01", "1.5"), "whole_image.caption2bbox_acc50 is 1.5, not from 0 to 1"),
        (ANSWERS, lambda text: text + "}", "Extra data"),
        (ANSWERS, lambda text: '{"before": null}', "before is None, not a list"),
        (ANSWERS, lambda text: text.replace('"answer"', '"lost"', 1), "before[0] has no answer"),
        (ANSWERS, lambda text: text.replace("0.5", "NaN", 1), "before[0].box[2] is nan, not a finite number"),
        (ANSWERS, lambda text: text.replace("[0.5, 0.0,", "[", 1), "before[1].predicted_box has 2 values, not 4"),
        ("metrics.jsonl", lambda text: "3\n" + text, "line 1 is 3, not an object"),
        ("metrics.jsonl", lambda text: text.replace('"step": 0', '"step": null', 1), "line 1.step is None, not"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path, summary, name, change, message):
    path = lay_out(tmp_path / "run", summary) / name
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged: .*{re.escape(message)}"):
        write_report(tmp_path / "run")


def test_a_cut_last_line_and_a_run_without_stages_have_a_report(tmp_path, summary, monkeypatch):
    summary["runs"][0]["stages"] = summary["mean"]["stages"] = {}
    run = lay_out(tmp_path / "run", summary)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "adapt", "step": 4, "evaluation": "during", **metrics(1e308, 0.5)}))
        file.write('\n{"stage": "adapt", "st')
    (run / "metrics.jsonl").write_bytes(b"\xff\n" + (run / "metrics.jsonl").read_bytes())  # a broken byte
    page = write_report(run)
    text = page.read_text(encoding="utf-8")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(Path, "replace", Mock(side_effect=OSError(errno.EIO, "killed")))
        write_report(run)
    assert page.read_text(encoding="utf-8") == text


def test_faults_of_rows_that_are_not_shown_end_no_report(tmp_path, summary, gran_rows):
    """A run of a raised fault budget has kept to it; its report must not count again by another."""
    shown = [("a", [(LEFT, "a red circle", "natural")], "photos"), ("b", [(LEFT, "Total 12", "ocr")], "pages")]
    shown.append(("c", [(LEFT, HOSTILE, "natural")], "photos"))
    broken = [("broken", [(LEFT, "x", "natural")], "photos")] * 5
    datasets.DatasetDict({"test": gran_rows(broken + shown)}).save_to_disk(tmp_path / "faulty")
    summary["data"]["path"] = str(tmp_path / "faulty")
    assert write_report(lay_out(tmp_path / "run", summary)).is_file()


def test_a_dataset_that_lacks_a_shown_image_is_named(tmp_path, summary):
    run = lay_out(tmp_path / "run", summary)
    strangers = {"pretrain": [caption("stranger", "x", "y")]}
    (run / "report" / "predictions.json").write_text(json.dumps(strangers))
    with pytest.raises(ValueError, match="has no test image 'stranger'"):
        write_report(run)
