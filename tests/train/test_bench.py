"""The benchmark of training steps that waits for a GPU, as far as it runs without: both recipes lose the same."""

import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "test_gpu_training.py"
COMMAND = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(BENCH)]


def test_dry_run_of_the_training_benchmark():
    environment = {**os.environ, "GRANVIT_BENCH_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout


def test_without_a_gpu_it_is_skipped_with_a_reason():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    assert "needs a CUDA device" in subprocess.run(COMMAND, env=environment, capture_output=True, text=True).stdout
