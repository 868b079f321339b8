"""python bench/tune.py: searches launch configurations on the GPU at hand, and keeps the fastest of each kernel.

First every candidate is compiled, in processes side by side, and those that spill registers or want too much shared
memory are left out. Then each of the others is timed on workloads A and C, with gradients drawn at random. What beats
the default by 3 % goes to granvit_kernels/tuned/DEVICE.json, and a copy to DEVICE-tuned.json among the results, kernel
by kernel: --seconds (230 by default) may end the search early. A table that is there already is added to: remove it
where the kernels have changed. Run the GPU tests after it. A dry run
(GRANVIT_BENCH_DEVICE=cpu) compiles a few candidates for Hopper and times nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError, as_completed
from typing import Any, NamedTuple

import aot
import numpy as np
import torch
from gpu_clock import DeviceClock
from rows import DRY_RUN, gpu_file, gpu_name
from warm import attention, pool
from workloads import randn, regions

from granvit_kernels import launch, region_attention, region_pool, roi_gather

DTYPE = torch.bfloat16
WORKLOADS = ("A", "C")
ENOUGH = 0.97
"""A configuration's time over the default's from which it is kept."""
COMPILING = 0.5
"""Of the time, at most."""

FIELDS: dict[str, dict[str, tuple]] = {
    "roi_gather_forward": {"parts": (1, 2, 3), "block_c": (64, 128, 256)},
    "roi_gather_backward": {"parts": (1, 2, 3), "block_c": (64, 128, 256), "tile": (2, 4, 8)},
    "region_attention_forward": {"block_n": (16, 32, 64, 128), "warps": (1, 2, 4), "stages": (1, 2, 3)},
    "region_attention_backward_walk": {"block_n": (16, 32, 64), "warps": (1, 2, 4), "stages": (1, 2)},
    "region_pool_forward": {"block_c": (128, 256), "block_n": (16, 32, 64), "warps": (4, 8), "stages": (2, 3)},
    "region_pool_backward_logits": {"block_c": (64, 128), "warps": (4, 8), "stages": (1, 2), "registers": (128, 168)},
    "region_pool_backward_value": {"block_c": (64, 128, 256), "warps": (4, 8), "registers": (128, 168)},
    "region_attention_backward_tokens": {"block_t": (32, 64, 128), "block_m": (16, 32, 64), "warps": (4, 8)},
}


class Target(NamedTuple):
    """A kernel at one shape; its key in the table tells shapes apart in the same way."""

    kernel: str
    case: aot.Case

    @property
    def name(self) -> str:
        return f"{self.kernel} {' '.join(f'{name}={value}' for name, value in self.case.options)}"

    def candidates(self) -> list[dict[str, Any]]:
        fields = FIELDS[self.kernel]
        return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]


def targets() -> list[Target]:
    gathers = [aot.Case("roi_gather", "bfloat16", (("channels", n), ("sampling_ratio", 2))) for n in (768, 1152)]
    attentions = [attention("bfloat16", 1, 16, 72, True), attention("bfloat16", 4, 12, 64, False)]
    pools = [pool("bfloat16", 1, 16, 1152), pool("bfloat16", 4, 12, 768)]
    cases = {"roi_gather": gathers, "region_attention": attentions, "region_pool": pools}
    return [Target(kernel, case) for kernel in FIELDS for name in cases if name in kernel for case in cases[name]]


class Trial:
    """Stands in for granvit_kernels.launch.tuned: `fields` for `kernel`, the default for others; remembers the key."""

    def __init__(self, kernel: str, fields: dict[str, Any]) -> None:
        self.kernel, self.fields, self.key = kernel, fields, ""

    def __call__(self, kernel: str, key: tuple, default: Any, device: torch.device) -> Any:
        if kernel != self.kernel:
            return default
        self.key = launch.key_text(key)
        return dataclasses.replace(default, **self.fields)


# ---- which compile well ----


def why_not(target: Target, fields: dict[str, Any], architecture: int) -> str | None:
    """None where the candidate compiles within the chip's registers and shared memory, else the reason. Runs in a
    process of its own, and leaves the kernel in Triton's cache."""
    torch.set_num_threads(1)
    launch.tuned = Trial(target.kernel, fields)
    kernel_name = target.kernel.removeprefix(target.case.operator + "_")
    kernel_name = "pool" if target.kernel == "region_pool_forward" else kernel_name
    try:
        with aot.compile_only(architecture) as compiled:
            aot.launch(target.case)
        tried = [kernel for name, kernel, *_ in compiled if name.startswith(kernel_name)]
        if not tried:
            raise LookupError(f"no kernel is called {kernel_name}")
        for kernel in tried:
            spills = aot.resources(kernel.asm["ptx"], architecture)["spills"]
            if spills or kernel.metadata.shared > aot.SHARED_LIMIT.get(architecture, 99 * 1024):
                return f"{spills} bytes spilled, {kernel.metadata.shared} of shared memory"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


