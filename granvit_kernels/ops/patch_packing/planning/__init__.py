"""plan_packing: which sequences share a packed row, so that rows are nearly full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .... import backends
from ....checks import integer, shown
from . import cpu, reference
from .reference import best_fit_decreasing

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CANDIDATES", "best_fit_decreasing", "plan_packing"]

CANDIDATES = {"plan_packing": {"cpu": cpu, "reference": reference}}


def plan_packing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Shares sequences out among few lists, none longer in sum than the capacity: best-fit decreasing.

    lengths: whole numbers in 0..capacity (list, array or CPU tensor [N]); a 0 is placed like any other.
    capacity: a whole number >= 1, below 2**63.

    Returns lists of indices into `lengths`, every index once. The plan is a function of the arguments alone,
    specified by `best_fit_decreasing`. A million lengths take well under a second in C++, which runs where
    the native library is there, and some seconds in Python.

    Raises ValueError for a length over the capacity or below 0 (naming it and its index), and for anything
    that is not a whole number; RuntimeError where GRANVIT_KERNELS_BACKEND forces a backend that can't run.
    """
    capacity = integer("capacity", capacity, 1, 2**63 - 1)
    return backends.choose("plan_packing", CANDIDATES["plan_packing"]).forward(
        check_lengths(lengths, capacity), capacity
    )


def check_lengths(lengths: Sequence[int], capacity: int) -> np.ndarray:
    """lengths as a contiguous int64 array [N], each in 0..capacity."""
    import numpy as np  # not with the package: Hugging Face kernels import torch and the standard library alone

    try:
        array = np.asarray(lengths)
    except (TypeError, ValueError, RuntimeError):  # ragged lists, tensors elsewhere
        raise ValueError(f"lengths is {shown(lengths)}; it takes whole numbers [N], on the host") from None
    if array.ndim == 1 and len(array) == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"lengths is {array.dtype} {list(array.shape)}; it takes whole numbers [N]")
    # In the dtype given: uint64's upper half is negative in int64.
    for fault, bad in (("over the capacity", array > capacity), ("negative", array < 0)):
        if bad.any():
            i = int(bad.argmax())
            raise ValueError(f"lengths[{i}] is {array[i]}, {fault}; it takes 0..{capacity}")
    return np.ascontiguousarray(array, dtype=np.int64)
