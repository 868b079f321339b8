"""Memory between two pages that nobody may touch: an access that leaves a tensor for one of them ends the process.

For compiled code. An aligned read of 16 bytes that begins inside a tensor stays within its page, here and on a GPU.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import traceback
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

PROT_NONE = 0


def guarded(shape: Sequence[int], dtype: torch.dtype, at_end: bool) -> Tensor:
    """A contiguous tensor of bytes 255 (NaN, or -1), right before the page behind it or right after the one before."""
    count = math.prod(shape) * dtype.itemsize
    room = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, room + 2 * mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (0, mmap.PAGESIZE + room):
        address = ctypes.c_void_p(memory.ctypes.data + guard)
        if libc.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = mmap.PAGESIZE + (room - count if at_end else 0)
    return torch.from_numpy(memory)[start : start + count].fill_(255).view(dtype).view(*shape)


def exit_code(function: Callable[[], None]) -> int:
    """How a child process ends that calls `function`: 0, 1 where it raises (with its traceback), -SIGSEGV, ..."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        torch.set_num_threads(1)  # OpenMP's threads stay behind at a fork, and a parallel loop would wait for them
        function()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
