"""plan_packing: its promises, and the C++ against the specification in Python."""

import gc
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from granvit_kernels import backends, native, plan_packing
from granvit_kernels.ops.patch_packing.planning import best_fit_decreasing, cpu, reference


@st.composite
def problems(draw):
    capacity = draw(st.integers(1, 12) | st.integers(1, 5000) | st.sampled_from([2**31, 2**62]))
    length = st.integers(0, capacity) | st.integers(0, max(1, capacity // 8)) | st.just(capacity)
    return draw(st.lists(length, max_size=120)), capacity


@settings(max_examples=300, deadline=None)
@given(problems())
def test_promises_and_specification(problem):
    lengths, capacity = problem
    plan = plan_packing(lengths, capacity)
    assert sorted(i for row in plan for i in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= capacity for row in plan)
    assert all(type(i) is int for row in plan for i in row)
    assert plan == best_fit_decreasing(lengths, capacity)


def test_the_fullest_list_that_has_room_gets_a_sequence():
    assert plan_packing([3, 5, 2, 8, 1], 8) == [[3], [1, 0], [2, 4]]
    assert plan_packing([6, 5, 3, 2], 9) == [[0, 2], [1, 3]]
    assert plan_packing([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]
    assert plan_packing([0, 7, 0], 7) == [[1, 0, 2]]
    assert plan_packing([0, 0], 1) == [[0, 1]]
    assert plan_packing([], 5) == []


def test_among_equal_lists_the_last_to_get_its_room():
    assert plan_packing([6, 6, 4], 10) == [[0], [1, 2]]
    assert plan_packing([6, 6, 4, 3], 10) == [[0, 3], [1, 2]]


def mixed(kind, count, capacity):
    rng = random.Random(f"{kind} {count}")
    if kind == "images":  # tokens of an image and its questions: skewed, some near the capacity
        return [min(capacity, int(rng.lognormvariate(5.5, 0.8)) + 16) for _ in range(count)]
    if kind == "uniform":
        return [rng.randint(1, capacity) for _ in range(count)]
    return [rng.choice([64, 96, 128, 196, 256, 400, 576, 1024, 1500]) for _ in range(count)]


def fewest(lengths, capacity):
    """Number of lists in the best plan: every way to place one sequence after the other."""
    best = len(lengths)

    def place(i, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if i == len(lengths):
            best = len(rooms)
            return
        for k, room in enumerate(rooms):
            if lengths[i] <= room:
                place(i + 1, [*rooms[:k], room - lengths[i], *rooms[k + 1 :]])
        place(i + 1, [*rooms, capacity - lengths[i]])

    place(0, [])
    return best


@pytest.mark.parametrize("kind", ["images", "uniform", "few sizes"])
@pytest.mark.parametrize("count", [10, 1000, 100_000])
def test_mixed_lengths_need_few_lists(kind, count):
    lengths = mixed(kind, count, 2048)
    plan = plan_packing(lengths, 2048)
    if count == 10:  # so few that the best plan can be found by trying all
        assert len(plan) == fewest(lengths, 2048)
        return
    assert len(plan) <= math.ceil(sum(lengths) / 2048) * 1.01 + 1


@pytest.mark.parametrize("kind", ["images", "uniform", "few sizes"])
def test_many_lengths_follow_the_specification(kind):
    lengths = mixed(kind, 20_000, 2048)
    assert plan_packing(lengths, 2048) == best_fit_decreasing(lengths, 2048)


@pytest.mark.parametrize("enabled", [True, False])
def test_leaves_the_garbage_collector_as_it_was(enabled):
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        plan_packing([1, 2, 3], 4)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_runs_without_the_native_library(monkeypatch):
    lengths = mixed("images", 500, 2048)
    expected = plan_packing(lengths, 2048)
    monkeypatch.setattr(native, "why_not", lambda: "it is not built")
    monkeypatch.setattr(native, "library", None)
    backends._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="slow reference: cpu: it is not built"):
        assert plan_packing(lengths, 2048) == expected


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_the_variable_forces_a_backend(name, monkeypatch):
    for module in (cpu, reference):
        monkeypatch.setattr(module, "forward", lambda lengths, capacity, module=module: module)
    monkeypatch.setenv(backends.VARIABLE, f"plan_packing={name}")
    assert plan_packing([1, 2], 3) is {"cpu": cpu, "reference": reference}[name]
    monkeypatch.setenv(backends.VARIABLE, "plan_packing=cuda")
    with pytest.raises(RuntimeError, match="forces cuda, and plan_packing has only cpu, reference"):
        plan_packing([1, 2], 3)
    monkeypatch.setenv(backends.VARIABLE, "cuda")  # for all operators: those on a device are meant
    assert plan_packing([1, 2], 3) is cpu


@pytest.mark.parametrize(
    "kind", [np.array, torch.tensor, tuple, lambda x: np.array(x, dtype=np.int16)[::-1][::-1]]
)
def test_lengths_come_in_any_form(kind):
    lengths = [9, 2, 7, 5, 5, 1]
    assert plan_packing(kind(lengths), np.int64(10)) == best_fit_decreasing(lengths, 10)


@pytest.mark.parametrize(
    "lengths, capacity, message",
    [
        ([3, 9, 11], 8, r"lengths\[1\] is 9, over the capacity; it takes 0..8"),
        ([3, -1], 8, r"lengths\[1\] is -1, negative; it takes 0..8"),
        ([1.5], 8, r"lengths is float64 \[1\]; it takes whole numbers \[N\]"),
        ([[1, 2]], 8, r"lengths is int64 \[1, 2\]; it takes whole numbers \[N\]"),
        (["a"], 8, r"lengths is <U1 \[1\]; it takes whole numbers"),
        ([2**70], 8, r"lengths is object \[1\]; it takes whole numbers"),
        ([2**63], 8, r"lengths\[0\] is 9223372036854775808, over the capacity; it takes 0..8"),
        ([[1, 2], [3]], 8, r"lengths is \[\[1, 2\], \[3\]\]; it takes whole numbers \[N\]"),
        (torch.ones(2, device="meta"), 8, r"lengths is float32 \[2\]; it takes whole numbers \[N\], on the host"),
        ([1], 2**63, r"capacity is 9223372036854775808; it takes a whole number >= 1 and <= 9223372036854775807"),
        ([True], 8, r"lengths is bool \[1\]; it takes whole numbers"),
        ([1], 0, r"capacity is 0; it takes a whole number >= 1"),
        ([1], 8.0, r"capacity is 8.0; it takes a whole number >= 1"),
        ([], None, r"capacity is None; it takes a whole number >= 1"),
    ],
)
def test_bad_arguments_are_named(lengths, capacity, message):
    with pytest.raises(ValueError, match=message):
        plan_packing(lengths, capacity)
