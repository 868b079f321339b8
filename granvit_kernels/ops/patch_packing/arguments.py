"""What pack_patches accepts: its arguments checked and brought to one form for every backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ORDERS = ("hwc", "chw")


@dataclass(frozen=True)
class Packing:
    """One checked call of pack_patches.

    images: uint8 [H, W, 3] each, any strides, all on one device.
    crops: float64 [N, 5] on the host: image index, x1, y1, x2, y2 in pixels.
    grids: int64 [N, 2] on the host: (h, w) in patches.
    """

    images: list[torch.Tensor]
    crops: torch.Tensor
    grids: torch.Tensor
    patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dtype: torch.dtype
    order: str
    device: torch.device

    @property
    def num_tokens(self) -> int:
        return int(self.grids.prod(dim=1).sum())

    @property
    def patch_values(self) -> int:
        return 3 * self.patch_size**2


def check_packing(images, patch_size, mean, std, crops, grids, dtype, order) -> Packing:
    """Checks pack_patches' arguments; every fault is a ValueError naming the argument."""
    images = check_images(images)
    check_patch_size(patch_size)
    mean, std = check_statistics(mean, std)
    check_order(order)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    crops = whole_images(images) if crops is None else check_crops(crops, images)
    grids = default_grids(crops, patch_size) if grids is None else check_grids(grids, len(crops))
    device = images[0].device if images else torch.device("cpu")
    return Packing(images, crops, grids, patch_size, mean, std, dtype, order, device)


def check_images(images) -> list[torch.Tensor]:
    images = list(images)
    for i, image in enumerate(images):
        if not isinstance(image, torch.Tensor):
            raise ValueError(f"images[{i}] must be a uint8 tensor [H, W, 3], got {type(image).__name__}")
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[2] != 3 or image.numel() == 0:
            raise ValueError(
                f"images[{i}] must be a uint8 tensor [H, W, 3] with H, W >= 1, "
                f"got {image.dtype} {list(image.shape)}"
            )
        if image.device != images[0].device:
            raise ValueError(
                f"images must be on one device, got images[0] on {images[0].device} "
                f"and images[{i}] on {image.device}"
            )
    return images


def check_patch_size(patch_size) -> None:
    if not isinstance(patch_size, int) or isinstance(patch_size, bool) or patch_size < 1:
        raise ValueError(f"patch_size must be an int >= 1, got {patch_size!r}")


def check_order(order) -> None:
    if order not in ORDERS:
        raise ValueError(f"order must be 'hwc' or 'chw', got {order!r}")


def check_statistics(mean, std) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    mean, std = three_numbers("mean", mean), three_numbers("std", std)
    if min(std) <= 0:
        raise ValueError(f"std must be three numbers > 0, got {std}")
    return mean, std


def three_numbers(name: str, values) -> tuple[float, float, float]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} must be three finite numbers (red, green, blue in 0-1), got {values!r}")
    return numbers


def whole_images(images: list[torch.Tensor]) -> torch.Tensor:
    rows = [[i, 0, 0, image.shape[1], image.shape[0]] for i, image in enumerate(images)]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)


def default_grids(crops: torch.Tensor, patch_size: int) -> torch.Tensor:
    """As many whole patches as each side holds, at least one: int64 [N, 2] (h, w)."""
    sides = torch.stack([crops[:, 4] - crops[:, 2], crops[:, 3] - crops[:, 1]], dim=1)
    return (sides / patch_size).floor().clamp(min=1).to(torch.int64)


def check_crops(crops, images: list[torch.Tensor]) -> torch.Tensor:
    crops = host_rows("crops", crops, 5, torch.float64)
    if len(crops) == 0:
        return crops
    index, x1, y1, x2, y2 = crops.unbind(1)
    known = (index >= 0) & (index < len(images)) & (index == index.floor())
    refuse(crops, ~known, f"crops must start with an image index in 0..{len(images) - 1}")
    sizes = torch.tensor([image.shape[:2] for image in images], dtype=torch.float64)[index.to(torch.int64)]
    inside = (0 <= x1) & (x1 < x2) & (x2 <= sizes[:, 1]) & (0 <= y1) & (y1 < y2) & (y2 <= sizes[:, 0])
    refuse(
        crops,
        ~inside,
        "crops must lie inside their image, 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height in pixels",
        sizes,
    )
    return crops


def refuse(crops: torch.Tensor, bad: torch.Tensor, rule: str, sizes: torch.Tensor | None = None) -> None:
    """Raises for the first crop marked bad."""
    if not bad.any():
        return
    i = int(bad.nonzero()[0])
    size = "" if sizes is None else f" in an image of height {sizes[i, 0]:.0f} and width {sizes[i, 1]:.0f}"
    raise ValueError(f"{rule}; got crops[{i}] = {crops[i].tolist()}{size}")


def check_grids(grids, count: int) -> torch.Tensor:
    rows = host_rows("grids", grids, 2, torch.float64)
    if len(rows) != count:
        raise ValueError(f"grids must have one row (h, w) a crop, {count} here, got {len(rows)}")
    if not ((rows >= 1) & (rows == rows.floor()) & (rows < 2**31)).all():
        raise ValueError(f"grids must be whole numbers of patches >= 1, got {rows.tolist()}")
    return rows.to(torch.int64)


def host_rows(name: str, values: Sequence, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of numbers as a contiguous host tensor [N, columns]; an empty list is no rows."""
    if isinstance(values, torch.Tensor) and values.device.type != "cpu":
        # Copying it here would wait for the device in every call: the caller had these numbers on the host.
        raise ValueError(f"{name} must be host data (a list, an array or a CPU tensor), got a tensor on {values.device}")
    try:
        rows = torch.as_tensor(values).to(dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be rows of {columns} numbers [N, {columns}], got {values!r}") from error
    if rows.numel() == 0 and rows.shape in ((0,), (0, columns)):
        return rows.reshape(0, columns)
    if rows.dim() != 2 or rows.shape[1] != columns:
        raise ValueError(f"{name} must be rows of {columns} numbers [N, {columns}], got shape {list(rows.shape)}")
    return rows.contiguous()
