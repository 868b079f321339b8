"""python bench/accuracy.py: every operator, both ways, against float64 from the same inputs, in seconds.

The rule: at most twice the error of plain PyTorch in the same dtype, plus one eps(dtype) of the largest value. Rows go
to DEVICE-accuracy.json with the error as a share of what the rule allows. Fails where one is over 1, or where no kernel
ran.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from rows import DRY_RUN, Rows, gpu_file, gpu_name, provenance
from torch import Tensor
from workloads import make_regions

from granvit_kernels import backends, ops, pack_patches, region_attention, region_pool, roi_gather

GRIDS = [(24, 17), (1, 1), (9, 32), (20, 20)]
BOXES = 12
"""An image."""


def draw(*shape: int, seed: int) -> Tensor:
    """Unit-normal numbers that every dtype holds."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def gather(channels: int) -> Callable:
    def run(device: str, dtype: torch.dtype) -> dict[str, list[Tensor]]:
        made = make_regions(GRIDS, BOXES, device)
        tokens = draw(made.layout.num_tokens, channels, seed=0).to(device, dtype).requires_grad_()
        output = roi_gather(tokens, made.layout, made.boxes, made.image_index)
        gradient = torch.autograd.grad(output, tokens, draw(*output.shape, seed=1).to(device, dtype))
        return {"forward": [output.detach()], "backward": list(gradient)}

    return run


def attend(queries: int, heads: int, size: int, coverage: bool) -> Callable:
    def run(device: str, dtype: torch.dtype) -> dict[str, list[Tensor]]:
        made = make_regions(GRIDS, BOXES, device)
        lengths = (queries, made.layout.num_tokens, made.layout.num_tokens)
        drawn = [draw(length, heads, size, seed=seed) for seed, length in enumerate(lengths)]
        tensors = [tensor.to(device, dtype).requires_grad_() for tensor in drawn]
        output = region_attention(*tensors, made.layout, made.boxes, made.image_index, coverage=coverage)
        gradients = torch.autograd.grad(output, tensors, draw(*output.shape, seed=3).to(device, dtype))
        return {"forward": [output.detach()], "backward": list(gradients)}

    return run


def pool(queries: int, heads: int, size: int) -> Callable:
    """Logits of queries and heads, and one value for all, with coverage."""

    def run(device: str, dtype: torch.dtype) -> dict[str, list[Tensor]]:
        made = make_regions(GRIDS, BOXES, device)
        shapes = (queries, heads), (1, size)
        drawn = [draw(made.layout.num_tokens, *shape, seed=seed) for seed, shape in enumerate(shapes)]
        tensors = [tensor.to(device, dtype).requires_grad_() for tensor in drawn]
        output = region_pool(*tensors, made.layout, made.boxes, made.image_index, coverage=True)
        gradients = torch.autograd.grad(output, tensors, draw(*output.shape, seed=3).to(device, dtype))
        return {"forward": [output.detach()], "backward": list(gradients)}

    return run


def pack(device: str, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(4)
    sizes = [(h * 16, w * 16, 3) for h, w in GRIDS]
    images = [torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).to(device) for size in sizes]
    half = (0.5, 0.5, 0.5)
    resized = [(max(h * 2 // 3, 1), max(w - 1, 1)) for h, w in GRIDS]

    def patches(**options) -> list[Tensor]:
        return [pack_patches(images, 16, half, half, dtype=dtype, **options)[0]]

    return {
        "as it is": patches(),
        "resized": patches(grids=resized),
        "bicubic": patches(grids=resized, resample="bicubic"),
        "bicubic, rounded": patches(grids=resized, resample="bicubic", round="pil"),
    }


CASES: list[tuple[str, str, Callable]] = [
    ("roi_gather", "768 channels", gather(768)),
    ("region_attention", "12 x 64, 4 queries", attend(4, 12, 64, False)),
    ("region_attention", "16 x 72, 1 query, coverage", attend(1, 16, 72, True)),
    ("region_pool", "16 rows, 1152 channels, coverage", pool(1, 16, 1152)),
    ("region_pool", "48 rows, 768 channels, coverage", pool(4, 12, 768)),
    ("pack_patches", "patches of 16", pack),
]


def plain(operator: str, run: Callable, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """As plain PyTorch computes it on the CPU."""
    before = os.environ.get(backends.VARIABLE)
    os.environ[backends.VARIABLE] = f"{operator}=reference"
    try:
        return run("cpu", dtype)
    finally:
        os.environ.pop(backends.VARIABLE)
        if before is not None:
            os.environ[backends.VARIABLE] = before


def share_of_allowed(ours: Tensor, usual: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """The largest error over what the rule allows; infinite where a value is not finite."""
    ours, usual = ours.cpu().double(), usual.double()
    if ours.shape != exact.shape or not ours.isfinite().all():
        return float("inf")
    allowed = 2 * (usual - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    return float((ours - exact).abs().max() / allowed)


def backend(operator: str, device: str, dtype: torch.dtype) -> str:
    packages = {"pack_patches": ops.patch_packing}
    candidates = packages.get(operator, getattr(ops, operator, None)).CANDIDATES
    chosen = backends.choose(operator, candidates[operator], device=torch.device(device), dtype=dtype)
    return next(name for name, module in candidates[operator].items() if module is chosen)


def main() -> None:
    name = gpu_name()
    device = "cpu" if name == DRY_RUN else "cuda"
    rows, about = Rows(gpu_file("accuracy"), ("operator", "case", "mode", "dtype")), provenance(name)
    worst, stand_ins = 0.0, []
    print("= share of the error that is allowed, in bfloat16 and float32:")
    for operator, case, run in CASES:
        exact, told = run("cpu", torch.float64), []
        for dtype in (torch.bfloat16, torch.float32):
            ours, usual, used = run(device, dtype), plain(operator, run, dtype), backend(operator, device, dtype)
            stand_ins += [operator] * (used == "reference")
            row = {"operator": operator, "case": case, "dtype": str(dtype).removeprefix("torch.")}
            for mode in exact:
                triples = zip(ours[mode], usual[mode], exact[mode], strict=True)
                share = max(share_of_allowed(*three, dtype) for three in triples)
                worst = max(worst, share)
                rows.save({**row, "mode": mode, "share_of_allowed": share, "backend": used, **about})
                told.append(f"{mode} {share:.2f}")
        print(f"= {operator} {case} ({used}): {', '.join(told[:2])}; float32 {', '.join(told[2:])}", flush=True)
    if stand_ins:
        raise SystemExit(f"no kernel ran for {', '.join(sorted(set(stand_ins)))}: python -m granvit_kernels says why")
    if not worst <= 1:
        raise SystemExit(f"an error is {worst:.2f} of what the rule allows")


if __name__ == "__main__":
    main()
