"""RapidOCR for real, on pages whose lines are known: bench/ocr.py in small, held to bounds."""

import importlib.util
import json
from pathlib import Path

import pytest

for package in ("rapidocr", "onnxruntime", "reportlab"):
    pytest.importorskip(package)

PATH = Path(__file__).parents[2] / "bench" / "ocr.py"


def test_lines_are_found_and_read():
    """Figures of 24 pages of each stand in bench/results/ocr.json; bounds leave room for other versions of the models.
    The table's are wider: PP-OCR joins some of its cells in small print, and misses a few."""
    spec = importlib.util.spec_from_file_location("bench_ocr", PATH)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    measured = bench.measure(pages=3, seed=1)
    bounds = {"letter": (0.98, 0.01), "columns": (0.98, 0.01), "table": (0.92, 0.08), "sample pages": (0.95, 0.03)}
    for kind, (recall, errors) in bounds.items():
        rates = measured[kind]
        assert rates["lines"] >= 10
        assert rates["recall"] >= recall and rates["precision"] >= recall and rates["cer"] <= errors, kind
        assert rates["mean_iou_of_found"] >= 0.85, kind


def test_kept_figures_are_of_a_commit_and_those_of_the_document():
    kept = json.loads(PATH.with_name("results").joinpath("ocr.json").read_text())
    assert not kept["commit"].endswith("dirty")
    document = PATH.parents[1].joinpath("docs", "data.md").read_text(encoding="utf-8")
    for kind in ("letter", "columns", "table", "PDF pages", "sample pages"):
        row = "| {lines:,} | {recall:.1%} | {precision:.1%} | {mean_iou_of_found:.2f} | {cer:.2%} |\n"
        assert row.format(**kept[kind]) in document, kind
