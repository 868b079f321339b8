"""Times an operator beside its peers, and keeps what was measured.

`pytest bench` runs all of it. Providers alternate within one run, so that what else the machine does meets
all of them; figures are ratios of medians. malloc keeps freed memory, as a training run does: else the page
faults of a fresh output would be timed with the work, for every provider.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from granvit.machine import device_name
from granvit_kernels import native

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/*.py import one another
from rows import Rows, provenance, results_folder  # noqa: E402

THREADS = 2
KEY = ("mode", "workload", "provider", "device")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


@pytest.fixture
def compare(benchmark) -> Callable[..., dict[str, float]]:
    """compare(operator, mode, workload, providers, rounds=15, **figures) -> {provider: its median over ours}.

    providers: {name: function without arguments}, ours first. figures: kept in each row. Each round calls every one
    once; the rows go to cpu-OPERATOR.json among the results (rows.py), in place of older ones of equal KEY; times in
    seconds.
    """

    def compare(
        operator: str, mode: str, workload: str, providers: dict[str, Callable], rounds: int = 15, **figures: float
    ) -> dict[str, float]:
        ours, *peers = providers
        seconds: dict[str, list[float]] = {name: [] for name in providers}
        for run in providers.values():
            run()

        def time_peers() -> None:
            for name in peers:
                start = time.perf_counter()
                providers[name]()
                seconds[name].append(time.perf_counter() - start)

        benchmark.pedantic(providers[ours], setup=time_peers, rounds=rounds, iterations=1)
        seconds[ours] = benchmark.stats.stats.data
        medians = {name: float(np.median(times)) for name, times in seconds.items()}
        ratios = {name: median / medians[ours] for name, median in medians.items()}
        common = {"operator": operator, "mode": mode, "workload": workload, **provenance(device()), **figures}
        rows = [
            {
                **common,
                "provider": name,
                "median": medians[name],
                "quantiles": np.quantile(seconds[name], [0.1, 0.9]).tolist(),
                "ratio": ratios[name],
            }
            for name in providers
        ]
        Rows(results_folder() / f"cpu-{operator}.json", KEY).save(*rows)
        benchmark.extra_info["ratios"] = ratios
        return ratios

    return compare


def device() -> str:
    """What a timing depends on besides the code and its versions."""
    isa = native.library().isa() if native.why_not() is None else "no native library"
    return f"{device_name()}, {isa}, {THREADS} threads"
