"""What the Triton kernels of several operators share."""

from __future__ import annotations

import triton
import triton.language as tl

INDICES = ["grids", "cu_seqlens", "boxes", "image_index", "tile_token"]
"""Pointers that kernels read number by number: Triton would compile once more for those that 16 bytes don't divide, as
in a slice of a batch, and gain nothing where they do."""


@triton.jit
def load_box(boxes, region):
    """x1, y1, x2, y2 of one region or of many."""
    at = boxes + region.to(tl.int64) * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def finite_box(x1, y1, x2, y2):
    """Whether all four are numbers. A comparison with a NaN is false."""
    infinite = float("inf")
    return (tl.abs(x1) < infinite) & (tl.abs(y1) < infinite) & (tl.abs(x2) < infinite) & (tl.abs(y2) < infinite)
