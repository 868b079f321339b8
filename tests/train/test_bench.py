"""The benchmark of training steps that waits for a GPU, as far as it runs without: both recipes lose the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "test_gpu_training.py"
COMMAND = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(BENCH)]


def test_dry_run_of_the_training_benchmark(tmp_path):
    """Our loss is that of the reference operators, and the other recipe's losses are ours."""
    environment = {**os.environ, "GRANVIT_BENCH_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    environment["GRANVIT_BENCH_RESULTS"] = str(tmp_path)
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
    rows = json.loads((tmp_path / "dry-run-training.json").read_text())
    recipes = ["granvit", "one question a sample", "one question a sample, crops at once"]
    assert [row["provider"] for row in rows] == [*recipes, *recipes[:2]]
    for row in rows:
        assert "failed" not in row and row["device"] == "dry run", row
        assert row["median"] > 0 and ("reached" in row) == (row["provider"] == recipes[1])
