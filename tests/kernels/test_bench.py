"""The measurements that wait for a GPU, as far as they run without: peers give what we give, nothing is broken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
DRY = {**os.environ, "GRANVIT_BENCH_DEVICE": "cpu"}


def test_dry_run_of_the_gpus_benchmarks():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(BENCH / "test_gpu.py")]
    command.append("--benchmark-only")
    done = subprocess.run(command, env=DRY, capture_output=True, text=True)
    assert done.returncode == 0 and "18 passed" in done.stdout, done.stdout


def test_without_a_gpu_they_are_skipped_with_a_reason():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(BENCH / "test_gpu.py")]
    assert "needs a CUDA device" in subprocess.run(command, env=environment, capture_output=True, text=True).stdout


@pytest.mark.parametrize("operator", ["roi_gather", "region_attention", "pack_patches"])
def test_what_the_sanitizer_watches_runs(operator):
    command = [sys.executable, str(BENCH / "sanitize.py"), operator]
    assert subprocess.run(command, env=DRY, capture_output=True, text=True, check=True).stdout == "done\n"
