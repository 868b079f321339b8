"""Images to packed patches and back, and the plan of what shares a packed row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ... import backends
from ...checks import describe
from ...layout import PackedLayout
from . import cpu, cuda, planning, reference
from .planning import plan_packing

__all__ = ["pack_patches", "plan_packing", "unpack_patches"]

CANDIDATES = {"pack_patches": {"cuda": cuda, "cpu": cpu, "reference": reference}, **planning.CANDIDATES}


def pack_patches(
    images: Sequence[Tensor],
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crops: Sequence[Sequence[float]] | Tensor | None = None,
    grids: Sequence[Sequence[int]] | Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    order: str = "hwc",
) -> tuple[Tensor, PackedLayout]:
    """Crops, resizes, normalises, cuts into patches and packs images of any sizes, in one pass.

    images: uint8 [H, W, 3] each, RGB, any strides, all on one device; an empty list is valid.
    patch_size: p, the side of a patch in pixels, at most 2**15.
    mean, std: three numbers each; a channel's value is (x / 255 - mean) / std.
    crops: [N, 5] (image index, x1, y1, x2, y2) in pixels, fractions allowed, inside the image, on the host;
        several may share an image. None: every whole image.
    grids: [N, 2] (h, w) in patches, on the host: crop i is resampled as a whole to (h * p) x (w * p) pixels,
        whatever its aspect ratio. None: max(1, floor(side / p)) a side.
    dtype: of the patches: bfloat16, float16, float32 or float64.
    order: of a patch's values: "hwc" (row, column, channel), as SigLIP2's processors give them, or "chw", as
        a convolution's weight has them.

    Returns (patches [T, p * p * 3], their PackedLayout), both on the images' device: the patches of crop 0,
    row-major over its grid, then crop 1's, and so on. No gradient.

    Resampling is antialiased bilinear, as Pillow and torch's interpolate(antialias=True) do it, unrounded;
    `reference.axis_weights` has the formula. Pixels that a crop doesn't touch don't count.

    Raises ValueError, naming the argument, for anything else; RuntimeError where no backend can run.
    """
    from .arguments import check_packing  # not with the package: it imports numpy, and Hugging Face kernels may not

    job = check_packing(images, patch_size, mean, std, crops, grids, dtype, order)
    if job.device.type == "meta":  # shapes, as of the other operators
        return cuda.empty(job)
    if job.images and isinstance(job.images[0], FakeTensor):  # they have no memory either
        with job.images[0].fake_mode:
            return cuda.empty(job)
    if torch.jit.is_tracing():  # kernels write behind its back: it would record uninitialised memory
        return reference.forward(job)
    backend = backends.choose("pack_patches", CANDIDATES["pack_patches"], device=job.device, dtype=dtype)
    return backend.forward(job)


def unpack_patches(
    patches: Tensor,
    layout: PackedLayout,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    order: str = "hwc",
) -> list[Tensor]:
    """Patches back to pictures, as pack_patches resampled them: for looking at, and for tests.

    patches [T, p * p * 3]: floating point. layout, patch_size (p), mean, std, order: as of pack_patches.
    Returns float32 [h * p, w * p, 3] each, on the patches' device, in 0-255, neither rounded nor clamped.
    Raises ValueError, naming the argument.
    """
    from .arguments import check_format

    p, mean, std = check_format(patch_size, mean, std, order)
    if not patches.is_floating_point() or patches.shape != (layout.num_tokens, 3 * p * p):
        raise ValueError(
            f"patches is {describe(patches)}; it takes floating-point [{layout.num_tokens}, {3 * p * p}], "
            f"a row of {p} x {p} x 3 values a token of the layout"
        )
    scale, shift = (torch.tensor(x, dtype=torch.float32, device=patches.device) for x in (std, mean))
    pictures = []
    for image in layout.split(patches):
        h, w, _ = image.shape
        if order == "hwc":
            pixels = image.reshape(h, w, p, p, 3).permute(0, 2, 1, 3, 4)
        else:
            pixels = image.reshape(h, w, 3, p, p).permute(0, 3, 1, 4, 2)
        pictures.append((pixels.reshape(h * p, w * p, 3).to(torch.float32) * scale + shift) * 255)
    return pictures
