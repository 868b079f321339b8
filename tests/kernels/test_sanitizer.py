"""The sanitizer (tests/helpers/sanitizer.py) sees each kind of fault, planted here. That the operators' kernels have
none is held where they run in the interpreter: test_triton_*.py."""

import os
import re

import pytest
import torch
from torch.utils import deterministic

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from sanitizer import Fault, Sanitizer, sanitized  # noqa: E402
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from granvit_kernels import PackedLayout  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not set"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]


def fails(message, function, *args, **kwargs):
    with pytest.raises(Fault, match=f"^{re.escape(message)}"):
        sanitized(function, *args, **kwargs)


# ---- bounds, and what stays unwritten ----


@triton.jit
def copy(source, target, begin, end, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Program i copies BLOCK words from STEP * i on, of those in [begin, end)."""
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    inside = (at >= begin) & (at < end)
    tl.store(target + at, tl.load(source + at, mask=inside), mask=inside)


def copied(source, target=None, begin=0, end=10, programs=3, step=4):
    target = torch.empty(10, dtype=source.dtype) if target is None else target
    copy[(programs,)](source, target, begin, end, STEP=step, BLOCK=4)
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_a_right_kernel_passes(dtype):
    source = torch.arange(10).to(dtype)
    assert torch.equal(sanitized(copied, source), source)
    storage = torch.zeros(30, dtype=dtype)
    sanitized(copied, source, storage[20:])
    assert torch.equal(storage[20:], source) and not storage[:20].any()


def test_accesses_outside_a_storage():
    ten, twelve, numbers = torch.zeros(10), torch.zeros(12), torch.arange(10)
    fails("copy, program (2, 0, 0): reads source [10] outside its storage, at word 10", copied, ten, end=11)
    fails("copy, program (2, 0, 0): writes target [10] outside its storage, at word 10", copied, twelve, end=11)
    far = dict(begin=-(2**31), end=2**31 - 1, programs=2)
    for step in (10**9, -(10**9), -4):
        message = f"copy, program (1, 0, 0): reads source [10] outside its storage, at word {step}"
        fails(message, copied, numbers, step=step, **far)


def test_accesses_outside_a_view_of_a_larger_storage():
    storage, ten = torch.zeros(4, 30), torch.zeros(10)
    middle = storage[1, 10:20]
    fails("copy, program (2, 0, 0): reads source [10] outside the view, at word 10", copied, middle, end=11)
    fails("copy, program (0, 0, 0): writes target [10] outside the view, at word 1", copied, ten, storage[0, ::3])
    fails("copy, program (1, 0, 0): reads source [10] outside the view, at word -1", copied, middle, begin=-1, step=-1)
    fails("copy, program (0, 0, 0): reads source [0] outside its storage, at word 0", copied, ten[:0].clone())


@triton.jit
def between(source, target):
    address = source.to(tl.uint64, bitcast=True) + 2
    tl.store(target, tl.load(address.to(source.dtype, bitcast=True)))


@triton.jit
def nowhere(target):
    tl.store((target.to(tl.uint64, bitcast=True) * 0 + 8).to(target.dtype, bitcast=True), 1.0)


def test_addresses_that_are_no_elements():
    source, target = torch.ones(9)[5:], torch.ones(1)
    fails("between, program (0, 0, 0): reads source [4] between two elements, at word 0", between[(1,)], source, target)
    fails("nowhere, program (0, 0, 0): writes at an address that belongs to no argument", nowhere[(1,)], target)


@pytest.mark.parametrize("poisoned", [False, True])
def test_outputs_that_nobody_wrote(poisoned, monkeypatch):
    """Also where torch fills fresh memory with NaN."""
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", poisoned)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(poisoned)
    try:
        ten = torch.zeros(10)
        message = "an output with 2 of 10 elements that nobody wrote, the first [8], shape [10]: copy's target"
        fails(message, copied, ten, programs=2)
        fails(message, lambda: (ten, [copied(ten, programs=2)]))
        fails("an output with 1 of 4 elements that nobody wrote, the first [1, 1], shape [2, 2]: copy's target",
              lambda: copied(ten, end=9)[6:].view(2, 2))  # fmt: skip
        fails("an output with 3 of 3 elements that nobody wrote, the first [0], shape [3]: no kernel had it",
              torch.empty, 3)  # fmt: skip
        sanitized(lambda: copied(ten, programs=2)[:8])  # scratch
        sanitized(copied, ten, torch.zeros(10), programs=2)
    finally:
        torch.use_deterministic_algorithms(before)


def test_reads_of_what_nobody_wrote():
    scratch = "copy's target"
    fails("copy, program (2, 0, 0): reads source [10] where nobody wrote, at word 8",
          lambda: copied(copied(torch.zeros(10), programs=2)))  # fmt: skip
    fails(f"torch's sum reads 2 of 10 elements that nobody wrote, the first [8], shape [10]: {scratch}",
          lambda: copied(torch.zeros(10), programs=2).sum())  # fmt: skip
    changes = {"mul_": lambda part: part.mul_(2), "masked_fill_": lambda part: part.masked_fill_(torch.ones(10) > 2, 0)}
    for name, change in changes.items():  # or all would count as written from then on
        fails(f"torch's {name} reads 2 of 10", lambda change=change: change(copied(torch.zeros(10), programs=2)))
    fails("torch's cat reads 1 of 10", lambda: torch.cat([torch.ones(1), copied(torch.zeros(10), end=9)]))

    def filled():
        part = copied(torch.zeros(10), programs=2)
        part[8:] = 3
        return copied(part), part.sum(), torch.empty_like(part).copy_(part), torch.empty(5).zero_()

    sanitized(filled)


@triton.jit
def sum_of_eight(source, target, count, OTHER: tl.constexpr):
    lane = tl.arange(0, 8)
    tl.store(target, tl.sum(tl.load(source + lane, mask=lane < count, other=OTHER)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32], ids=str)
def test_lanes_that_a_mask_leaves_out_hold_anything(dtype):
    """On a GPU, without `other`; the interpreter as it comes has zeros there."""
    ones, target = torch.ones(5, dtype=dtype), torch.zeros(1, dtype=dtype)
    sanitized(sum_of_eight[(1,)], ones, target, 5, OTHER=0)
    assert target == 5
    sanitized(sum_of_eight[(1,)], ones, target, 5, OTHER=None)
    assert target != 5


# ---- programs that disturb each other ----


@triton.jit
def shift(data, BLOCK: tl.constexpr):
    """In place: what a program reads, the next one writes."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(data + at, tl.load(data + at + 1))


@triton.jit
def last_writes(data):
    value = tl.load(data)
    if tl.program_id(0) == 2:
        tl.store(data, value)


@triton.jit
def count(total, readings, MODE: tl.constexpr):
    """total[0] += 1, and then something with it."""
    tl.atomic_add(total + tl.arange(0, 2), 1.0, mask=tl.arange(0, 2) < 1)
    if MODE == "swap":
        tl.atomic_cas(total, 3.0, 0.0)
    elif MODE == "read":
        tl.store(readings + tl.program_id(0), tl.load(total))
    elif MODE == "write":
        tl.store(total, 0.0)


@triton.jit
def halve(target):
    tl.store(target + tl.arange(0, 4) // 2, tl.arange(0, 4))


def test_programs_that_disturb_each_other():
    ten, eight = torch.zeros(10), torch.zeros(9)[:8]
    fails("copy, program (1, 0, 0): writes target [10] which program (0, 0, 0) writes too, at word 3",
          copied, ten, step=3)  # fmt: skip
    fails("shift, program (0, 1, 0): writes data [9] which program (0, 0, 0) reads too, at word 4",
          shift[(1, 2)], torch.zeros(9), BLOCK=4)  # fmt: skip
    fails("last_writes, program (2, 0, 0): writes data [1] which more than one program reads too, at word 0",
          last_writes[(3,)], torch.zeros(1))  # fmt: skip
    storage = torch.zeros(20)
    fails("copy, program (1, 0, 0): reads source [10] which program (0, 0, 0) writes too, at word 4",
          copied, storage[:10], storage[4:14])  # fmt: skip
    sanitized(copied, storage[:10], storage[10:])
    sanitized(copied, ten, ten)  # in place, each its own
    sanitized(lambda: (copied(ten, eight, end=8), copied(eight, ten, end=8)))  # one launch after another


def test_atomics():
    total, readings = torch.zeros(2), torch.zeros(3)
    for mode in ("swap", ""):
        sanitized(count[(3,)], total, readings, MODE=mode)
    assert total.tolist() == [3.0, 0.0]
    fails("count, program (1, 0, 0): updates total [2] which program (0, 0, 0) writes too, at word 0",
          count[(2,)], total, readings, MODE="write")  # fmt: skip
    fails("count, program (1, 0, 0): updates total [2] which program (0, 0, 0) reads too, at word 0",
          count[(2,)], total, readings, MODE="read")  # fmt: skip
    fails("count, program (0, 0, 0): updates total [2] where nobody wrote, at word 0",
          lambda: count[(1,)](torch.empty(2), readings, MODE=""))  # fmt: skip
    fails("count, program (0, 0, 0): updates total [0] outside its storage",
          count[(1,)], torch.empty(0), readings, MODE="")  # fmt: skip


def test_a_store_that_writes_a_word_twice():
    fails("halve, program (0, 0, 0): writes target [4] twice at one word", halve[(1,)], torch.zeros(4))


# ---- promises ----


@triton.jit
def promise(source, target, start, KIND: tl.constexpr, VALUE: tl.constexpr, STEP: tl.constexpr):
    at = start + tl.arange(0, 8) * STEP
    if KIND == "multiple":
        at = tl.multiple_of(at, VALUE)
    elif KIND == "contiguous":
        at = tl.max_contiguous(at, VALUE)
    elif KIND == "constant":
        at = tl.max_constancy(start + tl.arange(0, 8) // STEP, VALUE)
    elif KIND == "both axes":
        rows = start + tl.arange(0, 8)[:, None] * 8 + tl.arange(0, 8)[None, :] // STEP * STEP
        at = tl.sum(tl.max(tl.multiple_of(rows, (1, VALUE)), 1)) * 0 + tl.arange(0, 8)
    elif KIND == "assume":
        tl.assume(start % VALUE == 0)
    pointers = source + at
    if KIND == "pointers":
        pointers = tl.multiple_of(pointers, VALUE)
    tl.store(target + tl.arange(0, 8), tl.load(pointers))


@pytest.mark.parametrize(
    ("kind", "start", "step", "right", "wrong"),
    [
        ("multiple", 16, 1, 16, 32),  # the first of eight consecutive numbers
        ("multiple", 16, 4, 4, 8),
        ("multiple", 12, 0, 4, 8),
        ("contiguous", 3, 1, 8, None),
        ("contiguous", 3, 2, 1, 2),
        ("constant", 3, 4, 4, 8),
        ("pointers", 4, 1, 16, 32),  # in bytes
        ("pointers", 0, 2, 8, 16),
        ("both axes", 4, 4, 4, 8),
        ("assume", 24, 1, 8, 16),
    ],
)
def test_promises(kind, start, step, right, wrong):
    def call(value):
        target = torch.empty(8)
        storage = torch.zeros(128)
        source = storage[-storage.data_ptr() // 4 % 64 :][:64]  # at a multiple of 256 bytes
        promise[(1,)](source, target, start, KIND=kind, VALUE=value, STEP=step)
        return target

    sanitized(call, right)
    if wrong is not None:
        fails(f"promise, program (0, 0, 0): {'assumes' if kind == 'assume' else 'promises'}", call, wrong)


# ---- how it works ----


@triton.jit
def inner(source, at):
    return tl.load(source + at)


@triton.jit
def outer(sources, target):
    tl.store(target, inner(sources[0], 0) + inner(sources[1], 4))


@triton.jit
def through_descriptor(source, target):
    tl.store(target + tl.arange(0, 4), tl.sum(source.load([0, 0]), 0))


@triton.jit
def as_bytes(data):
    tl.store(data.to(tl.pointer_type(tl.int8), bitcast=True), 1)


def test_arguments_of_other_kinds():
    """Tuples of tensors, functions that a kernel calls, descriptors."""
    four, five = torch.ones(4), torch.ones(5)
    sanitized(outer[(1,)], (four, five), torch.zeros(1))
    fails("outer, program (0, 0, 0): reads sources[1] [4] outside its storage, at word 4",
          outer[(1,)], (five, four), torch.zeros(1))  # fmt: skip
    rows = torch.ones(3, 4)
    for shape in (3, 4):
        call = through_descriptor[(1,)], TensorDescriptor(rows, [shape, 4], [4, 1], [4, 4]), torch.zeros(4)
        if shape == 3:
            sanitized(*call)
        else:
            fails("through_descriptor, program (0, 0, 0): reads source [3, 4] outside its storage, at word 12", *call)
    with pytest.raises(Exception, match="elements of 1 bytes in a storage of 4-byte words"):
        sanitized(as_bytes[(1,)], four)


def test_leaves_the_interpreter_as_it_was():
    classes = GridExecutor, InterpreterBuilder, TensorHandle
    before = [dict(vars(owner)) for owner in classes]
    with Sanitizer():
        assert [dict(vars(owner)) for owner in classes] != before
    assert [dict(vars(owner)) for owner in classes] == before
    fails("copy", copied, torch.zeros(3))
    assert [dict(vars(owner)) for owner in classes] == before


def test_sees_what_a_launcher_gets_wrong(monkeypatch):
    """In the operators' own kernels: too few programs, and a tensor that is one row short."""
    from granvit_kernels.ops.region_attention import triton_launch as attention

    layout = PackedLayout.from_grids([(9, 8)])
    query, key = torch.ones(2, 1, 8), torch.ones(layout.num_tokens, 1, 8)
    place = layout.grids, layout.cu_seqlens, torch.tensor([[0.0, 0.0, 8.0, 9.0]]), torch.tensor([0])
    monkeypatch.setattr(attention, "_splits", lambda *_: 3)
    sanitized(attention.forward, query, key, key, *place, 1.0, False)
    fails("forward_walk, program (0, 2, 0): reads value [71, 1, 8] outside its storage, at word 568",
          attention.forward, query, key, key[:-1].clone(), *place, 1.0, False)  # fmt: skip
    grid = attention._Call.grid
    monkeypatch.setattr(attention._Call, "grid", lambda call, splits: grid(call, min(splits, 2)))
    fails("merge, program (0, 0, 0): reads part_max [3, 1, 2, 1] where nobody wrote, at word 4",
          attention.forward, query, key, key, *place, 1.0, False)  # fmt: skip
