"""roi_gather's Triton kernels, forward and backward. The specification is reference.py; names as there.

Positions of samples decide which cells are read, so they are float32 in torchvision's order of operations with one
rounding each: the launcher turns the contraction to FMA off, division is div_rn, and what may be contracted, the sums
over cells, says tl.fma.

A sampling ratio of 1 or 2 is a constant, SAMPLES: a bin's taps (cells and their shares) are then two a sample and
axis, and are worked out once for all channels that a program holds; dividing by 1 or 2 is exact as a product.
SAMPLES = 0 stands for any other ratio, adaptive ones included: cells are taken four at a time, and a cell's share is
found by searching the samples that touch it.
"""

import triton
import triton.language as tl

from ...triton_common import INDICES, finite_box, load_box

# Triton makes a constant of a 1: of these it would only compile the same once more.
NUMBERS = ["images", "out_h", "out_w", "ratio"]


@triton.jit
def _axis(low, high, bins, ratio):
    """(start, size of a bin, samples a bin and axis as int64: 0 where there are none) of one axis of a box."""
    start = low - 0.5
    bin_size = tl.div_rn((high - 0.5) - start, bins.to(tl.float32))
    fits = tl.abs(bin_size) < float("inf")  # the ends may be so far apart that their distance overflows
    bin_size = tl.where(fits, bin_size, 0.0)
    adaptive = tl.where(bin_size > 0, tl.minimum(tl.ceil(bin_size), 4.611686e18), 0.0).to(tl.int64)
    samples = tl.where(ratio > 0, ratio.to(tl.int64), adaptive)
    return start, bin_size, tl.where(fits, samples, 0)


@triton.jit
def _position(offset, bin_size, samples, sample):
    return offset + tl.div_rn((sample.to(tl.float32) + 0.5) * bin_size, samples.to(tl.float32))


# ---- a few samples, known when compiled ----


@triton.jit
def _sample(offset, bin_size, size, index: tl.constexpr, SAMPLES: tl.constexpr):
    """(cell, the next cell's share, whether it counts) of one of SAMPLES samples; the last cell has no next."""
    at = offset + (index + 0.5) * bin_size * (1.0 / SAMPLES)
    counts = (at >= -1) & (at <= size.to(tl.float32))
    at = tl.minimum(tl.maximum(tl.where(counts, at, 0.0), 0.0), (size - 1).to(tl.float32))
    cell = at.to(tl.int32)
    return cell, at - cell.to(tl.float32), counts


@triton.jit
def _taps(offset, bin_size, size, SAMPLES: tl.constexpr):
    """Four cells and their shares of a bin, equal cells merged: cell0..3, share0..3."""
    a, a_upper, a_counts = _sample(offset, bin_size, size, 0, SAMPLES)
    a0 = tl.where(a_counts, (1 - a_upper) * (1.0 / SAMPLES), 0.0)
    a1 = tl.where(a_counts, a_upper * (1.0 / SAMPLES), 0.0)
    if SAMPLES == 1:
        return a, a + 1, a, a, a0, a1, 0.0, 0.0
    b, b_upper, b_counts = _sample(offset, bin_size, size, 1, SAMPLES)
    b0 = tl.where(b_counts, (1 - b_upper) * (1.0 / SAMPLES), 0.0)
    b1 = tl.where(b_counts, b_upper * (1.0 / SAMPLES), 0.0)
    # Both samples' cells are a, a + 1 and b, b + 1: what they share goes to a's, so that it is read once.
    to_a0 = tl.where(b == a, b0, 0.0) + tl.where(b + 1 == a, b1, 0.0)
    to_a1 = tl.where(b == a, b1, 0.0) + tl.where(b == a + 1, b0, 0.0)
    b0 = tl.where((b == a) | (b == a + 1), 0.0, b0)
    b1 = tl.where((b == a) | (b + 1 == a), 0.0, b1)
    return a, a + 1, b, b + 1, a0 + to_a0, a1 + to_a1, b0, b1


# ---- any number of samples ----


@triton.jit
def _rising(offset, bin_size, samples, i):
    """Position of the i-th sample from below: numbers count backwards in an inverted box."""
    return _position(offset, bin_size, samples, tl.where(bin_size >= 0, i, samples - 1 - i))


