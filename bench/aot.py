"""python bench/aot.py: compiles every shipped Triton kernel for GPUs that are not here, and records what came out.

The launchers themselves run, on CPU tensors and with a driver that only names a GPU: what is compiled here is what is
compiled there, specialised in the same way. Registers, spills, shared memory and tensor-core instructions go to
bench/results/aot.json; tests/kernels/test_aot.py holds a choice of them to it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent / "results" / "aot.json"
ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory a block may have (CUDA C++ Programming Guide, table of technical specifications)."""


class Case(NamedTuple):
    """One call of an operator's launcher, both ways."""

    operator: str
    dtype: str
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return " ".join([self.operator, self.dtype, *(f"{name}={value}" for name, value in self.options)])


POOLED = ((1, 16, 1152), (4, 12, 768), (1, 1, 72))
"""(queries, heads, channels) of region_pool with a value that all heads share."""


def cases() -> list[Case]:
    """Everything that ships: the launchers' choices over the shapes that they tell apart."""
    every = [Case("roi_gather", "bfloat16", (("smallest", True),))]
    for dtype in ("float32", "bfloat16", "float16"):
        for channels in (64, 768, 1152):
            for ratio in (1, 2, 0):
                every.append(Case("roi_gather", dtype, (("channels", channels), ("sampling_ratio", ratio))))
    every.append(Case("region_attention", "bfloat16", (("smallest", True),)))
    for dtype in ("float32", "bfloat16", "float16"):
        for size in (32, 64, 72, 96, 128, 256):
            for queries in (4, 32, 64):
                every.append(Case("region_attention", dtype, (("queries", queries), ("size", size))))
    every.append(Case("region_pool", "bfloat16", (("smallest", True),)))
    for dtype in ("float32", "bfloat16", "float16"):
        for queries, heads, size in POOLED:
            every.append(Case("region_pool", dtype, (("queries", queries), ("heads", heads), ("size", size))))
        every.append(Case("region_pool", dtype, (("queries", 1), ("heads", 16), ("size", 72), ("own", True))))
    for option in ("coverage", "split"):
        every.append(Case("region_attention", "bfloat16", (("queries", 4), ("size", 64), (option, True))))
    return every


def choice() -> list[tuple[Case, int]]:
    """(case, architecture) for the ordinary test suite: each operator's main shape on all, the rest here and there."""
    by_name = {case.name: case for case in cases()}
    everywhere = ["roi_gather bfloat16 channels=768 sampling_ratio=2", "region_attention bfloat16 queries=4 size=64"]
    everywhere.append("region_pool bfloat16 queries=1 heads=16 size=1152")
    once = [
        ("roi_gather bfloat16 smallest=True", 90),
        ("roi_gather bfloat16 channels=768 sampling_ratio=0", 90),
        ("roi_gather float32 channels=1152 sampling_ratio=2", 80),
        ("region_attention bfloat16 smallest=True", 90),
        ("region_attention bfloat16 queries=4 size=72", 90),
        ("region_attention float16 queries=64 size=128", 80),
        ("region_attention float32 queries=4 size=64", 90),
        ("region_attention bfloat16 queries=4 size=64 split=True", 90),
        ("region_pool bfloat16 smallest=True", 90),
        ("region_pool float16 queries=4 heads=12 size=768", 80),
        ("region_pool float32 queries=1 heads=16 size=1152", 90),
        ("region_pool bfloat16 queries=1 heads=16 size=72 own=True", 80),
    ]
    return [(by_name[name], arch) for name in everywhere for arch in ARCHITECTURES] + [
        (by_name[name], arch) for name, arch in once
    ]


def fault(row: dict[str, Any]) -> str | None:
    """What is wrong with a kernel, or None."""
    if row["spills"]:
        return f"it spills {row['spills']} bytes of registers"
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        return f"it wants {row['shared']} bytes of shared memory; a block has {SHARED_LIMIT[row['arch']]}"
    if row["registers"] > 255:
        return f"it wants {row['registers']} registers; a thread has 255"
    return None


