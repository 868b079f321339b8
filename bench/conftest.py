"""Times an operator beside its peers, and keeps what was measured.

`pytest bench` runs all of it. Providers alternate within one run, so that what else the machine does meets
all of them; figures are ratios of medians. malloc keeps freed memory, as a training run does: else the page
faults of a fresh output would be timed with the work, for every provider.
"""

from __future__ import annotations

import ctypes
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from granvit.machine import commit, device_name
from granvit_kernels import native

BENCH = Path(__file__).resolve().parent
THREADS = 2

sys.path.insert(0, str(BENCH))  # bench/*.py import one another


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
    once; the rows go to bench/results/DEVICE-OPERATOR.json, in place of older rows of the same provider, mode,
    workload, device and torch.
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
        common = {"operator": operator, "mode": mode, "workload": workload, **machine(), **figures}
        save(
            [
                {
                    **common,
                    "provider": name,
                    "median": medians[name],
                    "quantiles": np.quantile(seconds[name], [0.1, 0.9]).tolist(),
                    "ratio": ratios[name],
                }
                for name in providers
            ]
        )
        benchmark.extra_info["ratios"] = ratios
        return ratios

    return compare


def machine() -> dict:
    """What a timing depends on besides the code, and which code it was."""
    isa = native.library().isa() if native.why_not() is None else "no native library"
    return {
        "device": f"{device_name()}, {isa}, {THREADS} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
    }


def save(rows: list[dict]) -> None:
    """Adds rows to their operator's result file; times in seconds, ratio of a provider's median to ours."""
    path = BENCH / "results" / f"cpu-{rows[0]['operator']}.json"
    path.parent.mkdir(exist_ok=True)

    def key(row: dict) -> tuple:
        return row["mode"], row["workload"], row["provider"], row["device"], row["versions"]["torch"]

    old = json.loads(path.read_text()) if path.exists() else []
    new = {key(row) for row in rows}
    kept = [row for row in old if key(row) not in new]
    lines = ",\n".join(json.dumps(row) for row in kept + rows)
    path.write_text(f"[\n{lines}\n]\n")
