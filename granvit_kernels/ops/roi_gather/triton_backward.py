"""roi_gather backward. A program sums the gradient of a tile of consecutive tokens, for the channels that it holds,
over the regions that touch it. No atomics: the sums have one order.

A token's weight in a bin is its row's share times its column's, and all tokens of a tile in one row have one share
of it: so a column of bins is summed over its rows first, and that sum is added to the tokens that it touches.
"""

import triton
import triton.language as tl

from ...triton_common import INDICES, load_box
from .triton_channels import LANES, add_parts_if_read, inside_parts, of_lane, store_parts, weighted_sum, zero_parts
from .triton_geometry import NOWHERE, bin_share, bin_span, box_axis, box_to_read, cell_share, sample_place

NUMBERS = ["images", "out_h", "out_w", "ratio"]
"""Numbers that change from batch to batch, or of which Triton would compile the same once more for a 1."""

# ---- what every tile asks of a region, worked out once a region ----


@triton.jit
def _place_axis(places, low, high, bins, size, ratio, SAMPLES: tl.constexpr):
    """(first cell, end) of what a box may touch along an axis. To places [SAMPLES, bins]: where its samples read."""
    start, bin_size, samples = box_axis(low, high, bins, ratio)
    first_cell, end_cell = size, 0
    for first_bin in range(0, bins, LANES):
        number = first_bin + tl.arange(0, LANES)
        offset = start + number * bin_size
        for sample in tl.static_range(SAMPLES):
            place = tl.where(samples > 0, sample_place(offset, bin_size, size, sample, SAMPLES), NOWHERE)
            tl.store(places + sample * bins + number, place, mask=number < bins)
        first, end = bin_span(offset, bin_size, samples, size)
        touches = (number < bins) & (first < end)
        first_cell = tl.minimum(first_cell, tl.min(tl.where(touches, first, size)))
        end_cell = tl.maximum(end_cell, tl.max(tl.where(touches, end, 0)))
    return first_cell, end_cell


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def place_regions(
    regions, region_first, grids, boxes, image_index, extents, places, images, out_h, out_w, ratio,
    SAMPLES: tl.constexpr,
):  # fmt: skip
    """Program n does the n-th region of those in the images' order: extents int32 [R, 4] are the first cell
    and the end of what it may touch along y and along x, places float32 [R, SAMPLES * (out_h + out_w)] where
    its samples read along y, then along x."""
    n = tl.program_id(0)
    if n >= tl.load(region_first + images):
        return
    region = tl.load(regions + n)
    image = tl.load(image_index + region)
    x1, y1, x2, y2 = box_to_read(boxes, region, True)
    places += n.to(tl.int64) * (SAMPLES * (out_h + out_w))
    top, bottom = _place_axis(places, y1, y2, out_h, tl.load(grids + 2 * image), ratio, SAMPLES)
    places += SAMPLES * out_h
    left, right = _place_axis(places, x1, x2, out_w, tl.load(grids + 2 * image + 1), ratio, SAMPLES)
    extents += 4 * n
    tl.store(extents, top)
    tl.store(extents + 1, bottom)
    tl.store(extents + 2, left)
    tl.store(extents + 3, right)


# ---- a tile of tokens ----


@triton.jit
def _region_axes(places, boxes, n, region, size, out_h, out_w, ratio, SAMPLES: tl.constexpr):
    """What _shares needs of the n-th region's axes, y and x."""
    if SAMPLES > 0:
        places += n.to(tl.int64) * (SAMPLES * (out_h + out_w))
        return places, places + SAMPLES * out_h
    else:
        x1, y1, x2, y2 = load_box(boxes, region)
        return (size[0],) + box_axis(y1, y2, out_h, ratio), (size[1],) + box_axis(x1, x2, out_w, ratio)


@triton.jit
def _shares(axis, number, bins, cell, SAMPLES: tl.constexpr):
    """The shares that cells have of bins of an axis, both int32 [LANES]; 0 beyond the last bin."""
    inside = number < bins
    if SAMPLES > 0:
        share = cell_share(tl.load(axis + number, mask=inside, other=NOWHERE), cell)
        for sample in tl.static_range(1, SAMPLES):
            share += cell_share(tl.load(axis + sample * bins + number, mask=inside, other=NOWHERE), cell)
        return share * (1.0 / SAMPLES)
    else:
        size, start, bin_size, samples = axis
        share = bin_share(start + number * bin_size, bin_size, tl.where(inside, samples, 0), cell, size)
        return tl.where(inside, share, 0.0)


