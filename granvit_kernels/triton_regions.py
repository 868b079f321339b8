"""What the Triton kernels of region_attention and region_pool share: the cells under a box, how much of each it covers,
and tiles of tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import finite_box, load_box

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e**x. tl.exp keeps denormal results too, at twice the instructions."""
    return tl.exp2(x * LOG2E)


@triton.jit
def covered_cells(x1, y1, x2, y2, width, height, exists):
    """(row0, row1, column0, column1) as regions.covered_cells; nothing where `exists` is false."""
    w, h = width.to(tl.float32), height.to(tl.float32)
    meets = finite_box(x1, y1, x2, y2) & exists
    meets &= (x1 < x2) & (y1 < y2) & (x1 < w) & (y1 < h) & (x2 > 0) & (y2 > 0)
    # Clip before rounding: a box may be far larger than any integer type.
    row0 = tl.where(meets, tl.maximum(y1, 0.0), 0.0).to(tl.int32)
    row1 = tl.where(meets, tl.ceil(tl.minimum(y2, h)), 0.0).to(tl.int32)
    column0 = tl.where(meets, tl.maximum(x1, 0.0), 0.0).to(tl.int32)
    column1 = tl.where(meets, tl.ceil(tl.minimum(x2, w)), 0.0).to(tl.int32)
    return row0, row1, column0, column1


@triton.jit
def region_area(grids, cu_seqlens, boxes, image_index, region, images, COVERAGE: tl.constexpr):
    """(left, top, right, bottom, log_share, start, width): the area within which cells weigh by their share (`share`),
    what that leaves out of the logarithm of every weight, and the region's image: its first token and its width.

    The area is the box within its image; without COVERAGE all of the cells that the box meets. Along an axis with one
    cell it is that cell: its share is the same for the whole region, may be too small for a product, and goes into
    log_share. Where an axis has more, no share is below 2**-24. A box that meets no cell has the area 0, 0, 0, 0.
    """
    image = tl.load(image_index + region).to(tl.int64)
    exists = (image >= 0) & (image < images)
    start = tl.load(cu_seqlens + image, mask=exists, other=0)
    height = tl.load(grids + image * 2, mask=exists, other=0)
    width = tl.load(grids + image * 2 + 1, mask=exists, other=0)
    x1, y1, x2, y2 = load_box(boxes, region)
    row0, row1, column0, column1 = covered_cells(x1, y1, x2, y2, width, height, exists)
    left, right, log_x = _side(x1, x2, column0, column1, COVERAGE)
    top, bottom, log_y = _side(y1, y2, row0, row1, COVERAGE)
    return left, top, right, bottom, log_x + log_y, start, width


@triton.jit
def _side(low, high, first, last, COVERAGE: tl.constexpr):
    """An area's ends along an axis of which the box meets the cells [first, last), and its part of log_share."""
    whole_low, whole_high = first.to(tl.float32), last.to(tl.float32)
    if not COVERAGE:
        return whole_low, whole_high, 0.0
    low, high = tl.maximum(low, whole_low), tl.minimum(high, whole_high)
    several = last - first > 1
    log_share = tl.where(last - first == 1, tl.log(high - low), 0.0)
    return tl.where(several, low, whole_low), tl.where(several, high, whole_high), log_share


@triton.jit
def area_cells(left, top, right, bottom):
    """(first row, first column, columns, cells) of an area; columns at least 1."""
    row0, column0 = top.to(tl.int32), left.to(tl.int32)
    rows, columns = tl.ceil(bottom).to(tl.int32) - row0, tl.ceil(right).to(tl.int32) - column0
    return row0, column0, tl.maximum(columns, 1), rows * columns


@triton.jit
def store_area(areas, region, left, top, right, bottom):
    """As load_box reads it."""
    areas += region.to(tl.int64) * 4
    tl.store(areas, left)
    tl.store(areas + 1, top)
    tl.store(areas + 2, right)
    tl.store(areas + 3, bottom)


@triton.jit
def share(low, high, cell):
    """The share of [cell, cell + 1] that [low, high] covers; 0 outside."""
    cell = cell.to(tl.float32)
    return tl.maximum(tl.minimum(high, cell + 1) - tl.maximum(low, cell), 0.0)


@triton.jit
def next_cells(y, x, columns, BLOCK: tl.constexpr):
    """The cells BLOCK further on, row by row, in a box of so many columns: no lane divides again."""
    x += BLOCK % columns
    y += BLOCK // columns + (x >= columns).to(tl.int32)
    return y, tl.where(x >= columns, x - columns, x)


@triton.jit
def token_tile(grids, cu_seqlens, tile_token, image, tile, BLOCK_T: tl.constexpr):
    """A tile of an image's tokens: (its first token, how many it has, their rows and columns, and its top, bottom, left
    and right cell)."""
    low = tl.load(tile_token + tile)
    width = tl.load(grids + image * 2 + 1)
    start, stop = tl.load(cu_seqlens + image), tl.load(cu_seqlens + image + 1)
    cell = low - start + tl.arange(0, BLOCK_T)
    last = tl.minimum(low + BLOCK_T, stop) - 1 - start
    top, bottom = (low - start) // width, last // width
    left = tl.where(top == bottom, (low - start) % width, 0)
    right = tl.where(top == bottom, last % width, width - 1)
    return low, stop - low, cell // width, cell % width, top, bottom, left, right
