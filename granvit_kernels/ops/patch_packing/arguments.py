"""What pack_patches accepts: its arguments checked, and brought to one form for every backend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ... import native
from ...checks import FLOAT_DTYPES, describe, integer
from ...layout import PackedLayout

ORDERS = ("hwc", "chw")
RESAMPLES = {"bilinear": 0, "bicubic": 1}
ROUNDINGS = {None: 0, "pil": 1, "pil13": 2}
"""What csrc/common/resample.h calls each of them."""

MAX_PATCH_SIZE = 2**15
"""In pixels: so that a patch's and a crop's sizes stay far from the end of int64."""


@dataclass(frozen=True)
class Packing:
    """One checked call of pack_patches.

    images: uint8 [H, W, 3] each, any strides, all on `device`.
    crops: float64 [N, 5] (image index, x1, y1, x2, y2) in pixels. grids: int64 [N, 2] (h, w) in patches.
    frames: int64 [N, 4] (height, width, top, left) in pixels: crop i is resampled as a whole to height x width, and
        what is made of that are the pixels of its grid, from (top, left) on. All three are contiguous: kernels take
        their addresses.
    """

    images: list[Tensor]
    crops: np.ndarray
    grids: np.ndarray
    frames: np.ndarray
    patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype
    order: str
    resample: str
    round: str | None
    merge: int
    device: torch.device

    def native(self, patches: Tensor) -> tuple[Any, Any]:
        """(csrc/common/packing.h's PackPatches, what has to live until a kernel has returned or was launched).

        Kernels read rows of RGBRGB...: a permuted [3, H, W] is copied, a slice of rows and columns is not.
        """
        rows = list(self.images)
        strides = table(map(Tensor.stride, rows), 3, np.int64)
        for i in np.flatnonzero((strides[:, 0] >= 2**31) | (strides[:, 1] != 3) | (strides[:, 2] != 1)):
            rows[i] = rows[i].contiguous()
            strides[i] = rows[i].stride()
        addresses = np.empty((len(rows), 2), dtype=np.int64)
        addresses[:, 0], addresses[:, 1] = list(map(Tensor.data_ptr, rows)), strides[:, 0]
        problem = native.library().PackPatches(
            addresses.ctypes.data, self.crops.ctypes.data, self.grids.ctypes.data, self.frames.ctypes.data,
            len(self.crops), self.patch_size, self.merge,
            [1 / (255 * std) for std in self.std],
            [-mean / std for mean, std in zip(self.mean, self.std, strict=True)],
            self.order == "chw", RESAMPLES[self.resample], ROUNDINGS[self.round], native.DTYPES[self.dtype],
            patches.data_ptr(),
        )  # fmt: skip
        return problem, (rows, addresses)

    @property
    def layout(self) -> PackedLayout:
        """The patches' layout."""
        return PackedLayout.from_grids(torch.from_numpy(self.grids), device=self.device)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the patches: (T, patch_size**2 * 3)."""
        return int(self.grids.prod(axis=1).sum()), 3 * self.patch_size**2


def check_packing(
    images: Sequence[Tensor],
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crops: Any,
    grids: Any,
    dtype: torch.dtype,
    order: str,
    sizes: Any = None,
    resample: str = "bilinear",
    round: str | None = None,
    merge: int = 1,
) -> Packing:
    """pack_patches' arguments, or a ValueError that names the wrong one."""
    images, shapes = check_images(images)
    patch_size, mean, std, merge = check_format(patch_size, mean, std, order, merge)
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype}; it takes {', '.join(map(str, FLOAT_DTYPES))}")
    if resample not in tuple(RESAMPLES):  # a list is no key
        raise ValueError(f"resample is {resample!r}; it takes 'bilinear' or 'bicubic'")
    if round not in tuple(ROUNDINGS):
        raise ValueError(f"round is {round!r}; it takes None, 'pil' or 'pil13'")
    resized = shapes if sizes is None else check_sizes(sizes, len(images)).astype(np.float64)
    crops = whole_images(resized) if crops is None else check_crops(crops, resized)
    sides = np.stack([crops[:, 4] - crops[:, 2], crops[:, 3] - crops[:, 1]], axis=1)
    if grids is None:
        grids = (np.maximum(np.floor(sides / (patch_size * merge)), 1) * merge).astype(np.int64)
    else:
        grids = check_grids(grids, len(crops), merge)
    if grids.prod(axis=1, dtype=np.float64).sum() >= 2**31:
        tokens = sum(h * w for h, w in grids.tolist())
        raise ValueError(f"grids hold {tokens} tokens together; a layout takes fewer than 2**31")
    if sizes is None:
        frames = np.concatenate([grids * patch_size, np.zeros_like(grids)], axis=1)
    else:
        crops, frames = cut_after_resizing(crops, sides, grids, patch_size, shapes, resized)
    device = images[0].device if images else torch.device("cpu")
    return Packing(images, crops, grids, frames, patch_size, mean, std, dtype, order, resample, round, merge, device)


