import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", Path(__file__).parents[2] / "bench" / "soak.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_run_does_not_grow(soak, tmp_path, monkeypatch):
    """300 steps and 20 checkpoints, in the second half of which 9 MB are noise; with 10,000 steps, in bench/soak.py,
    it is a hundredth of that."""
    measured = soak.soak(tmp_path, 300)
    assert measured["checkpoints"] == 20
    for name in ("memory_mb", "reader_memory_mb"):
        assert measured[name]["second_half_slope_per_1000_steps"] < 60, measured
    assert measured["open_files"]["second_half_range"] <= 8, measured
    assert measured["open_files"]["last"] <= measured["open_files"]["first"] + 4, measured