# ---- one case, in a process of its own ----


class _Driver:
    """Names a GPU of one architecture, and nothing else: enough for Triton to compile."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.architecture, self.target = architecture, GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


class Launch(NamedTuple):
    """A launch that was compiled and not run: its function's name, what triton.compile gave, the grid, and the
    arguments by name."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


@contextmanager
def caught(architecture: int, take: Callable[[Any, tuple[int, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Every launch inside goes to take(kernel, grid, arguments and options by name) and is not run."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def catch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        take(self, grid, dict(zip(self.arg_names, args, strict=False)) | options)

    driver.set_active(_Driver(architecture))  # for good: this process has no other use for one
    JITFunction.run = catch
    try:
        yield
    finally:
        JITFunction.run = run


@contextmanager
def compile_only(architecture: int) -> Iterator[list[Launch]]:
    """Every launch inside is compiled and not run: the list of them, in their order."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run

    def take(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        compiled = run(kernel, grid=grid, warmup=True, **arguments)
        launches.append(Launch(kernel.fn.__name__, compiled, grid, arguments))

    with caught(architecture, take):
        yield launches


@contextmanager
def count_only(architecture: int) -> Iterator[dict[str, set[str]]]:
    """Launches inside are neither compiled nor run: {kernel's name: the keys under which Triton would look for compiled
    ones}, worked out by Triton itself from the arguments."""
    keys: dict[str, set[str]] = {}

    def take(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        *_, bind = kernel.device_caches[architecture]
        _, specialization, options = bind(**arguments)
        keys.setdefault(kernel.fn.__name__, set()).add(f"{specialization} {options}")

    with caught(architecture, take):
        yield keys


def launch(case: Case) -> None:
    """Both directions of a case's launcher on CPU tensors; their values mean nothing."""
    import torch

    from granvit_kernels import PackedLayout

    options = dict(case.options)
    images, side, regions = (1, 1, 1) if options.get("smallest") else (16, 32, 96)  # Triton makes constants of ones
    layout = PackedLayout.from_grids([(side, side)] * images)
    boxes, image_index = torch.zeros(regions, 4), torch.arange(regions) % images
    if options.get("split"):  # fewer regions than fill a chip
        boxes, image_index = boxes[:1], image_index[:1]
    for direction in directions(case, layout, boxes, image_index).values():
        direction()


def directions(case: Case, layout: Any, boxes: Any, image_index: Any) -> dict[str, Callable[[], Any]]:
    """{"forward", "backward": a call of the case's launcher} on these regions and tensors of theirs whose values mean
    nothing, all where `boxes` is: on the meta device, sizes cost nothing."""
    import torch

    dtype, options = getattr(torch, case.dtype), dict(case.options)
    small, wide = options.get("smallest", False), torch.float32
    place = (layout.grids, layout.cu_seqlens, boxes, image_index)

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=boxes.device)

    if case.operator == "roi_gather":
        from granvit_kernels.ops.roi_gather import triton_launch as triton

        bins, channels = 1 if small else options.get("bins", 7), options.get("channels", 1)
        ratio = options.get("sampling_ratio", 2)
        tokens, grad = zeros(layout.num_tokens, channels), zeros(len(boxes), bins, bins, channels)
        return {
            "forward": lambda: triton.forward(tokens, *place, bins, bins, ratio),
            "backward": lambda: triton.backward(grad, *place, layout.num_tokens, ratio),
        }
    heads, size = (1, 1) if small else (options.get("heads", 12), options["size"])
    if case.operator == "region_pool":
        from granvit_kernels.ops.region_pool import triton_launch

        logits = zeros(layout.num_tokens, options.get("queries", 1), heads)
        value = zeros(layout.num_tokens, heads if options.get("own") else 1, size)
        output, lse = zeros(len(boxes), *logits.shape[1:], size), zeros(len(boxes), *logits.shape[1:], dtype=wide)
        coverage = options.get("coverage", True)
        return {
            "forward": lambda: triton_launch.forward(logits, value, *place, coverage),
            "backward": lambda: triton_launch.backward(output, lse, logits, value, output, lse, *place, coverage),
        }
    from granvit_kernels.ops.region_attention import triton_launch

    query = zeros(options.get("queries", 1), heads, size)
    key, value = zeros(layout.num_tokens, heads, size), zeros(layout.num_tokens, heads, size)
    output, lse = zeros(len(boxes), *query.shape), zeros(len(boxes), *query.shape[:2], dtype=wide)
    rest = (0.125, options.get("coverage", False))
    return {
        "forward": lambda: triton_launch.forward(query, key, value, *place, *rest),
        "backward": lambda: triton_launch.backward(output, lse, query, key, value, output, lse, *place, *rest),
    }


def compile_case(case: Case, architecture: int) -> list[dict[str, Any]]:
    """A row a kernel: registers, spills (bytes stored + loaded), shared memory (bytes), tensor-core instructions."""
    import torch

    torch.set_num_threads(1)
    with compile_only(architecture) as launches:
        launch(case)
    rows = []
    for name, kernel, *_ in launches:
        rows.append(
            {
                "case": "tiles" if name == "_tile_tokens" else case.name,  # shared by all
                "kernel": name,
                "arch": architecture,
                **resources(kernel.asm["ptx"], architecture),
                "shared": kernel.metadata.shared,
                "warps": kernel.metadata.num_warps,
                **instructions(kernel.asm["cubin"]),
            }
        )
    return rows


def resources(ptx: str, architecture: int) -> dict[str, int]:
    """Registers a thread and bytes spilled, as ptxas reports them."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={sm_arch_from_capability(architecture)}"]
        command += [file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", report))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))
    return {"registers": registers, "spills": spills}


def instructions(cubin: bytes) -> dict[str, int]:
    """Tensor-core instructions in the machine code: HGMMA (Hopper's), HMMA (any), and Blackwell's UTC...MMA."""
    from triton import knobs

    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    patterns = {"hgmma": "HGMMA", "hmma": "HMMA", "tcgen05": r"UTC\w*MMA"}
    return {name: len(re.findall(rf"\b{pattern}", listing)) for name, pattern in patterns.items()}


def compile_all(jobs: list[tuple[Case, int]], report: Callable[[list[dict]], None]) -> None:
    """Compiles in processes without the interpreter, one a core."""
    with compilers(os.cpu_count()) as pool:
        for rows in pool.map(compile_case, *zip(*jobs, strict=True)):
            report(rows)


@contextmanager
def compilers(processes: int | None) -> Iterator[ProcessPoolExecutor]:
    """Processes that compile, whatever this one has: Triton decides on its interpreter when it is imported."""
    environment = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            yield pool
    finally:
        if environment is not None:
            os.environ["TRITON_INTERPRET"] = environment


def key(row: dict[str, Any]) -> tuple:
    return row["case"], row["kernel"], row["arch"]


def main() -> None:
    import triton
    from rich.progress import Progress

    rows: dict[tuple, dict] = {}
    jobs = [(case, architecture) for case in cases() for architecture in ARCHITECTURES]
    with Progress() as progress:
        task = progress.add_task("compiling", total=len(jobs))

        def report(new: list[dict]) -> None:
            for row in new:
                worst = rows.setdefault(key(row), row)  # the kernel that all share comes in several forms
                if row["registers"] > worst["registers"]:
                    rows[key(row)] = row
            progress.advance(task)

        compile_all(jobs, report)
    lines = ",\n".join(json.dumps(rows[name]) for name in sorted(rows))
    RESULTS.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n')
    faults = [f"{' '.join(map(str, name))}: {fault(row)}" for name, row in rows.items() if fault(row)]
    raise SystemExit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