def cut_after_resizing(
    crops: np.ndarray, sides: np.ndarray, grids: np.ndarray, patch_size: int, shapes: np.ndarray, resized: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(crops, frames) of a Packing whose crops are pixels of the resized images; sides: the crops' (height, width)."""
    fits = (crops == np.floor(crops)).all(axis=1) & (sides == grids * patch_size).all(axis=1)
    for i in np.flatnonzero(~fits):
        raise ValueError(
            f"crops[{i}] is {crops[i].tolist()} of an image resized first (sizes), with the grid {grids[i].tolist()}; "
            f"it takes whole pixels, as many as the grid has: a multiple of {patch_size} a side"
        )
    index = crops[:, 0].astype(np.int64)
    frames = np.concatenate([resized[index], crops[:, 2:0:-1]], axis=1).astype(np.int64)
    whole = whole_images(shapes)[index]
    return whole, frames


def check_images(images: Sequence[Tensor]) -> tuple[list[Tensor], np.ndarray]:
    """The images as a list, and their (height, width) as float64 [N, 2]. A microsecond an image."""
    try:
        images = list(images)
    except TypeError:
        raise ValueError(f"images is {images!r}; it takes a list of uint8 tensors [H, W, 3]") from None
    device = images[0].device if images and isinstance(images[0], Tensor) else None
    fine = all(
        isinstance(image, Tensor) and image.dtype is torch.uint8 and image.ndim == 3 and image.device == device
        for image in images
    )
    shapes = table((image.shape for image in images), 3, np.float64) if fine else None
    if not fine or not ((shapes[:, :2] >= 1).all() and (shapes[:, 2] == 3).all()):
        name_wrong_image(images)
    return images, shapes[:, :2]


def name_wrong_image(images: list) -> NoReturn:
    for i, image in enumerate(images):
        got = describe(image) if isinstance(image, Tensor) else f"a {type(image).__name__}"
        if not got.startswith("uint8") or image.dim() != 3 or image.shape[2] != 3 or image.numel() == 0:
            raise ValueError(f"images[{i}] is {got}; it takes a uint8 tensor [H, W, 3] with H, W >= 1")
        if image.device != images[0].device:
            raise ValueError(f"images[{i}] is on {image.device}; it takes {images[0].device}, as images[0]")


def table(rows: Iterable[Sequence[float]], columns: int, dtype: type) -> np.ndarray:
    """Rows of `columns` numbers each as an array [N, columns]: what np.array does, several times faster."""
    return np.fromiter(chain.from_iterable(rows), dtype).reshape(-1, columns)


def check_format(
    patch_size: int, mean: Sequence[float], std: Sequence[float], order: str, merge: int
) -> tuple[int, tuple[float, ...], tuple[float, ...], int]:
    """patch_size and merge as ints, mean and std as floats; these five pack_patches and unpack_patches share."""
    patch_size = integer("patch_size", patch_size, 1, MAX_PATCH_SIZE)
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; it takes 'hwc' or 'chw'")
    mean, std = three_numbers("mean", mean), three_numbers("std", std)
    if min(std) <= 0:
        raise ValueError(f"std is {std}; it takes three numbers > 0")
    return patch_size, mean, std, integer("merge", merge, 1, MAX_PATCH_SIZE)


def three_numbers(name: str, values: Sequence[float]) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} is {values!r}; it takes three finite numbers, for red, green and blue")
    return numbers


