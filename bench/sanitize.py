"""python bench/sanitize.py: compute-sanitizer's memcheck, racecheck and initcheck over small shapes of every operator.

Rows go to bench/results/DEVICE-sanitizer.json as they come; what this commit has passed is not run again. Fails where a
tool finds something.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from granvit.machine import commit
from granvit_kernels import PackedLayout, launch, pack_patches, region_attention, roi_gather

RESULTS = Path(__file__).resolve().parent / "results"
TOOLS = ("memcheck", "racecheck", "initcheck")
LIMIT = 150
"""Seconds of one tool on one operator."""

BOXES = [[0.5, 0.5, 3.2, 2.0], [-1e9, -7.0, 1e9, 3e4], [4.0, 5.0, 2.0, 3.0], [1.25, 0.5, 1.5, 0.75], [0.0, 0.0, 9, 9]]


def where(device: str) -> tuple:
    layout = PackedLayout.from_grids([(7, 5), (1, 1), (9, 12)], device=device)
    return layout, torch.tensor(BOXES, device=device), torch.tensor([0, 2, 2, 1, 0], device=device)


def run_roi_gather(device: str) -> None:
    for channels, ratio, dtype in ((40, 2, "float32"), (256, 2, "bfloat16"), (37, 0, "float32"), (8, 1, "float16")):
        place = where(device)
        tokens = torch.randn(place[0].num_tokens, channels, device=device, dtype=getattr(torch, dtype))
        roi_gather(tokens.requires_grad_(), *place, (3, 2), ratio).sum().backward()


def run_region_attention(device: str) -> None:
    cases = [(4, 64, "bfloat16", True)]
    cases += [(3, 72, "float16", False), (64, 32, "bfloat16", False), (1, 20, "float32", True)]
    for queries, size, dtype, coverage in cases:
        place = where(device)
        key = torch.randn(place[0].num_tokens, 2, size, device=device, dtype=getattr(torch, dtype), requires_grad=True)
        query = torch.randn(queries, 2, size, device=device, dtype=key.dtype, requires_grad=True)
        region_attention(query, key, key, *place, coverage=coverage).sum().backward()


def run_pack_patches(device: str) -> None:
    images = [torch.randint(0, 256, size, dtype=torch.uint8, device=device) for size in ((37, 91, 3), (32, 48, 3))]
    crops = [(0, 0.5, 1, 90.25, 36), (1, 0, 0, 48, 32), (0, 3, 2, 35, 34)]
    for patch, order, dtype in ((16, "hwc", "bfloat16"), (16, "chw", "float32"), (7, "hwc", "float16")):
        half = (0.5, 0.5, 0.5)
        grids = [(2, 3), (32 // patch, 48 // patch), (32 // patch, 32 // patch)]
        pack_patches(images, patch, half, half, crops, grids, getattr(torch, dtype), order)


RUNS = {"roi_gather": run_roi_gather, "region_attention": run_region_attention, "pack_patches": run_pack_patches}


def main() -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if not torch.cuda.is_available() or sanitizer is None:
        lacking = "compute-sanitizer" if torch.cuda.is_available() else "CUDA device"
        raise SystemExit(f"no {lacking}: nothing was checked")
    name = torch.cuda.get_device_name()
    path = RESULTS / f"{launch.slug(name)}-sanitizer.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    for tool in TOOLS:
        for operator in RUNS:
            passed = {(row["tool"], row["operator"]) for row in rows if row["commit"] == commit() and row["passed"]}
            if (tool, operator) in passed:
                continue
            start = time.perf_counter()
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, operator]
            # Each tensor an allocation of its own: a pool would hide what is read beyond one.
            environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            try:
                done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
                passed, told = done.returncode == 0, (done.stdout + done.stderr)[-2000:]
            except subprocess.TimeoutExpired:
                passed, told = False, f"not done after {LIMIT} s"
            row = {"tool": tool, "operator": operator, "passed": passed}
            row |= {"seconds": round(time.perf_counter() - start, 1)}
            row |= {"device": name, "torch": torch.__version__, "commit": commit(), "told": "" if passed else told}
            rows = [old for old in rows if (old["tool"], old["operator"]) != (tool, operator)] + [row]
            path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
            print(tool, operator, "passed" if passed else f"FAILED\n{told}", flush=True)
    if not all(row["passed"] for row in rows):
        raise SystemExit("compute-sanitizer found something")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        RUNS[sys.argv[1]](os.environ.get("GRANVIT_BENCH_DEVICE", "cuda"))
        print("done")
    else:
        main()
