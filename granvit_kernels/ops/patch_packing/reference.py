"""pack_patches in plain PyTorch: the specification, on any device.

Each axis of a crop is resampled by a matrix of weights [outputs, source pixels], made in float64 on the host;
the products are taken in float32, for dtype float64 in float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...layout import PackedLayout

if TYPE_CHECKING:
    from .arguments import Packing


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def forward(job: Packing) -> tuple[Tensor, PackedLayout]:
    """The patches [T, patch_size**2 * 3] in job.dtype, and their layout, on job.device."""
    crops = zip(job.crops.tolist(), job.grids.tolist(), strict=True)
    empty = torch.empty(0, job.shape[1], dtype=job.dtype, device=job.device)
    return torch.cat([empty, *(pack_crop(job, crop, grid) for crop, grid in crops)]), job.layout


def pack_crop(job: Packing, crop: list[float], grid: list[int]) -> Tensor:
    """One crop (image index, x1, y1, x2, y2) as patches [h * w, patch_size**2 * 3], row-major over (h, w)."""
    (index, x1, y1, x2, y2), (h, w), p = crop, grid, job.patch_size
    compute = torch.float64 if job.dtype == torch.float64 else torch.float32
    window = job.images[int(index)][math.floor(y1) : math.ceil(y2), math.floor(x1) : math.ceil(x2)]
    rows = axis_weights(y1, y2, h * p).to(job.device, compute)
    columns = axis_weights(x1, x2, w * p).to(job.device, compute)
    with torch.autocast(job.device.type, enabled=False):
        pixels = torch.einsum("yj,jkc->ykc", rows, window.to(compute))
        pixels = torch.einsum("xk,ykc->yxc", columns, pixels)  # [h * p, w * p, 3], 0-255
    mean, std = (torch.tensor(values, dtype=compute, device=job.device) for values in (job.mean, job.std))
    patches = ((pixels / 255 - mean) / std).reshape(h, p, w, p, 3)
    patches = patches.permute((0, 2, 1, 3, 4) if job.order == "hwc" else (0, 2, 4, 1, 3))
    return patches.reshape(h * w, job.shape[1]).to(job.dtype)


def axis_weights(a: float, b: float, n: int) -> Tensor:
    """Antialiased bilinear resampling of [a, b) to n pixels: float64 [n, ceil(b) - floor(a)].

    Output i is centred at c = a + (i + 1/2) s with s = (b - a) / n. Source pixel j, floor(a) <= j < ceil(b),
    weighs max(0, 1 - |j + 1/2 - c| / max(s, 1)), divided by the sum over j: a triangle as wide as the output
    pixel when shrinking, linear interpolation when growing, as in Pillow and in torch's antialias=True.
    """
    s = (b - a) / n
    centres = a + (torch.arange(n, dtype=torch.float64) + 0.5) * s
    pixels = torch.arange(math.floor(a), math.ceil(b), dtype=torch.float64) + 0.5
    weights = (1 - (pixels - centres[:, None]).abs() / max(s, 1.0)).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)
