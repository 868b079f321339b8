"""How far processes read ahead of the one that trains, in bytes."""

from __future__ import annotations

import multiprocessing
import time


class Backlog:
    """Bytes that each of some processes has handed over, and that the one they work for has not taken yet.

    A process waits before its own would be more than its share of `limit`: photographs lie in shared memory whole, and
    several batches of them would fill it. One of which nothing is left never waits, since what is taken next may be its
    own: so `limit` can be exceeded by one piece a process. Made by the taker, and inherited by the processes.
    """

    def __init__(self, processes: int, limit: int) -> None:
        self._share = limit // max(processes, 1)
        self._taken = multiprocessing.RawArray("q", processes)  # written by the taker alone
        self._handed = 0  # of this process's own

    def hand(self, process: int, size: int) -> None:
        """Wait for room for `size` more bytes of this process's, and count them."""
        while (left := self._handed - self._taken[process]) > 0 and left + size > self._share:
            time.sleep(0.005)
        self._handed += size

    def take(self, process: int, size: int) -> None:
        """Count bytes of a process's as taken."""
        self._taken[process] += size

    def release(self) -> None:
        """Let all processes go on: nothing will be taken any more."""
        self._taken[:] = [2**62] * len(self._taken)
