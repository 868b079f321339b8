"""Where the samples of roi_gather's Triton kernels lie along an axis, and what they read. The specification is
reference.py; names as there.

Positions of samples decide which cells are read, so they are float32 in torchvision's order of operations with one
rounding each: the launcher turns the contraction to FMA off, and division is div_rn. All functions take scalars or
tensors, which they treat number by number.
"""

import triton
import triton.language as tl

from ...triton_common import finite_box, load_box


@triton.jit
def box_to_read(boxes, region, wanted):
    """x1, y1, x2, y2 of a box that is wanted and finite; else of one that lies outside of every image."""
    x1, y1, x2, y2 = load_box(boxes, region)
    reads = finite_box(x1, y1, x2, y2) & wanted
    x1, y1 = tl.where(reads, x1, -10.0), tl.where(reads, y1, -10.0)
    return x1, y1, tl.where(reads, x2, -10.0), tl.where(reads, y2, -10.0)


@triton.jit
def box_axis(low, high, bins, ratio):
    """(start, size of a bin, samples a bin and axis as int64: 0 where there are none) of one axis of a box."""
    start = low - 0.5
    bin_size = tl.div_rn((high - 0.5) - start, bins.to(tl.float32))
    fits = tl.abs(bin_size) < float("inf")  # the ends may be so far apart that their distance overflows
    bin_size = tl.where(fits, bin_size, 0.0)
    adaptive = tl.where(bin_size > 0, tl.minimum(tl.ceil(bin_size), 4.611686e18), 0.0).to(tl.int64)
    samples = tl.where(ratio > 0, ratio.to(tl.int64), adaptive)
    return start, bin_size, tl.where(fits, samples, 0)


# ---- a few samples, known when compiled: dividing by 1 or 2 is exact as a product ----

NOWHERE = tl.constexpr(-1e9)
"""The place of a sample that reads nothing: far from every cell, also from those that a tile has left of its image."""


@triton.jit
def sample_place(offset, bin_size, size, index: tl.constexpr, SAMPLES: tl.constexpr):
    """Where one of SAMPLES samples of a bin reads, in [0, size - 1]; NOWHERE where it lies outside the image."""
    at = offset + (index + 0.5) * bin_size * (1.0 / SAMPLES)
    counts = (at >= -1) & (at <= size.to(tl.float32))
    return tl.where(counts, tl.minimum(tl.maximum(at, 0.0), (size - 1).to(tl.float32)), NOWHERE)


@triton.jit
def cell_share(place, cell):
    """A cell's share of a sample."""
    return tl.maximum(1 - tl.abs(place - cell.to(tl.float32)), 0.0)


# ---- any number of samples ----


@triton.jit
def _rising(offset, bin_size, samples, i):
    """Position of the i-th sample from below: numbers count backwards in an inverted box."""
    sample = tl.where(bin_size >= 0, i, samples - 1 - i)
    return offset + tl.div_rn((sample.to(tl.float32) + 0.5) * bin_size, tl.maximum(samples, 1).to(tl.float32))


@triton.jit
def _any(condition):
    """Whether it holds anywhere."""
    numbers = condition.to(tl.int32)
    for _ in tl.static_range(len(numbers.shape)):
        numbers = tl.max(numbers, 0)
    return numbers > 0


@triton.jit
def _first(offset, bin_size, samples, bound, BEYOND: tl.constexpr):
    """How many samples lie below `bound`, or not BEYOND it."""
    low = (samples + bound.to(tl.int64)) * 0
    high = low + samples
    while _any(low < high):
        middle = low + (high - low) // 2
        at = _rising(offset, bin_size, samples, middle)
        passes = (at > bound) if BEYOND else (at >= bound)
        low, high = tl.where(passes | (low >= high), low, middle + 1), tl.where(passes, middle, high)
    return low


@triton.jit
def bin_span(offset, bin_size, samples, size):
    """(first cell, end) of what a bin may read; none where they are equal."""
    last = (size - 1).to(tl.float32)
    a = _rising(offset, bin_size, samples, samples * 0)
    b = _rising(offset, bin_size, samples, tl.maximum(samples - 1, 0))
    reads = (samples > 0) & (b >= -1) & (a <= size.to(tl.float32))
    first = tl.minimum(tl.maximum(tl.where(reads, a, 0.0), 0.0), last).to(tl.int32)
    end = tl.minimum(tl.maximum(tl.where(reads, b, 0.0), 0.0), last).to(tl.int32) + 2
    return first, tl.where(reads, tl.minimum(end, size), first)


@triton.jit
def bin_share(offset, bin_size, samples, cell, size):
    """A cell's share of a bin. Samples at one position are visited together: a huge box has a great many.

    A sample in [-1, 0) stands for 0 and one in (size - 1, size] for size - 1: so every sample that touches the cell
    lies in [cell - 1, cell + 1], at the image's border too.
    """
    here = cell.to(tl.float32) + offset * 0  # of the shape of both
    last = (size - 1).to(tl.float32)
    i = _first(offset, bin_size, samples, here - 1, False)
    end = _first(offset, bin_size, samples, here + 1, True)
    total = i.to(tl.float64) * 0  # in double: 1024 shares added in float32 lose ten eps
    while _any(i < end):
        at = _rising(offset, bin_size, samples, i)
        following = i + 1
        repeats = (following < end) & (_rising(offset, bin_size, samples, following) == at)
        if _any(repeats):
            following = tl.where(repeats, _first(offset, bin_size, samples, at, True), following)
        away = tl.abs(tl.minimum(tl.maximum(at, 0.0), last) - here)
        share = (following - i).to(tl.float64) * tl.maximum(1 - away, 0.0).to(tl.float64)
        total += tl.where(i < end, share, 0.0)
        i = tl.where(i < end, following, i)
    return (total / tl.maximum(samples, 1).to(tl.float64)).to(tl.float32)
