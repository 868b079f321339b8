"""What the benchmarks on a CPU share. `pytest bench --benchmark-only` runs all of them.

malloc keeps freed memory, as a training run does: else the page faults of a fresh output would be timed with the work,
for every provider.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from granvit.machine import device_name
from granvit_kernels import native

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/*.py import one another

THREADS = 2
KEY = ("mode", "workload", "provider", "device")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


@pytest.fixture
def compare(benchmark) -> Callable[..., None]:
    """compare(operator, mode, workload, ours, peers={}, check=None, aims={}, count=None, nbytes=None, rounds=15,
    **figures)

    ours: a function of nothing; peers: {name: make}, make() giving such a function; the rest as in comparison.compare.
    count: things that a call deals with; rows then have "per_second" of them. nbytes: what a call must read and write;
    rows then have "bandwidth_share", how much of what a large copy reaches in the same run. figures: kept in each row.
    Rows go to cpu-OPERATOR.json among the results (rows.py), in place of older ones of equal KEY.
    """
    from comparison import compare
    from cpu_bandwidth import copy_bytes_per_second
    from rows import Rows, provenance, results_folder

    def compare_on_cpu(operator, mode, workload, ours, peers=None, *, count=None, nbytes=None, aims=None, check=None,
                       rounds=15, **figures) -> None:  # fmt: skip
        def derived(median: float) -> dict[str, float]:
            made = {} if count is None else {"per_second": count / median}
            if nbytes is not None:
                made["bandwidth_share"] = nbytes / median / copy_bytes_per_second(THREADS)
            return made

        compare(
            benchmark,
            Rows(results_folder() / f"cpu-{operator}.json", KEY),
            {"operator": operator, "mode": mode, "workload": workload, **provenance(device()), **figures},
            {"granvit": lambda: ours},
            peers or {},
            check=check,
            aims=aims,
            derived=derived,
            rounds=rounds,
        )

    return compare_on_cpu


def device() -> str:
    """What a timing depends on besides the code and its versions."""
    isa = native.library().isa() if native.why_not() is None else "no native library"
    return f"{device_name()}, {isa}, {THREADS} threads"
