"""plan_packing in plain Python: the specification."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np


def why_not(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """It runs everywhere."""
    return None


def forward(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """The plan for int64 lengths [N], each in 0..capacity."""
    return best_fit_decreasing(lengths.tolist(), capacity)


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