@triton.jit
def _first(offset, bin_size, samples, bound, BEYOND: tl.constexpr):
    """How many samples lie below `bound`, or not BEYOND it."""
    low = samples * 0
    high = samples
    while low < high:
        middle = low + (high - low) // 2
        at = _rising(offset, bin_size, samples, middle)
        passes = (at > bound) if BEYOND else (at >= bound)
        low = tl.where(passes, low, middle + 1)
        high = tl.where(passes, middle, high)
    return low


@triton.jit
def _share(offset, bin_size, samples, cell, size):
    """A cell's share of a bin. Samples at one position are visited together: a huge box has a great many.

    A sample in [-1, 0) stands for 0 and one in (size - 1, size] for size - 1: so every sample that touches the cell
    lies in [cell - 1, cell + 1], at the image's border too.
    """
    here = cell * 1.0
    last = (size - 1).to(tl.float32)
    i = _first(offset, bin_size, samples, here - 1, False)
    end = _first(offset, bin_size, samples, here + 1, True)
    total = samples.to(tl.float64) * 0  # in double: 1024 shares added in float32 lose ten eps
    while i < end:
        at = _rising(offset, bin_size, samples, i)
        following = i + 1
        if following < end:
            if _rising(offset, bin_size, samples, following) == at:
                following = _first(offset, bin_size, samples, at, True)
        away = tl.abs(tl.minimum(tl.maximum(at, 0.0), last) - here)
        total += (following - i).to(tl.float64) * tl.maximum(1 - away, 0.0).to(tl.float64)
        i = following
    return (total / tl.maximum(samples, 1).to(tl.float64)).to(tl.float32)


@triton.jit
def _span(offset, bin_size, samples, size):
    """(first cell, end) of what a bin may read."""
    last = (size - 1).to(tl.float32)
    a = _rising(offset, bin_size, samples, samples * 0)
    b = _rising(offset, bin_size, samples, tl.maximum(samples - 1, 0))
    reads = (samples > 0) & (b >= -1) & (a <= size.to(tl.float32))
    first = tl.minimum(tl.maximum(tl.where(reads, a, 0.0), 0.0), last).to(tl.int32)
    end = tl.minimum(tl.maximum(tl.where(reads, b, 0.0), 0.0), last).to(tl.int32) + 2
    return first, tl.where(reads, tl.minimum(end, size), first)


@triton.jit
def _four(offset, bin_size, samples, first, end, size):
    """Four cells from `first` on and their shares, as _taps gives them."""
    a, b, c, d = first, first + 1, first + 2, first + 3
    zero = offset * 0
    share_a, share_b, share_c, share_d = zero, zero, zero, zero
    if a < end:
        share_a = _share(offset, bin_size, samples, a, size)
    if b < end:
        share_b = _share(offset, bin_size, samples, b, size)
    if c < end:
        share_c = _share(offset, bin_size, samples, c, size)
    if d < end:
        share_d = _share(offset, bin_size, samples, d, size)
    return a, b, c, d, share_a, share_b, share_c, share_d


# ---- forward: a program holds a block of channels and goes along one row of a box's bins ----


@triton.jit
def _add(total, tokens, cell, share, channels, inside):
    share = tl.broadcast_to(share, total.shape)  # first: the interpreter spreads a scalar's truth as a number
    read = tl.load(tokens + cell.to(tl.int64) * channels, mask=inside & (share > 0), other=0)
    return tl.fma(read.to(tl.float32), share, total)