def compiling(wanted: list[tuple[Target, dict]], architecture: int, seconds: float) -> list[tuple[Target, dict]]:
    """Those of `wanted` that compile well and within the time."""
    good, bad = [], 0
    with aot.compilers(os.cpu_count()) as pool:
        jobs = {pool.submit(why_not, *pair, architecture): pair for pair in wanted}
        try:
            for job in as_completed(jobs, timeout=seconds):
                good += [jobs[job]] * (job.result() is None)
                bad += job.result() is not None
        except TimeoutError:
            pool.shutdown(wait=False, cancel_futures=True)
    print(f"= of {len(wanted)} candidates {len(good)} compile well, {bad} don't, "
          f"{len(wanted) - len(good) - bad} were not reached", flush=True)  # fmt: skip
    return good


# ---- which is fast ----


def call(target: Target, workload: str) -> Callable:
    """What launches the target's kernel on a workload, in its direction alone."""
    made, options = regions(workload, "cuda"), dict(target.case.options)
    place = made.layout, made.boxes, made.image_index
    if target.case.operator == "roi_gather":
        inputs = [randn(made.layout.num_tokens, options["channels"], dtype=DTYPE, device="cuda")]

        def forward() -> torch.Tensor:
            return roi_gather(*inputs, *place)
    elif target.case.operator == "region_pool":
        shapes = (options["queries"], options["heads"]), (1, options["size"])
        inputs = [
            randn(made.layout.num_tokens, *shape, dtype=DTYPE, device="cuda", seed=seed)
            for seed, shape in enumerate(shapes)
        ]

        def forward() -> torch.Tensor:
            return region_pool(*inputs, *place, coverage=True)
    else:
        lengths = (options["queries"], made.layout.num_tokens, made.layout.num_tokens)
        shape = options["heads"], options["size"]
        inputs = [randn(n, *shape, dtype=DTYPE, device="cuda", seed=seed) for seed, n in enumerate(lengths)]

        def forward() -> torch.Tensor:
            return region_attention(*inputs, *place, coverage=options["coverage"])

    if target.kernel.endswith("forward"):
        return forward
    inputs = [tensor.requires_grad_() for tensor in inputs]
    output = forward()
    gradient = randn(*output.shape, dtype=DTYPE, device="cuda", seed=9)
    return lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True)


def median(run: Callable, most: float = float("inf")) -> float:
    """Seconds from a cold L2; infinite where it failed. One call is enough where it takes far longer than `most`."""
    try:
        clock = DeviceClock(run)  # which has run it, too
        first = clock.seconds()
        return first if first > 1.5 * most else float(np.median([first, *(clock.seconds() for _ in range(4))]))
    except Exception as error:
        print(f"  {type(error).__name__}: {error}"[:160], flush=True)
        return float("inf")


def search(target: Target, candidates: list[dict], ends: float) -> tuple[str, dict | None, float]:
    """(key, fields, time over the default's) of the fastest of those that were timed before `ends`."""
    runs = [call(target, workload) for workload in WORKLOADS]
    launch.tuned = trial = Trial(target.kernel, {})
    usual = [median(run) for run in runs]
    fastest: tuple[float, dict | None] = (1.0, None)
    timed = 0
    for fields in candidates:
        if time.monotonic() > ends:
            break
        trial.fields, timed = fields, timed + 1
        costs = [median(run, before) / before for run, before in zip(runs, usual, strict=True)]
        fastest = min(fastest, (float(np.mean(costs)), fields), key=lambda pair: pair[0])
    told = ", ".join(f"{workload} {1e6 * before:.0f} us" for workload, before in zip(WORKLOADS, usual, strict=True))
    print(f"= {target.name}: {told}; best of {timed}: x {fastest[0]:.2f} {fastest[1] or 'the default'}", flush=True)
    return trial.key, fastest[1], fastest[0]


def keep(kernel: str, key: str, fields: dict[str, Any]) -> None:
    """Write a kernel's fastest fields into the table; what earlier searches wrote for other keys stays."""
    launch.TUNED.mkdir(exist_ok=True)
    path = launch.TUNED / f"{launch.slug(gpu_name())}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    table.setdefault(kernel, {})[key] = fields
    for copy in (path, gpu_file("tuned")):
        copy.write_text(json.dumps(table, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=230)
    seconds, began = parser.parse_args().seconds, time.monotonic()
    dry = gpu_name() == DRY_RUN
    if not dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing was tuned")
    major, minor = (9, 0) if dry else torch.cuda.get_device_capability()
    wanted = [(target, fields) for target in targets() for fields in target.candidates()]
    if dry:
        wanted = wanted[:: len(wanted) // 4]
    good = compiling(wanted, 10 * major + minor, COMPILING * seconds)
    if dry:
        return
    for target in targets():
        candidates = [fields for of, fields in good if of == target]
        key, fields, ratio = search(target, candidates, began + seconds)
        if fields is not None and ratio < ENOUGH:
            keep(target.kernel, key, fields)


if __name__ == "__main__":
    main()
