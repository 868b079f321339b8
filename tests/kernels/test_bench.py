"""The measurements that wait for a GPU, as far as they run without: peers give what we give, nothing is broken."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
# pytest-benchmark measures nothing in a worker of pytest-xdist, which it tells by a variable.
DRY = {**os.environ, "GRANVIT_BENCH_DEVICE": "cpu"}
DRY.pop("PYTEST_XDIST_WORKER", None)


def test_dry_run_of_the_gpus_benchmarks(tmp_path):
    """Ours and the peers are right, and rows of all of them are kept; no other peer fails than one that can't run."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(BENCH / "test_gpu.py")]
    command.append("--benchmark-only")
    environment = {**DRY, "GRANVIT_BENCH_RESULTS": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    all_passed = re.search(r"^\d+ passed(, \d+ warnings?)? in", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and all_passed, done.stdout
    rows = json.loads((tmp_path / "dry-run.json").read_text())
    assert {"granvit", "granvit, CUDA graph", "torchvision", "FlexAttention"} <= {row["provider"] for row in rows}
    cannot = "ModuleNotFoundError: No module named 'torchvision'", "NotImplementedError: FlexAttention"
    for row in rows:
        assert row["device"] == "dry run" and row["commit"]
        if "failed" in row:
            assert row["failed"].startswith(cannot), row
        else:
            assert min(row["median"], row["ratio"], row["share"], row["host_us"]) > 0


def test_without_a_gpu_they_are_skipped_with_a_reason():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    files = BENCH / "test_gpu.py", BENCH / "test_gpu_training.py"
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *map(str, files)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    for file in files:
        assert re.search(rf"^SKIPPED .*{file.name}.*needs a CUDA device", said, re.MULTILINE), said
    assert not re.search(r"^\d+ passed|failed|error", said, re.MULTILINE), said


def test_what_the_sanitizer_watches_runs():
    operators = ["roi_gather", "region_attention", "region_pool", "pack_patches"]
    command = [sys.executable, str(BENCH / "sanitize.py"), *operators]
    assert subprocess.run(command, env=DRY, capture_output=True, text=True, check=True).stdout == "done\n"


def test_figures_of_the_documentation_are_drawn(tmp_path):
    """Those that docs/kernels.md shows, each with the words of its operator."""
    command = "import figures, pathlib, sys; figures.draw(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": f"{BENCH}{os.pathsep}{BENCH.parent}"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", command, tmp_path], env=environment, check=True)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    docs = BENCH.parent / "docs"
    assert set(drawn) == {path.name for path in (docs / "figures").glob("*.svg")}
    assert set(drawn) == set(re.findall(r"\]\(figures/(.*?)\)", (docs / "kernels.md").read_text()))
    assert "cu_seqlens" in drawn["PackedLayout.svg"] and "tile of tokens" in drawn["region_pool.svg"]


def test_the_documentation_names_every_operator():
    import granvit_kernels

    page = (BENCH.parent / "docs" / "kernels.md").read_text()
    for name in granvit_kernels.__all__:
        assert f"`{name}" in page, name
