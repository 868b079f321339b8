"""What a copy of large blocks reaches on this machine's cores, beside which rows state their share."""

from __future__ import annotations

import ctypes
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

BYTES = 2**28
"""Of a block: past the size from which memcpy's stores go past the caches, on the machines that we know."""


@cache
def copy_bytes_per_second(threads: int) -> float:
    """Bytes read and written a second by `threads` calls of memcpy at once, each on its own block; median of nine."""
    memcpy = ctypes.CDLL(None).memcpy  # ctypes releases the interpreter's lock during the call
    memcpy.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
    source, target = (torch.ones(threads, BYTES, dtype=torch.uint8) for _ in range(2))
    places = [(there.data_ptr(), here.data_ptr(), BYTES) for there, here in zip(target, source, strict=True)]

    def seconds() -> float:
        start = time.perf_counter()
        list(pool.map(lambda place: memcpy(*place), places))
        return time.perf_counter() - start

    with ThreadPoolExecutor(threads) as pool:
        return 2 * threads * BYTES / statistics.median(seconds() for _ in range(9))