@triton.jit
def _add_row(total, tokens, row, share, columns, width, channels, inside, SAMPLES: tl.constexpr):
    """columns: a bin's taps along x, as _taps gives them."""
    x0, x1, x2, x3, u0, u1, u2, u3 = columns
    first = row * width
    total = _add(total, tokens, first + x0, share * u0, channels, inside)
    total = _add(total, tokens, first + x1, share * u1, channels, inside)
    if SAMPLES != 1:
        total = _add(total, tokens, first + x2, share * u2, channels, inside)
        total = _add(total, tokens, first + x3, share * u3, channels, inside)
    return total


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def forward(
    tokens, grids, cu_seqlens, boxes, image_index, output, images, channels, out_h, out_w, ratio,
    SAMPLES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    region = tl.program_id(0) // out_h
    row = tl.program_id(0) % out_h
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    x1, y1, x2, y2 = load_box(boxes, region)
    image = tl.load(image_index + region)
    reads = finite_box(x1, y1, x2, y2) & (image >= 0) & (image < images)
    image = tl.where(reads, image, 0)
    height = tl.load(grids + 2 * image)
    width = tl.load(grids + 2 * image + 1)
    # Where nothing may be read, nothing lies inside a box at -10 either.
    y_start, y_bin, y_samples = _axis(tl.where(reads, y1, -10.0), tl.where(reads, y2, -10.0), out_h, ratio)
    x_start, x_bin, x_samples = _axis(tl.where(reads, x1, -10.0), tl.where(reads, x2, -10.0), out_w, ratio)
    tokens += tl.load(cu_seqlens + image).to(tl.int64) * channels + channel
    output += (tl.program_id(0).to(tl.int64) * out_w) * channels + channel
    y_offset = y_start + row * y_bin
    if SAMPLES > 0:
        fine = (y_samples > 0) & (x_samples > 0)
        r0, r1, r2, r3, v0, v1, v2, v3 = _taps(y_offset, y_bin, height, SAMPLES)
        v0, v1 = tl.where(fine, v0, 0.0), tl.where(fine, v1, 0.0)
        v2, v3 = tl.where(fine, v2, 0.0), tl.where(fine, v3, 0.0)
        for column in range(0, out_w):
            total = tl.zeros((BLOCK_C,), tl.float32)
            x_offset = x_start + column * x_bin
            columns = _taps(x_offset, x_bin, width, SAMPLES)
            total = _add_row(total, tokens, r0, v0, columns, width, channels, inside, SAMPLES)
            total = _add_row(total, tokens, r1, v1, columns, width, channels, inside, SAMPLES)
            if SAMPLES > 1:
                total = _add_row(total, tokens, r2, v2, columns, width, channels, inside, SAMPLES)
                total = _add_row(total, tokens, r3, v3, columns, width, channels, inside, SAMPLES)
            tl.store(output, total.to(output.dtype.element_ty), mask=inside)
            output += channels
    else:
        y_first, y_end = _span(y_offset, y_bin, y_samples, height)
        for column in range(0, out_w):
            total = tl.zeros((BLOCK_C,), tl.float32)
            x_offset = x_start + column * x_bin
            x_first, x_end = _span(x_offset, x_bin, x_samples, width)
            for x in range(x_first, x_end, 4):
                columns = _four(x_offset, x_bin, x_samples, x, x_end, width)
                for y in range(y_first, y_end):
                    v = _share(y_offset, y_bin, y_samples, y, height)
                    total = _add_row(total, tokens, y, v, columns, width, channels, inside, SAMPLES)
            tl.store(output, total.to(output.dtype.element_ty), mask=inside)
            output += channels


# ---- backward: a program holds a block of channels of a tile of tokens and visits its image's regions ----


@triton.jit
def _near(low, high, first_cell, last_cell):
    """Whether a box's samples, rounding included, may touch a cell in [first_cell, last_cell]: a cheap test for the
    many boxes of an image that lie elsewhere. Samples lie between the box's ends less a half."""
    slack = 1e-6 * tl.abs(low) + 1e-6 * tl.abs(high)
    least, most = tl.minimum(low, high) - slack, tl.maximum(low, high) + slack
    return (least <= last_cell.to(tl.float32) + 2) & (most >= first_cell.to(tl.float32) - 1)


@triton.jit
def _bins(start, bin_size, first_cell, last_cell, bins, size):
    """(first bin, end) of the bins that may read a cell in [first_cell, last_cell]; a few too many do no harm.

    Solved for the bin in float32; the slack is what positions of samples are off by.
    """
    slack = 1e-6 * (tl.abs(start) + tl.abs(bin_size) * bins.to(tl.float32) + size.to(tl.float32))
    below = first_cell.to(tl.float32) - 1 - slack - start
    above = last_cell.to(tl.float32) + 1 + slack - start
    divisor = tl.where(bin_size == 0, 1.0, bin_size)
    a, b = below / divisor, above / divisor
    most = (bins - 1).to(tl.float32)
    low, high = tl.minimum(a, b), tl.maximum(a, b)
    first = tl.floor(tl.minimum(tl.maximum(low, 0.0), most + 1)).to(tl.int32)
    end = tl.floor(tl.minimum(tl.maximum(high, -1.0), most)).to(tl.int32) + 1
    touches = (below <= 0) & (above >= 0)
    return tl.where(bin_size == 0, 0, first), tl.where(bin_size == 0, tl.where(touches, bins, 0), end)


@triton.jit
def _shares(offset, bin_size, samples, cells, size, SAMPLES: tl.constexpr):
    """Shares of a bin that a few cells have, for SAMPLES known when compiled: float32 in the cells' shape."""
    here = cells.to(tl.float32)
    last = (size - 1).to(tl.float32)
    total = tl.zeros_like(here)
    for sample in tl.static_range(SAMPLES):
        at = offset + (sample + 0.5) * bin_size * (1.0 / SAMPLES)
        counts = (at >= -1) & (at <= size.to(tl.float32)) & (samples > 0)
        away = tl.abs(tl.minimum(tl.maximum(at, 0.0), last) - here)
        total += tl.where(counts, tl.maximum(1 - away, 0.0), 0.0)
    return total * (1.0 / SAMPLES)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def backward(
    grad, tile_image, tile_token, region_first, regions, grids, cu_seqlens, boxes, grad_tokens, channels,
    out_h, out_w, ratio, SAMPLES: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tl.static_assert(SAMPLES > 0 or TILE == 1, "the search for a cell's share takes one cell")
    image = tl.load(tile_image + tl.program_id(0))
    if image < 0:
        return
    # [1, BLOCK_C], so that a bin's gradient is read in the layout in which it is added to a tile's.
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = channel < channels
    height = tl.load(grids + 2 * image)
    width = tl.load(grids + 2 * image + 1)
    start = tl.load(cu_seqlens + image)
    token = tl.load(tile_token + tl.program_id(0))
    last = tl.minimum(token + TILE, tl.load(cu_seqlens + image + 1)) - 1
    y_low, y_high = (token - start) // width, (last - start) // width
    x_low = tl.where(y_low == y_high, (token - start) % width, 0)
    x_high = tl.where(y_low == y_high, (last - start) % width, width - 1)
    cell = token - start + tl.arange(0, TILE)
    y = cell // width
    x = cell % width
    total = tl.zeros((TILE, BLOCK_C), tl.float32)
    for n in range(tl.load(region_first + image), tl.load(region_first + image + 1)):
        region = tl.load(regions + n)
        x1, y1, x2, y2 = load_box(boxes, region)
        if finite_box(x1, y1, x2, y2) & _near(y1, y2, y_low, y_high) & _near(x1, x2, x_low, x_high):
            y_start, y_bin, y_samples = _axis(y1, y2, out_h, ratio)
            x_start, x_bin, x_samples = _axis(x1, x2, out_w, ratio)
            y_first, y_end = _bins(y_start, y_bin, y_low, y_high, out_h, height)
            x_first, x_end = _bins(x_start, x_bin, x_low, x_high, out_w, width)
            for row in range(y_first, y_end):
                y_offset = y_start + row * y_bin
                if SAMPLES > 0:
                    v = _shares(y_offset, y_bin, y_samples, y, height, SAMPLES)
                else:
                    v = tl.zeros((TILE,), tl.float32) + _share(y_offset, y_bin, y_samples, y_low, height)
                first = (region.to(tl.int64) * out_h + row) * out_w
                for column in range(x_first, x_end):
                    x_offset = x_start + column * x_bin
                    if SAMPLES > 0:
                        share = v * _shares(x_offset, x_bin, x_samples, x, width, SAMPLES)
                    else:
                        share = v * _share(x_offset, x_bin, x_samples, x_low, width)
                    reads = inside & (tl.broadcast_to(tl.max(share, 0), inside.shape) > 0)
                    read = tl.load(grad + (first + column) * channels + channel, mask=reads, other=0).to(tl.float32)
                    read = tl.broadcast_to(read, total.shape)
                    share = tl.broadcast_to(share[:, None], total.shape)
                    total = tl.where(share > 0, tl.fma(share, read, total), total)
    rows = (token + tl.arange(0, TILE)).to(tl.int64)
    kept = (rows <= last)[:, None] & inside
    grad_tokens += rows[:, None] * channels + channel
    tl.store(grad_tokens, total.to(grad_tokens.dtype.element_ty), mask=kept)
