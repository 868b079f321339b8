"""Host checks shared by operators: each raises ValueError naming the argument, what it got and takes."""

from __future__ import annotations

import operator
import reprlib
from typing import Any

import torch
from torch import Tensor

INDEX_DTYPES = (torch.int32, torch.int64)

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of every operator's tensors; float64 runs in the reference alone."""


def describe(tensor: Tensor) -> str:
    """dtype and shape for a message: "float32 [3, 4]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def shown(value: Any) -> str:
    """A value of any kind for a message: its repr, cut where it is long."""
    return describe(value) if isinstance(value, Tensor) and value.dim() else reprlib.repr(value)


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """`value` as an int in low..high: whatever Python itself takes for an index (numpy's integers too), no bool."""
    if type(value) is int and (low is None or value >= low) and (high is None or value <= high):
        return value  # nearly always, and quickly
    number = value
    if not isinstance(value, (int, torch.SymInt)):  # traced ones must stay as they are
        try:
            number = operator.index(value)
        except TypeError:
            number = None
    fits = number is not None and not isinstance(value, bool)
    if not (fits and (low is None or number >= low) and (high is None or number <= high)):
        bounds = [f"{sign} {bound}" for sign, bound in ((">=", low), ("<=", high)) if bound is not None]
        raise ValueError(f"{name} is {shown(value)}; it takes a whole number {' and '.join(bounds)}".rstrip())
    return number


def kinds(layout: Any, **tensors: Any) -> None:
    """A PackedLayout, of this copy of the package or another, and tensors."""
    if not hasattr(layout, "num_tokens"):
        raise ValueError(f"layout is a {type(layout).__name__}; it takes a PackedLayout")
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}; it takes a tensor")


def float_dtype(name: str, tensor: Tensor) -> None:
    """A tensor of a dtype that the operators take."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} is {describe(tensor)}; it takes float32, bfloat16, float16 or float64")


def packed(name: str, tensor: Tensor, num_tokens: int, dims: int, shape: str) -> None:
    """A tensor of FLOAT_DTYPES whose first dimension is the layout's num_tokens. shape: for the message."""
    float_dtype(name, tensor)
    if tensor.dim() != dims or tensor.shape[0] != num_tokens:
        raise ValueError(
            f"{name} is {describe(tensor)}; it takes floating-point {shape} with T = {num_tokens}, "
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
