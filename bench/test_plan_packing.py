"""plan_packing on a million lengths, beside its specification in Python: a second is what planning may take."""

import math

import numpy as np
import pytest

from granvit_kernels import plan_packing
from granvit_kernels.ops.patch_packing.planning import best_fit_decreasing

CAPACITY, COUNT = 8192, 1_000_000


def lengths_of(kind: str) -> list[int]:
    rng = np.random.default_rng(0)
    if kind == "log-normal":  # as an image's tokens with its questions
        return np.clip(rng.lognormal(6.3, 0.7, COUNT), 16, CAPACITY).astype(int).tolist()
    return rng.integers(1, CAPACITY + 1, COUNT).tolist()


@pytest.mark.parametrize("kind", ["log-normal", "uniform"])
def test_plan_packing(compare, kind):
    lengths = lengths_of(kind)
    plan = plan_packing(lengths, CAPACITY)
    assert len(plan) <= math.ceil(sum(lengths) / CAPACITY) * 1.01 + 1
    assert plan == best_fit_decreasing(lengths, CAPACITY)
    workload = f"1,000,000 {kind} lengths, capacity {CAPACITY}: {len(plan)} lists"
    compare(
        "plan_packing", "list to lists", workload, lambda: plan_packing(lengths, CAPACITY),
        {"specification in Python": lambda: lambda: best_fit_decreasing(lengths, CAPACITY)},
        count=COUNT, aims={"granvit": ("per_second", COUNT)}, rounds=3,
    )  # fmt: skip
