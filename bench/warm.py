"""python bench/warm.py: compiles the Triton kernels that the measurements launch, in processes side by side.

Triton keeps what it compiled on disk, and the steps that follow find it there: none waits for a compiler, kernel by
kernel. The launchers run as in bench/aot.py, on CPU tensors and for the GPU at hand, which isn't used. A dry run
compiles for Hopper.
"""

from __future__ import annotations

import dataclasses
import os
import time
from concurrent.futures import as_completed

import aot
import sanitize
import torch
from rows import DRY_RUN, gpu_name


def cases() -> list[aot.Case]:
    """The shapes that the steps after this one launch; first what takes longest."""
    cases = []
    for dtype in ("bfloat16", "float32"):
        for queries, heads, size, coverage in ((4, 12, 64, False), (1, 16, 72, True)):
            cases.append(attention(dtype, queries, heads, size, coverage))
    cases += [attention("bfloat16", queries, 12, 64, False) for queries in (1, 16)]
    cases += [attention("bfloat16", 1, 12, 64, True)]  # the training step's base shape
    cases += [attention("bfloat16", 4, 12, 64, False, split=True)]
    cases += [attention(dtype, queries, sanitize.HEADS, size, coverage)
              for queries, size, dtype, coverage in sanitize.ATTENTIONS]  # fmt: skip
    cases += [pool("bfloat16", *shape) for shape in ((1, 16, 1152), (4, 12, 768), (1, 12, 768))]
    cases += [pool("float32", *shape) for shape in ((1, 16, 1152), (4, 12, 768))]
    cases += [pool(dtype, queries, heads, size, own=values > 1)
              for queries, heads, values, size, dtype in sanitize.POOLS]  # fmt: skip
    gathers = (
        (768, 2, "bfloat16"), (1152, 2, "bfloat16"), (768, 0, "bfloat16"), (768, 2, "float32"), *sanitize.GATHERS
    )  # fmt: skip
    for channels, ratio, dtype in gathers:
        cases.append(aot.Case("roi_gather", dtype, (("channels", channels), ("sampling_ratio", ratio))))
    return cases


def attention(dtype: str, queries: int, heads: int, size: int, coverage: bool, **more: bool) -> aot.Case:
    options = {"queries": queries, "heads": heads, "size": size, "coverage": coverage, **more}
    return aot.Case("region_attention", dtype, tuple(options.items()))


def pool(dtype: str, queries: int, heads: int, size: int, own: bool = False) -> aot.Case:
    """own: each head has values of its own."""
    options = {"queries": queries, "heads": heads, "size": size, "own": own}
    return aot.Case("region_pool", dtype, tuple(options.items()))


def compile_case(case: aot.Case, architecture: int, device: str) -> int:
    """The kernels of a case. device: the slug of its name, as in granvit_kernels/tuned/."""
    from granvit_kernels import launch

    def tuned(kernel, key, default, _):
        return dataclasses.replace(default, **launch._table(device).get(kernel, {}).get(launch.key_text(key), {}))

    torch.set_num_threads(1)
    launch.tuned = tuned
    with aot.compile_only(architecture) as compiled:
        aot.launch(case)
    return len(compiled)


def main() -> None:
    from granvit_kernels.launch import slug

    name, began = gpu_name(), time.perf_counter()
    major, minor = (9, 0) if name == DRY_RUN else torch.cuda.get_device_capability()
    processes = min(os.cpu_count() or 1, len(cases()))
    kernels = 0
    with aot.compilers(processes) as pool:
        jobs = {pool.submit(compile_case, case, 10 * major + minor, slug(name)): case for case in cases()}
        for job in as_completed(jobs):
            kernels += job.result()
            print(f"{jobs[job].name}: {job.result()} kernels", flush=True)
    print(f"= {kernels} kernels of {len(jobs)} cases for sm_{major}{minor} in {time.perf_counter() - began:.0f} s "
          f"by {processes} processes")  # fmt: skip


if __name__ == "__main__":
    main()
