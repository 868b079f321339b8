"""plan_packing by C++ (csrc/cpu/plan_packing.cpp)."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch

from .... import native

if TYPE_CHECKING:
    import numpy as np


def why_not(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """It works on host numbers, and needs nothing but the library."""
    return native.why_not()


def forward(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """As reference.forward; lengths contiguous."""
    indices, ends = lengths.copy(), lengths.copy()
    lists = native.library().plan_packing(
        lengths.ctypes.data, len(lengths), capacity, indices.ctypes.data, ends.ctypes.data
    )
    return cut(indices.tolist(), ends[:lists].tolist())


def cut(flat: list[int], ends: list[int]) -> list[list[int]]:
    """flat in consecutive pieces that end at `ends`."""
    # Python would search the growing lists for cycles again and again: 10 times the work of making them.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    finally:
        if collecting:
            gc.enable()
