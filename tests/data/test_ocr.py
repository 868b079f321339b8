"""RapidOCR for real, on pages whose lines are known: bench/ocr.py in small, held to bounds."""

import importlib.util
import json
from pathlib import Path

import pytest

for package in ("rapidocr", "onnxruntime", "reportlab"):
    pytest.importorskip(package)

PATH = Path(__file__).parents[2] / "bench" / "ocr.py"


def test_lines_are_found_and_read():
    """Measured on 24 pages of each: see bench/results/ocr.json; bounds leave room for other versions of the models."""
    spec = importlib.util.spec_from_file_location("bench_ocr", PATH)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    found = bench.measure(pages=3, seed=1)
    for kind in ("PDF pages", "sample pages", *bench.LAYOUTS):
        rates = found[kind]
        assert rates["lines"] >= 10
        assert rates["recall"] >= 0.97 and rates["precision"] >= 0.97 and rates["mean_iou_of_found"] >= 0.85, kind
        assert rates["cer"] <= 0.03, kind


def test_kept_figures_are_of_a_commit():
    kept = json.loads(PATH.with_name("results").joinpath("ocr.json").read_text())
    assert kept["PDF pages"]["lines"] > 1000 and not kept["commit"].endswith("dirty")