@triton.jit
def _by_token(shares, token, TILE: tl.constexpr):
    """The shares of each token of a tile: where `token` [LANES] is another one, 0."""
    each = ()
    for this in tl.static_range(TILE):
        each = each + (tl.where(token == this, shares, 0.0),)
    return each


@triton.jit
def _add_to_tokens(totals, shares, column, bin_column, values):
    """values, the sum of a column of bins, to each token's total with its share."""
    sums = ()
    for token in tl.static_range(len(totals)):
        share = of_lane(shares[token], column, bin_column)
        sums = sums + (add_parts_if_read(totals[token], share, values),)
    return sums


@triton.jit
def _add_region(
    totals, grad, region, y_axis, x_axis, y, x, channels, out_h, out_w, inside,
    SAMPLES: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds a region's gradient to a tile's tokens, in row y from column x on. grad: pointer to the first region's."""
    lane = tl.arange(0, LANES)
    for rows in range(0, out_h, LANES):
        row = rows + lane
        row_share = _shares(y_axis, row, out_h, y + lane * 0, SAMPLES)
        first_row = tl.min(tl.where(row_share > 0, row, out_h))
        end_row = tl.max(tl.where(row_share > 0, row + 1, 0))
        for columns in range(0, tl.where(first_row < end_row, out_w, 0), LANES // TILE):
            column, token = columns + lane // TILE, lane % TILE
            column_share = _shares(x_axis, column, out_w, x + token, SAMPLES)
            first_column = tl.min(tl.where(column_share > 0, column, out_w))
            end_column = tl.max(tl.where(column_share > 0, column + 1, 0))
            shares = _by_token(column_share, token, TILE)
            for bin_column in range(first_column, end_column):
                place = (region * out_h + first_row) * out_w + bin_column
                bins = weighted_sum(
                    grad + place * channels, out_w * channels, row_share, row, first_row, end_row, inside, PARTS,
                    BLOCK_C,
                )  # fmt: skip
                totals = _add_to_tokens(totals, shares, column, bin_column, bins)
    return totals


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def backward(
    grad, tile_image, tile_token, region_first, regions, extents, places, grids, cu_seqlens, boxes, grad_tokens,
    channels, out_h, out_w, ratio,
    SAMPLES: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image = tl.load(tile_image + tl.program_id(0))
    if image < 0:
        return
    channel = tl.program_id(1) * (PARTS * BLOCK_C) + tl.arange(0, BLOCK_C)
    inside = inside_parts(channel, channels, WHOLE, PARTS, BLOCK_C)
    lane = tl.arange(0, LANES)
    size = tl.load(grids + 2 * image), tl.load(grids + 2 * image + 1)
    width = size[1]
    first_token = tl.load(tile_token + tl.program_id(0))
    count = tl.minimum(tl.load(cu_seqlens + image + 1) - first_token, TILE)
    first_region, end_region = tl.load(region_first + image), tl.load(region_first + image + 1)
    totals = ()
    for _ in tl.static_range(TILE):
        totals = totals + (zero_parts(PARTS, BLOCK_C),)
    cell = first_token - tl.load(cu_seqlens + image)
    y = cell // width
    x = cell - y * width  # of the tile's first token; in rows after its first, left of the image
    while x > -count:
        for first in range(first_region, end_region, LANES):
            n = first + lane
            extent, known = extents + 4 * n, n < end_region
            top, bottom = tl.load(extent, mask=known, other=0), tl.load(extent + 1, mask=known, other=0)
            left, right = tl.load(extent + 2, mask=known, other=0), tl.load(extent + 3, mask=known, other=0)
            touches = (top <= y) & (y < bottom) & (left < x + count) & (x < right)
            hit = tl.min(tl.where(touches, lane, LANES))
            while hit < LANES:
                region = tl.load(regions + first + hit).to(tl.int64)
                y_axis, x_axis = _region_axes(
                    places, boxes, first + hit, region, size, out_h, out_w, ratio, SAMPLES
                )
                totals = _add_region(
                    totals, grad + channel, region, y_axis, x_axis, y, x, channels, out_h, out_w, inside,
                    SAMPLES, TILE, PARTS, BLOCK_C,
                )  # fmt: skip
                hit = tl.min(tl.where(touches & (lane > hit), lane, LANES))
        x -= width
        y += 1
    pointer = grad_tokens + first_token.to(tl.int64) * channels + channel
    for token in tl.static_range(TILE):
        store_parts(pointer + token * channels, totals[token], inside, token < count, BLOCK_C)
