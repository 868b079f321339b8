"""python bench/sanitize.py: compute-sanitizer over small shapes of every operator, several processes side by side.

Rows go to DEVICE-sanitizer.json as they come; what this commit has passed is not run again. Fails where a tool finds
something. A dry run (GRANVIT_BENCH_DEVICE=cpu) runs what would be watched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
from rows import Rows, gpu_file, gpu_name, provenance

from granvit_kernels import PackedLayout, pack_patches, region_attention, region_pool, roi_gather

OPERATORS = ("region_attention", "region_pool", "roi_gather", "pack_patches")
CHECKS = {
    # Addresses: every kernel reads through offsets that boxes and layouts make.
    "memcheck": OPERATORS,
    # Memory that nothing wrote: kernels hand each other workspaces (tiles, partial sums, a table of crops).
    "initcheck": OPERATORS,
    # Shared memory without a barrier: roi_gather's programs are one warp and hold none; its tiles are attention's, too.
    "racecheck": ("region_attention", "region_pool", "pack_patches"),
    # Barriers that not all threads reach: only pack_patches writes its own, the others' are Triton's.
    "synccheck": ("pack_patches",),
}
"""What each tool can find here, and where."""
NOTHING = "nothing"
"""The tool of a dry run."""
GATHERS = ((40, 2, "float32"), (256, 2, "bfloat16"), (37, 0, "float32"), (8, 1, "float16"))
"""(channels, sampling_ratio, dtype) of roi_gather."""
ATTENTIONS = (
    (4, 64, "bfloat16", True), (3, 72, "float16", False), (64, 32, "bfloat16", False), (1, 20, "float32", True)
)  # fmt: skip
"""(queries, size of a head, dtype, coverage) of region_attention."""
POOLS = ((1, 16, 1, 144, "bfloat16"), (4, 12, 1, 40, "float16"), (2, 3, 3, 24, "bfloat16"), (1, 1, 1, 20, "float32"))
"""(queries, heads, heads of the value, channels, dtype) of region_pool."""
HEADS = 2
LIMIT = 80
"""Seconds of one tool on one operator."""

BOXES = [[0.5, 0.5, 3.2, 2.0], [-1e9, -7.0, 1e9, 3e4], [4.0, 5.0, 2.0, 3.0], [1.25, 0.5, 1.5, 0.75], [0.0, 0.0, 9, 9]]


def where(device: str) -> tuple:
    layout = PackedLayout.from_grids([(7, 5), (1, 1), (9, 12)], device=device)
    return layout, torch.tensor(BOXES, device=device), torch.tensor([0, 2, 2, 1, 0], device=device)


def run_roi_gather(device: str) -> None:
    for channels, ratio, dtype in GATHERS:
        place = where(device)
        tokens = torch.randn(place[0].num_tokens, channels, device=device, dtype=getattr(torch, dtype))
        roi_gather(tokens.requires_grad_(), *place, (3, 2), ratio).sum().backward()


def run_region_attention(device: str) -> None:
    for queries, size, dtype, coverage in ATTENTIONS:
        place = where(device)
        made = {"device": device, "dtype": getattr(torch, dtype), "requires_grad": True}
        key, query = (torch.randn(length, HEADS, size, **made) for length in (place[0].num_tokens, queries))
        region_attention(query, key, key, *place, coverage=coverage).sum().backward()


def run_region_pool(device: str) -> None:
    for queries, heads, values, size, dtype in POOLS:
        place = where(device)
        made = {"device": device, "dtype": getattr(torch, dtype), "requires_grad": True}
        shapes = (queries, heads), (values, size)
        logits, value = (torch.randn(place[0].num_tokens, *shape, **made) for shape in shapes)
        region_pool(logits, value, *place, coverage=True).sum().backward()


PACKINGS = (
    (16, "hwc", "bfloat16", {}),
    (16, "chw", "float32", {"resample": "bicubic"}),
    (7, "hwc", "float16", {"resample": "bicubic", "round": "pil"}),
    (16, "chw", "bfloat16", {"round": "pil13"}),
)


def run_pack_patches(device: str) -> None:
    images = [torch.randint(0, 256, size, dtype=torch.uint8, device=device) for size in ((37, 91, 3), (32, 48, 3))]
    crops = [(0, 0.5, 1, 90.25, 36), (1, 0, 0, 48, 32), (0, 3, 2, 35, 34), (1, 1, 0, 17, 32)]
    for patch, order, dtype, options in PACKINGS:
        half = (0.5, 0.5, 0.5)
        grids = [(2, 3), (32 // patch, 48 // patch), (32 // patch, 32 // patch), (1, 1)]
        pack_patches(images, patch, half, half, crops, grids, getattr(torch, dtype), order, **options)


RUNS = {
    "roi_gather": run_roi_gather, "region_attention": run_region_attention, "region_pool": run_region_pool,
    "pack_patches": run_pack_patches,
}  # fmt: skip


def command(tool: str, operator: str) -> list[str]:
    """tool: NOTHING runs the program alone."""
    watched = [sys.executable, __file__, operator]
    if tool == NOTHING:
        return watched
    # Calls of CUDA that return an error are PyTorch's to handle; what memcheck is for is addresses.
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return ["compute-sanitizer", "--tool", tool, *quiet, "--error-exitcode", "9", *watched]


def check(tool: str, operator: str) -> dict:
    """A row. Runs in a process of its own."""
    began = time.perf_counter()
    # Each tensor an allocation of its own: a pool would hide what is read beyond one.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command(tool, operator), env=environment, capture_output=True, text=True, timeout=LIMIT)
        passed, told = done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    except subprocess.TimeoutExpired:
        passed, told = False, f"not done after {LIMIT} s"
    seconds = round(time.perf_counter() - began, 1)
    return {"tool": tool, "operator": operator, "passed": passed, "seconds": seconds, "told": "" if passed else told}


def main() -> None:
    dry = os.environ.get("GRANVIT_BENCH_DEVICE") == "cpu"
    if not dry and (not torch.cuda.is_available() or shutil.which("compute-sanitizer") is None):
        lacking = "compute-sanitizer" if torch.cuda.is_available() else "CUDA device"
        raise SystemExit(f"no {lacking}: nothing was checked")
    rows, about = Rows(gpu_file("sanitizer"), ("tool", "operator")), provenance(gpu_name())
    tools = {NOTHING: OPERATORS} if dry else CHECKS
    checks = [(tool, operator) for tool, operators in tools.items() for operator in operators]
    todo = [pair for pair in checks if not rows.has(tool=pair[0], operator=pair[1], passed=True)]
    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in as_completed([pool.submit(check, *pair) for pair in todo]):
            row = done.result()
            rows.save({**row, **about})
            failed += not row["passed"]
            verdict = "passed" if row["passed"] else f"FAILED\n{row['told']}"
            print(f"{row['tool']} {row['operator']}: {verdict} ({row['seconds']} s)", flush=True)
    print(f"= {len(checks) - failed} of {len(checks)} without a finding: {', '.join(tools)} of {', '.join(OPERATORS)}")
    if failed:
        raise SystemExit("compute-sanitizer found something, or a program failed")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        for name in sys.argv[1:]:
            RUNS[name](os.environ.get("GRANVIT_BENCH_DEVICE", "cuda"))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print("done")
    else:
        main()
