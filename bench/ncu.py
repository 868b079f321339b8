"""python bench/ncu.py: the main kernels of workload A under Nsight Compute, a row each in DEVICE-ncu.json.

`python bench/ncu.py OPERATOR` is what ncu watches: a call that compiles, then the one that is profiled. ncu runs each
kernel several times, from a cold L2, and leaves the clocks as they are. A dry run (GRANVIT_BENCH_DEVICE=cpu) makes
those calls at a tiny size, without ncu.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
from rows import Rows, gpu_file, gpu_name, provenance
from workloads import pictures, randn, regions

from granvit_kernels import pack_patches, region_attention, region_pool, roi_gather

METRICS = {
    "seconds": ("gpu__time_duration.sum", 1e-9),
    "dram_share": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 0.01),
    "dram_bytes_read": ("dram__bytes_read.sum", 1),
    "dram_bytes_written": ("dram__bytes_write.sum", 1),
    "instructions": ("smsp__inst_executed.sum", 1),
    "issue_active": ("smsp__issue_active.avg.per_cycle_active", 1),
    "occupancy": ("sm__warps_active.avg.pct_of_peak_sustained_active", 0.01),
    "registers": ("launch__registers_per_thread", 1),
}
"""{a row's figure: (ncu's metric in base units, the factor to ours)}. issue_active: the share of cycles in which a
scheduler issued; occupancy: warps of those that fit."""
REFUSALS = ("ERR_NVGPUCTRPERM", "Failed to initialize the profiler")
"""What ncu says where it may not read counters, or can't: then it can't for the next operator either."""
LIMIT = 45
"""Seconds of an operator."""

DRY = os.environ.get("GRANVIT_BENCH_DEVICE") == "cpu"
DEVICE = "cpu" if DRY else "cuda"
DTYPE = torch.bfloat16


def gather() -> Callable:
    made = regions("A", DEVICE, *((2, 2) if DRY else ()))
    tokens = randn(made.layout.num_tokens, 768, dtype=DTYPE, device=DEVICE).requires_grad_()

    def run() -> None:
        output = roi_gather(tokens, made.layout, made.boxes, made.image_index)
        torch.autograd.grad(output, tokens, output.detach())

    return run


def attend() -> Callable:
    """As the model: one query, 16 heads of 72, coverage."""
    made = regions("A", DEVICE, *((2, 2) if DRY else ()))
    tensors = [
        randn(length, 16, 72, dtype=DTYPE, device=DEVICE, seed=seed).requires_grad_()
        for seed, length in enumerate((1, made.layout.num_tokens, made.layout.num_tokens))
    ]

    def run() -> None:
        output = region_attention(*tensors, made.layout, made.boxes, made.image_index, coverage=True)
        torch.autograd.grad(output, tensors, output.detach())

    return run


def pool() -> Callable:
    """As the model's region prompt: 16 rows of logits, features of 1152 channels, coverage."""
    made = regions("A", DEVICE, *((2, 2) if DRY else ()))
    tensors = [
        randn(made.layout.num_tokens, *shape, dtype=DTYPE, device=DEVICE, seed=seed).requires_grad_()
        for seed, shape in enumerate(((1, 16), (1, 1152)))
    ]

    def run() -> None:
        output = region_pool(*tensors, made.layout, made.boxes, made.image_index, coverage=True)
        torch.autograd.grad(output, tensors, output.detach())

    return run


def pack() -> Callable:
    made = pictures("A", False, DEVICE, *((2, 16) if DRY else ()))
    half = (0.5, 0.5, 0.5)
    return lambda: pack_patches(made.images, 16, half, half, grids=made.grids, dtype=DTYPE)


OPERATORS = {"roi_gather": gather, "region_attention": attend, "region_pool": pool, "pack_patches": pack}
SHAPES = {
    "roi_gather": "768 channels", "region_attention": "16 x 72, K = 1, coverage",
    "region_pool": "16 rows, 1152 channels, coverage", "pack_patches": "patches of 16",
}  # fmt: skip
"""Of those calls, as bench/results/floors.json has them."""


def watched(operator: str) -> None:
    run = OPERATORS[operator]()
    run()
    if DRY:
        return run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def command(operator: str) -> list[str]:
    program = [sys.executable, __file__, operator]
    names = ",".join(metric for metric, _ in METRICS.values())
    return program if DRY else [
        "ncu", "--clock-control", "none", "--profile-from-start", "off", "--metrics", names,
        "--csv", "--page", "raw", "--print-units", "base", *program,
    ]  # fmt: skip


def parse(output: str) -> Iterator[dict]:
    """The kernels in what ncu printed: a line of names, one of units, then one a kernel, maybe more that are none.
    PyTorch's own are left out."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    for line in list(csv.DictReader(lines[start:]))[1:]:
        whole = line.get("Kernel Name")
        if not whole or "at::" in whole:
            continue
        values = {name: line.get(metric) or "nan" for name, (metric, _) in METRICS.items()}
        figures = {name: float(values[name].replace(",", "")) * factor for name, (_, factor) in METRICS.items()}
        yield {"kernel": function_name(whole), "grid": line["Grid Size"], **figures}


def function_name(signature: str) -> str:
    """Of a kernel as ncu tells it: "void granvit::<unnamed>::copy_kernel<float>(Job)" -> "copy_kernel"."""
    plain = re.sub(r"<unnamed>::|\(anonymous namespace\)::|^void ", "", signature)
    return re.split(r"[<( ]", plain, maxsplit=1)[0].rpartition("::")[2]


def run_command(command: list[str]) -> tuple[int | None, str]:
    """(exit status, None where it was ended; what it printed)."""
    try:
        limit = None if DRY else LIMIT
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit)
        return done.returncode, done.stdout
    except subprocess.TimeoutExpired:
        return None, f"not done after {LIMIT} s"


def main() -> None:
    if not DRY and shutil.which("ncu") is None:
        raise SystemExit("no ncu on PATH: nothing was profiled")
    rows, about = Rows(gpu_file("ncu"), ("operator", "kernel")), provenance(gpu_name())
    failed = []
    for operator in OPERATORS:
        if rows.has(operator=operator):
            print(f"{operator}: profiled at this commit")
            continue
        status, output = run_command(command(operator))
        if DRY and status == 0:
            print(f"= {operator}: its calls ran, without ncu")
            continue
        if refused := next((line for line in output.splitlines() if any(word in line for word in REFUSALS)), None):
            raise SystemExit(f"ncu can't read this GPU's counters here: {refused}")
        profiled = list(parse(output))
        for row in profiled:
            rows.save({"operator": operator, **row, **about})
            print("= {} {kernel}: {:.0f} us, DRAM {dram_share:.0%}, issue slots {issue_active:.0%}, "
                  "{registers:.0f} registers, occupancy {occupancy:.0%}".format(
                      operator, 1e6 * row["seconds"], **row), flush=True)  # fmt: skip
        if not profiled:
            failed.append(operator)
            print(f"{operator}: ncu gave no kernel\n{output[-1500:]}", flush=True)
    if failed:
        raise SystemExit(f"nothing was profiled of {', '.join(failed)}")


if __name__ == "__main__":
    watched(sys.argv[1]) if len(sys.argv) > 1 else main()
