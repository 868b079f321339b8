"""How long a function keeps the GPU busy, and the host. GRANVIT_BENCH_DEVICE=cpu is a dry run: a wall clock stands in.

Every call starts from an L2 without its data: a buffer larger than it is read between any two (a written one would
leave lines that the timed call has to write back). The device sleeps until the host has issued the call, so that what
CUDA events time is the device's work.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from comparison import WallClock
from torch import Tensor

DEVICE = os.environ.get("GRANVIT_BENCH_DEVICE", "cuda")
DRY = DEVICE == "cpu"
L2 = 2**16 if DRY else 2**28
LONGEST_SLEEP = 0.05
"""Seconds: a peer that waits for the device within its call is not waited for longer."""


def timed_on_device(run: Callable[[], Any]) -> float:
    """Seconds between two events around what `run` issues."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@cache
def cycles_per_second() -> float:
    torch.cuda._sleep(10**6)
    return 10**7 / timed_on_device(lambda: torch.cuda._sleep(10**7))


@cache
def flushing() -> Tensor:
    return torch.zeros(L2 // 4, device=DEVICE)


class DeviceClock(WallClock):
    """Times what a function has the device do; `host` is how long it keeps the host, in seconds."""

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__(run)
        self.host = statistics.median(self._host_seconds() for _ in range(3))

    def _host_seconds(self) -> float:
        if not DRY:
            torch.cuda.synchronize()
        return super().seconds()

    def seconds(self) -> float:
        """Of one call, from a cold L2."""
        flushing().sum()
        if DRY:
            return super().seconds()
        torch.cuda._sleep(int(min(2 * self.host, LONGEST_SLEEP) * cycles_per_second()))
        return timed_on_device(self.run)

    def figures(self) -> dict[str, float]:
        return {"host_us": 1e6 * self.host}


@cache
def bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.zeros(2**20 if DRY else 2**31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    clock = DeviceClock(lambda: target.copy_(source))
    return 2 * source.numel() / statistics.median(clock.seconds() for _ in range(15))


def replay(make: Callable) -> Callable:
    """The call that make() gives as a CUDA graph. Made on the stream of the capture: autograd runs a backward on the
    stream of its forward, and one of another stream can't be captured."""
    if DRY:
        return make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run = make()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = run()

    def again(keep: Callable = run) -> Any:  # the graph has the addresses of what `run` holds
        graph.replay()
        return output

    return again
