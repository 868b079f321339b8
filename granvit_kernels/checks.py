"""Host checks shared by operators: each raises ValueError naming the argument, what it got and takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from granvit_kernels.layout import PackedLayout

INDEX_DTYPES = (torch.int32, torch.int64)


def describe(tensor: Tensor) -> str:
    """dtype and shape for a message: "float32 [3, 4]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def packed(name: str, tensor: Tensor, layout: PackedLayout, dims: int, shape: str) -> None:
    """A floating-point tensor whose first dimension is the layout's tokens. shape: for the message."""
    if tensor.dim() != dims or tensor.shape[0] != layout.num_tokens or not tensor.is_floating_point():
        raise ValueError(
            f"{name} is {describe(tensor)}; it takes floating-point {shape} with T = {layout.num_tokens}, "
            "the layout's tokens"
        )


def boxes(boxes: Tensor, image_index: Tensor) -> None:
    """boxes float32 [R, 4] and image_index int32 or int64 [R]: shapes and dtypes. Values: box_values."""
    if boxes.dim() != 2 or boxes.shape[1] != 4 or boxes.dtype != torch.float32:
        raise ValueError(f"boxes is {describe(boxes)}; it takes float32 [R, 4], xyxy in patch units")
    image_index_shape(image_index, boxes.shape[0])


def image_index_shape(image_index: Tensor, count: int) -> None:
    """image_index int32 or int64 [count]."""
    if image_index.dim() != 1 or image_index.shape[0] != count or image_index.dtype not in INDEX_DTYPES:
        raise ValueError(
            f"image_index is {describe(image_index)}; it takes int32 or int64 [{count}], one a box"
        )


def same_device(device: torch.device, **tensors: Tensor) -> None:
    """All tensors on `device`."""
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; it takes {device}, where the tokens are")


def box_values(boxes: Tensor, image_index: Tensor, images: int) -> None:
    """Finite boxes, and indices of the layout's images; only on the CPU: a device would synchronise."""
    if boxes.device.type != "cpu" or boxes.shape[0] == 0:
        return
    finite = boxes.isfinite()
    if not finite.all():
        row = int((~finite).any(1).nonzero()[0])
        raise ValueError(f"boxes[{row}] is {boxes[row].tolist()}; it takes finite numbers")
    image_index_values(image_index, images)


def image_index_values(image_index: Tensor, images: int) -> None:
    """Indices in [0, images), on the CPU."""
    if image_index.device.type != "cpu" or image_index.shape[0] == 0:
        return
    low, high = (int(x) for x in image_index.aminmax())
    if low < 0 or high >= images:
        raise ValueError(
            f"image_index holds {low if low < 0 else high}; it takes [0, {images}), the layout's images"
        )
