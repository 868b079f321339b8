"""Weights that stay in the files they are read from, for who takes them from there piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_MAPPED = ContextVar("mapped", default=False)


@contextmanager
def mapped() -> Iterator[None]:
    """Inside, models are loaded without memory of their own: their weights are the files', of which the system holds
    one copy for all processes, and in their dtype. They hold only while the files do: copy them soon."""
    token = _MAPPED.set(True)
    try:
        yield
    finally:
        _MAPPED.reset(token)


def is_mapped() -> bool:
    """Whether this is inside `mapped`."""
    return _MAPPED.get()


def own(tensor: Tensor) -> Tensor:
    """A tensor that was read from a file, in memory of its own, but as it is inside `mapped`."""
    return tensor if is_mapped() else tensor.clone()
