"""Images to packed patches and back, and the plan of what shares a packed row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ... import backends
from ...checks import describe, kinds
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
    *,
    sizes: Sequence[Sequence[int]] | Tensor | None = None,
    resample: str = "bilinear",
    round: str | None = None,
    merge: int = 1,
) -> tuple[Tensor, PackedLayout]:
    """Crops, resizes, normalises, cuts into patches and packs images of any sizes, in one pass.

    images: uint8 [H, W, 3] each, RGB, any strides, all on one device; an empty list is valid.
    patch_size: p, the side of a patch in pixels, at most 2**15.
    mean, std: three numbers each; a channel's value is (x / 255 - mean) / std.
    crops: [N, 5] (image index, x1, y1, x2, y2) in pixels, fractions allowed, inside the image, on the host;
        several may share an image. None: every whole image.
    grids: [N, 2] (h, w) in patches, on the host: crop i is resampled as a whole to (h * p) x (w * p) pixels,
        whatever its aspect ratio. None: max(1, floor(side / p)) a side, in multiples of merge.
    dtype: of the patches: bfloat16, float16, float32 or float64.
    order: of a patch's values: "hwc" (row, column, channel), as SigLIP2's processors give them, or "chw", as
        a convolution's weight has them.
    sizes: [len(images), 2] (height, width) in pixels, on the host: each image is resized as a whole first, and crops
        are then cut out of that at whole pixels, h * p high and w * p wide, not resampled again. This is "shortest
        edge to 256, then the centre's 224", as CLIP's and DINOv2's processors do it.
    resample: "bilinear", or "bicubic" (a = -1/2, which can overshoot 0-255 where nothing is rounded).
    round: None, or to 8 bits twice, along the rows and down the columns, as Pillow's resize does: "pil" as before its
        version 13, with which most models were trained, "pil13" as since.
    merge: m: a crop's patches lie block by block of m x m, row-major over the blocks and within them, as
        Qwen2-VL's processor gives them with 2. It divides grids.

    Returns (patches [T, p * p * 3], their PackedLayout), both on the images' device: the patches of crop 0,
    row-major over its grid (but for merge), then crop 1's, and so on. No gradient. Where a model then merges each m * m
    rows into one, those are row-major again: PackedLayout.from_grids of grids / m is their layout.

    Resampling is antialiased. An axis [a, b) of n output pixels has s = (b - a) / n; output i, centred at
    c = a + (i + 1/2) s, is the mean of the source pixels floor(a) <= j < ceil(b) with weights
    f((j + 1/2 - c) / max(s, 1)): bilinear f(x) = max(0, 1 - |x|); bicubic Keys' cubic convolution (IEEE TASSP 1981),
    f(x) = 3/2 |x|^3 - 5/2 |x|^2 + 1 up to |x| = 1, -1/2 (|x|^3 - 5 |x|^2 + 8 |x| - 4) from there to 2. Pixels that
    a crop doesn't touch don't count.

    Rounding is Pillow's arithmetic bit for bit (its Resample.c): weights in steps of 2**-22, each pass rounded to 8
    bits. Pixels equal `image.resize(size, resample)`, for a crop `image.crop(box).resize(...)` (with fractions: of
    the window that the crop touches, with its box, which Pillow keeps in float32), and so those of transformers'
    processors that use Pillow. The passes' order shows, a few steps here and there: along the rows is first, but
    with "pil13" down the columns where that takes rows away, and more than twice as many as columns. Processors
    that use torchvision are a step or two from "pil".
    Without rounding, values are within 0.01 steps of the formula (float32), and 0.1 of torch's
    interpolate(antialias=True).

    Raises ValueError, naming the argument, for anything else; RuntimeError where no backend can run.
    """
    from .arguments import check_packing  # not with the package: it imports numpy, and Hugging Face kernels may not

    job = check_packing(images, patch_size, mean, std, crops, grids, dtype, order, sizes, resample, round, merge)
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
    merge: int = 1,
) -> list[Tensor]:
    """Patches back to pictures, as pack_patches resampled them: for looking at, and for tests.

    patches [T, p * p * 3]: floating point. layout, patch_size (p), mean, std, order, merge: as of pack_patches.
    Returns float32 [h * p, w * p, 3] each, on the patches' device, in 0-255, neither rounded nor clamped.
    Raises ValueError, naming the argument.
    """
    from .arguments import check_format

    kinds(layout, patches=patches)
    p, mean, std, m = check_format(patch_size, mean, std, order, merge)
    if not patches.is_floating_point() or patches.shape != (layout.num_tokens, 3 * p * p):
        raise ValueError(
            f"patches is {describe(patches)}; it takes floating-point [{layout.num_tokens}, {3 * p * p}], "
            f"a row of {p} x {p} x 3 values a token of the layout"
        )
    scale, shift = (torch.tensor(x, dtype=torch.float32, device=patches.device) for x in (std, mean))
    if any(side % m for grid in layout.host_grids for side in grid):
        raise ValueError(f"layout has the grids {list(layout.host_grids)}; with merge={m} it takes multiples of {m}")
    pictures = []
    for image in layout.split(patches):
        h, w, _ = image.shape
        pixels = image.reshape(h // m, w // m, m, m, *((p, p, 3) if order == "hwc" else (3, p, p)))
        pixels = pixels.permute(0, 2, *((4, 1, 3, 5, 6) if order == "hwc" else (5, 1, 3, 6, 4)))
        pictures.append((pixels.reshape(h * p, w * p, 3).to(torch.float32) * scale + shift) * 255)
    return pictures
