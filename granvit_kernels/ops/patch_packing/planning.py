"""plan_packing: which sequences share a packed row, so that rows are nearly full."""

from __future__ import annotations

import gc
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from granvit_kernels import native


def plan_packing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Shares sequences out among few lists, none longer in sum than the capacity: best-fit decreasing.

    lengths: whole numbers in 0..capacity (list, array or CPU tensor [N]); a 0 is placed like any other.
    capacity: a whole number >= 1.

    Returns lists of indices into `lengths`, every index once. The plan is a function of the arguments alone,
    specified by `best_fit_decreasing`. A million lengths take well under a second in C++, which runs where
    the native library is there, and some seconds in Python.

    Raises ValueError for a length over the capacity or below 0 (naming it and its index), and for anything
    that is not a whole number.
    """
    lengths = check_lengths(lengths)
    if not isinstance(capacity, (int, np.integer)) or isinstance(capacity, bool) or not 1 <= capacity < 2**63:
        raise ValueError(f"capacity is {capacity!r}; it takes a whole number >= 1")
    for fault, bad in (("over the capacity", lengths > capacity), ("negative", lengths < 0)):
        if bad.any():
            i = int(bad.argmax())
            raise ValueError(f"lengths[{i}] is {lengths[i]}, {fault}; it takes 0..{capacity}")
    if native.why_not() is not None:
        return best_fit_decreasing(lengths.tolist(), capacity)
    indices, ends = np.empty_like(lengths), np.empty_like(lengths)
    lists = native.library().plan_packing(
        lengths.ctypes.data, len(lengths), int(capacity), indices.ctypes.data, ends.ctypes.data
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


def check_lengths(lengths: Sequence[int]) -> np.ndarray:
    """lengths as a contiguous int64 array [N]."""
    array = np.asarray(lengths)
    if array.ndim == 1 and len(array) == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"lengths is {array.dtype} {list(array.shape)}; it takes whole numbers [N]")
    return np.ascontiguousarray(array, dtype=np.int64)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The specification of plan_packing, in plain Python.

    Sequences are placed from the longest to the shortest, equal ones in the order given. Each goes into the
    list with the least room that still holds it, among equal ones into the one that got its room last; where
    none holds it, into a new list. Lists stand in the order in which they were opened, indices in the order
    in which they were placed.
    """
    lists: list[list[int]] = []
    rooms: list[int] = []  # ascending, each once
    stacks: dict[int, list[int]] = {}  # room -> the lists that have it
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, lengths[i])
        if at == len(rooms):
            room, number = capacity, len(lists)
            lists.append([])
        else:
            room = rooms[at]
            number = stacks[room].pop()
            if not stacks[room]:
                del rooms[at]
        lists[number].append(i)
        room -= lengths[i]
        stack = stacks.setdefault(room, [])
        if not stack:
            insort(rooms, room)
        stack.append(number)
    return lists
