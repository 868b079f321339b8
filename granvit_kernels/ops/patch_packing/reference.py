"""pack_patches in plain PyTorch: the specification, on any device.

Each axis of a crop is resampled by a matrix of weights [outputs, source pixels], made in float64 on the host. Without
rounding the products are taken in float32, for dtype float64 in float64; with rounding they are sums of whole
numbers, in float64, which holds them exactly.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...layout import PackedLayout

if TYPE_CHECKING:
    from .arguments import Packing

STEPS = 2**22
"""Of a weight, with rounding: Pillow rounds weights to so many parts of 1."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def forward(job: Packing) -> tuple[Tensor, PackedLayout]:
    """The patches [T, patch_size**2 * 3] in job.dtype, and their layout, on job.device."""
    empty = torch.empty(0, job.shape[1], dtype=job.dtype, device=job.device)
    return torch.cat([empty, *(pack_crop(job, i) for i in range(len(job.crops)))]), job.layout


def pack_crop(job: Packing, i: int) -> Tensor:
    """Crop i as patches [h * w, patch_size**2 * 3]."""
    (index, x1, y1, x2, y2), (h, w), p, m = job.crops[i].tolist(), job.grids[i].tolist(), job.patch_size, job.merge
    height, width, top, left = job.frames[i].tolist()
    compute = torch.float64 if job.dtype == torch.float64 else torch.float32
    window = job.images[int(index)][math.floor(y1) : math.ceil(y2), math.floor(x1) : math.ceil(x2)]
    rows = axis_weights(y1, y2, height, job.resample)[top : top + h * p]
    columns = axis_weights(x1, x2, width, job.resample)[left : left + w * p]
    with torch.autocast(job.device.type, enabled=False):
        if job.round is None:
            pixels = resize(window, rows, columns, compute)
        else:  # Pillow 13 goes down the columns first where that takes away more than twice as many rows as columns
            taller, wider = window.shape[0] - height, window.shape[1] - width
            columns_first = job.round == "pil13" and taller > max(0, 2 * wider)
            pixels = resize_as_pillow(window, rows, columns, columns_first, compute)
    mean, std = (torch.tensor(values, dtype=compute, device=job.device) for values in (job.mean, job.std))
    values = ((pixels / 255 - mean) / std).reshape(h // m, m, p, w // m, m, p, 3)
    patches = values.permute(0, 3, 1, 4, *((2, 5, 6) if job.order == "hwc" else (6, 2, 5)))
    return patches.reshape(h * w, job.shape[1]).to(job.dtype)


def resize(window: Tensor, rows: Tensor, columns: Tensor, compute: torch.dtype) -> Tensor:
    """uint8 [H, W, 3] by weights of rows [h, H] and columns [w, W], float64 on the host: [h, w, 3] in 0-255."""
    rows, columns = rows.to(window.device, compute), columns.to(window.device, compute)
    pixels = torch.einsum("yj,jkc->ykc", rows, window.to(compute))
    return torch.einsum("xk,ykc->yxc", columns, pixels)


def resize_as_pillow(
    window: Tensor, rows: Tensor, columns: Tensor, columns_first: bool, compute: torch.dtype
) -> Tensor:
    """As `resize`, to whole numbers: along the rows and down the columns in turn, each rounded to 8 bits."""
    pixels = window.cpu().double()  # some devices have no float64
    passes = [("xk,jkc->jxc", columns), ("yj,jxc->yxc", rows)]
    for equation, weights in reversed(passes) if columns_first else passes:
        steps = (weights.abs() * STEPS + 0.5).floor() * weights.sign()
        pixels = (torch.einsum(equation, steps, pixels) / STEPS + 0.5).floor().clamp(0, 255)
    return pixels.to(window.device, compute)


def axis_weights(a: float, b: float, n: int, resample: str) -> Tensor:
    """Antialiased resampling of [a, b) to n pixels: float64 [n, ceil(b) - floor(a)].

    Output i is centred at c = a + (i + 1/2) s with s = (b - a) / n. Source pixel j, floor(a) <= j < ceil(b), weighs
    f((j + 1/2 - c) / max(s, 1)), divided by the sum over j, as in Pillow and in torch's antialias=True. bilinear:
    f(x) = max(0, 1 - |x|), a triangle as wide as the output pixel when shrinking, linear interpolation when growing.
    bicubic: Keys' f(x) = 3/2 |x|^3 - 5/2 |x|^2 + 1 up to |x| = 1, then -1/2 (|x|^3 - 5 |x|^2 + 8 |x| - 4) up to 2.
    Pixels are counted from floor(a), and each operation is rounded as in Pillow: so that weights are its own, to the
    last bit.
    """
    start, end = a - math.floor(a), b - math.floor(a)
    s = (end - start) / n
    centres = start + (torch.arange(n, dtype=torch.float64) + 0.5) * s
    pixels = torch.arange(math.ceil(b) - math.floor(a), dtype=torch.float64)
    x = ((pixels - centres[:, None] + 0.5) * (1 / max(s, 1.0))).abs()
    if resample == "bilinear":
        weights = (1 - x).clamp(min=0)
    else:
        near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.cumsum(dim=1)[:, -1:]  # a sum from left to right
