"""Vectors of channels, as roi_gather's kernels hold them: tuples of tensors, each BLOCK_C channels long.

A tensor's sides are powers of two: 768 and 1152 channels would idle a quarter or a tenth of the lanes in whole ones,
and three of 128 hold a half of the one and a third of the other.
"""

import triton
import triton.language as tl

LANES = tl.constexpr(32)
"""Of a warp: numbers that are worked out together, one a lane, and then used one by one (of_lane)."""


@triton.jit
def inside_parts(channel, channels, WHOLE: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which of the channels exist; WHOLE: all do. channel [BLOCK_C]: those of the first part."""
    inside = ()
    for part in tl.static_range(PARTS):
        inside = inside + ((channel + part * BLOCK_C < channels) | WHOLE,)
    return inside


@triton.jit
def zero_parts(PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(PARTS):
        zeros = zeros + (tl.zeros((BLOCK_C,), tl.float32),)
    return zeros


@triton.jit
def load_parts(pointer, inside, BLOCK_C: tl.constexpr):
    """What stands at `pointer` [BLOCK_C] and at the parts after it; anything where that is not inside."""
    values = ()
    for part in tl.static_range(len(inside)):
        values = values + (tl.load(pointer + part * BLOCK_C, mask=inside[part]),)
    return values


@triton.jit
def store_parts(pointer, values, inside, wanted, BLOCK_C: tl.constexpr):
    """values to `pointer` [BLOCK_C] and the places after it, where they are inside, if that is wanted at all."""
    for part in tl.static_range(len(inside)):
        tl.store(pointer + part * BLOCK_C, values[part].to(pointer.dtype.element_ty), mask=inside[part] & wanted)


@triton.jit
def add_parts(total, share, values):
    """total + share * values; the share is a number."""
    sums = ()
    for part in tl.static_range(len(total)):
        weight = tl.broadcast_to(share, total[part].shape)
        sums = sums + (tl.fma(values[part].to(tl.float32), weight, total[part]),)
    return sums


@triton.jit
def add_parts_if_read(total, share, values):
    """add_parts where the share is positive, else the total: what isn't finite stays with those that read it."""
    sums, added = (), add_parts(total, share, values)
    for part in tl.static_range(len(total)):
        sums = sums + (tl.where(tl.broadcast_to(share, total[part].shape) > 0, added[part], total[part]),)
    return sums


@triton.jit
def of_lane(values, number, chosen):
    """The value whose number is the chosen one; others of that number are 0. An integer sum over a warp's lanes is one
    instruction."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.sum(tl.where(number == chosen, bits, 0)).to(values.dtype, bitcast=True)


@triton.jit
def weighted_sum(pointer, step, shares, number, first, end, inside, PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The vectors of numbers first to end, times their shares. pointer: to the first; step: to the next; shares: of the
    lanes that hold these numbers."""
    total = zero_parts(PARTS, BLOCK_C)
    for this in range(first, end):
        total = add_parts_if_read(total, of_lane(shares, number, this), load_parts(pointer, inside, BLOCK_C))
        pointer += step
    return total