def whole_images(sizes: np.ndarray) -> np.ndarray:
    """Crops [N, 5] of whole images; sizes: (height, width) each."""
    zeros = np.zeros(len(sizes))
    return np.stack([np.arange(len(sizes)), zeros, zeros, sizes[:, 1], sizes[:, 0]], axis=1)


def check_crops(crops: Any, sizes: np.ndarray) -> np.ndarray:
    crops = host_rows("crops", crops, 5)
    index, x1, y1, x2, y2 = crops.T
    for i in np.flatnonzero(~((index >= 0) & (index < len(sizes)) & (index == np.floor(index)))):
        raise ValueError(f"crops[{i}] is {crops[i].tolist()}; it takes an image's index first, below {len(sizes)}")
    heights, widths = sizes[index.astype(np.int64)].T
    inside = (x1 >= 0) & (x1 < x2) & (x2 <= widths) & (y1 >= 0) & (y1 < y2) & (y2 <= heights)
    for i in np.flatnonzero(~inside):
        raise ValueError(
            f"crops[{i}] is {crops[i].tolist()}, image index and x1, y1, x2, y2 in pixels; it takes "
            f"0 <= x1 < x2 <= {widths[i]:.0f} and 0 <= y1 < y2 <= {heights[i]:.0f} in this image"
        )
    return crops


def check_sizes(sizes: Any, count: int) -> np.ndarray:
    rows = whole_rows("sizes", sizes, "of pixels")
    if len(rows) != count:
        raise ValueError(f"sizes has {len(rows)} rows; it takes {count}, one (height, width) an image")
    return rows


def check_grids(grids: Any, count: int, merge: int) -> np.ndarray:
    rows = whole_rows("grids", grids, "of patches")
    if len(rows) != count:
        raise ValueError(f"grids has {len(rows)} rows; it takes {count}, one (h, w) a crop")
    for i in np.flatnonzero((rows % merge).any(axis=1)):
        raise ValueError(f"grids[{i}] is {rows[i].tolist()}; with merge={merge} it takes multiples of {merge}")
    return rows


def whole_rows(name: str, values: Any, unit: str) -> np.ndarray:
    """Rows of two whole numbers as int64 [N, 2]."""
    rows = host_rows(name, values, 2)
    for i in np.flatnonzero(~((rows >= 1) & (rows < 2**31) & (rows == np.floor(rows))).all(axis=1)):
        raise ValueError(f"{name}[{i}] is {rows[i].tolist()}; it takes whole numbers {unit} >= 1 and < 2**31")
    return rows.astype(np.int64)


def host_rows(name: str, values: Any, columns: int) -> np.ndarray:
    """Rows of numbers as a contiguous float64 array [N, columns]; an empty list is no rows."""
    takes = f"it takes rows of {columns} numbers on the host, a list, an array or a CPU tensor [N, {columns}]"
    if isinstance(values, Tensor):
        if values.device.type != "cpu":  # copying it here would wait for the device, in every call
            raise ValueError(f"{name} is on {values.device}; {takes}")
        values = values.detach().to(torch.float64).numpy()
    try:
        rows = np.ascontiguousarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {values!r}; {takes}") from None
    if rows.shape == (0,):
        return rows.reshape(0, columns)
    if rows.ndim != 2 or rows.shape[1] != columns:
        raise ValueError(f"{name} has shape {list(rows.shape)}; {takes}")
    return rows
