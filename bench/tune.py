"""python bench/tune.py: searches launch configurations on the GPU at hand, and keeps the fastest of each kernel.

Workloads A and C, bfloat16, the main shapes; granvit_kernels/tuned/DEVICE.json gets what beats the default. Run
`make gpu-test` after it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import torch
from workloads import randn, regions

from granvit_kernels import launch, region_attention, roi_gather

DTYPE = torch.bfloat16
WIDTHS = (768, 1152)

CANDIDATES: dict[str, dict[str, tuple]] = {
    "roi_gather_forward": {"block_c": (128, 256, 512, 1024), "warps": (1, 2, 4)},
    "roi_gather_backward": {"block_c": (128, 256, 512), "tile": (1, 2, 4, 8), "warps": (1, 2)},
    "region_attention_forward": {"block_n": (16, 32, 64, 128), "warps": (1, 2, 4), "stages": (1, 2, 3, 4)},
    "region_attention_backward_walk": {"block_n": (16, 32, 64, 128), "warps": (1, 2, 4), "stages": (1, 2, 3)},
    "region_attention_backward_tokens": {"block_t": (32, 64, 128), "block_m": (16, 32, 64), "warps": (4, 8)},
}


def calls(workload: str, channels: int) -> list:
    """Functions of nothing that run every kernel once."""
    made = regions(workload, "cuda")
    place = made.layout, made.boxes, made.image_index
    tokens = randn(made.layout.num_tokens, channels, dtype=DTYPE, device="cuda").requires_grad_()
    query = randn(4, channels // 64, 64, dtype=DTYPE, device="cuda").requires_grad_()

    def gather() -> None:
        roi_gather(tokens, *place).sum().backward()

    def attend() -> None:
        key = tokens.unflatten(1, (-1, 64))
        region_attention(query, key, key, *place).sum().backward()

    return [gather, attend]


def cost(runs: list) -> float:
    """Seconds of all together; a configuration that does not compile costs too much."""
    from test_gpu import seconds  # a test module: skipped where there is no GPU

    try:
        for run in runs:
            run()
        return sum(float(np.median([seconds(run) for _ in range(7)])) for run in runs)
    except Exception:
        return float("inf")


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing was tuned")
    trial: dict[str, dict[str, Any]] = {}  # {kernel: fields to try}
    asked: dict[tuple[str, tuple], Any] = {}  # {(kernel, key): the default}

    def tuned(kernel: str, key: tuple, default: Any, device: torch.device) -> Any:
        asked[kernel, key] = default
        return dataclasses.replace(default, **trial.get(kernel, {}))

    launch.tuned = tuned

    best: dict[str, dict[str, dict]] = {}
    runs = {width: [run for workload in ("A", "C") for run in calls(workload, width)] for width in WIDTHS}
    for kernel, fields in CANDIDATES.items():
        gather = "roi_gather" in kernel
        # region_attention's keys don't tell numbers of heads apart: one choice for all widths.
        for widths in [(width,) for width in WIDTHS] if gather else [WIDTHS]:
            mine = [run for width in widths for run in runs[width] if (run.__name__ == "gather") == gather]
            trial.clear()
            asked.clear()
            usual = cost(mine)
            keys = [key for name, key in asked if name == kernel]
            found: tuple[float, dict | None] = (usual, None)
            for values in itertools.product(*fields.values()):
                trial[kernel] = dict(zip(fields, values, strict=True))
                found = min(found, (cost(mine), trial[kernel]), key=lambda pair: pair[0])
            trial.clear()
            print(kernel, *widths, f"{1e6 * usual:.0f} -> {1e6 * found[0]:.0f} us", found[1], flush=True)
            if found[1] is not None and found[0] < 0.97 * usual:
                for key in keys:
                    best.setdefault(kernel, {})[launch.key_text(key)] = found[1]
    launch.TUNED.mkdir(exist_ok=True)
    path = launch.TUNED / f"{launch.slug(torch.cuda.get_device_name())}.json"
    path.write_text(json.dumps(best, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
