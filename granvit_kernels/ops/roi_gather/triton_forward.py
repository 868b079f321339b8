"""roi_gather forward. A program sums one row of a box's bins, for the channels that it holds.

A cell's weight in a bin is its row's share times its column's. So the cells of a column are summed over the rows
first, once, and their sum is added to the bins that the column touches.
"""

import triton
import triton.language as tl

from ...triton_common import INDICES
from .triton_channels import (
    LANES,
    add_parts,
    add_parts_if_read,
    inside_parts,
    load_parts,
    of_lane,
    store_parts,
    weighted_sum,
    zero_parts,
)
from .triton_geometry import bin_share, bin_span, box_axis, box_to_read, cell_share, sample_place

NUMBERS = ["images", "out_h", "out_w", "ratio"]
"""Triton makes a constant of a 1: of these it would only compile the same once more."""


@triton.jit
def _bin_row(grids, cu_seqlens, boxes, image_index, images, out_h, out_w, ratio):
    """(image's first token, (height, width), (start, bin size, samples) along y and along x) of this program's box, and
    which row of bins."""
    region = tl.program_id(0) // out_h
    bin_row = tl.program_id(0) % out_h
    image = tl.load(image_index + region)
    exists = (image >= 0) & (image < images)
    image = tl.where(exists, image, 0)
    x1, y1, x2, y2 = box_to_read(boxes, region, exists)
    size = tl.load(grids + 2 * image), tl.load(grids + 2 * image + 1)
    first_token = tl.load(cu_seqlens + image).to(tl.int64)
    return first_token, size, box_axis(y1, y2, out_h, ratio), box_axis(x1, x2, out_w, ratio), bin_row


# ---- one sample a bin and axis, or two ----


@triton.jit
def _row_shares(offset, bin_size, size, SAMPLES: tl.constexpr):
    """(cells that a bin's samples touch, two a sample, their shares): the share 0 of those that repeat, too."""
    cells, places = (), ()
    for sample in tl.static_range(SAMPLES):
        place = sample_place(offset, bin_size, size, sample, SAMPLES)
        cell = tl.maximum(place, 0.0).to(tl.int32)
        cells, places = cells + (cell, cell + 1), places + (place,)
    shares = ()
    for n in tl.static_range(2 * SAMPLES):
        share = cell_share(places[0], cells[n])
        for sample in tl.static_range(1, SAMPLES):
            share += cell_share(places[sample], cells[n])
        repeats = (n > 1) & ((cells[n] == cells[0]) | (cells[n] == cells[1]))
        shares = shares + (tl.where(repeats, 0.0, share * (1.0 / SAMPLES)),)
    return cells, shares


@triton.jit
def _column(rows, shares, x, channels, inside, PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The cells of column x, summed with their rows' shares. rows: pointers to each row's first token, from which 32
    bits count a row's numbers."""
    reads = ()
    for row in tl.static_range(len(rows)):  # all before the first is waited for
        reads = reads + (load_parts(rows[row] + x * channels, inside, BLOCK_C),)
    total = zero_parts(PARTS, BLOCK_C)
    for row in tl.static_range(len(rows)):
        if shares[row] > 0:
            total = add_parts(total, shares[row], reads[row])
    return total


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def forward(
    tokens, grids, cu_seqlens, boxes, image_index, output, images, channels, out_h, out_w,
    SAMPLES: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The samples of a row of bins are met from left to right, between two columns that are held: the next sample lies
    between the same, or one further, so that a column is read once."""
    channel = tl.program_id(1) * (PARTS * BLOCK_C) + tl.arange(0, BLOCK_C)
    inside = inside_parts(channel, channels, WHOLE, PARTS, BLOCK_C)
    first_token, size, y_axis, x_axis, bin_row = _bin_row(
        grids, cu_seqlens, boxes, image_index, images, out_h, out_w, out_h * 0 + SAMPLES
    )
    height, width = size
    y_start, y_bin, y_samples = y_axis
    x_start, x_bin, x_samples = x_axis
    cells, row_shares = _row_shares(y_start + bin_row * y_bin, y_bin, height, SAMPLES)
    fits = (y_samples > 0) & (x_samples > 0)
    rows, shares = (), ()
    for n in tl.static_range(2 * SAMPLES):
        row = tl.minimum(cells[n], height - 1)  # a row whose share is 0 is read, too, and left out
        rows = rows + (tokens + (first_token + row * width) * channels + channel,)
        shares = shares + (tl.where(fits, row_shares[n] / SAMPLES, 0.0),)
    output += tl.program_id(0).to(tl.int64) * out_w * channels + channel
    left, right = zero_parts(PARTS, BLOCK_C), zero_parts(PARTS, BLOCK_C)
    here = -2  # the left column
    for bin_column in range(0, out_w):
        total = zero_parts(PARTS, BLOCK_C)
        for sample in tl.static_range(SAMPLES):
            place = sample_place(x_start + bin_column * x_bin, x_bin, width, sample, SAMPLES)
            if place >= 0:
                cell = place.to(tl.int32)
                if cell != here:
                    if cell == here + 1:
                        left = right
                    else:
                        left = _column(rows, shares, cell, channels, inside, PARTS, BLOCK_C)
                    right = _column(rows, shares, tl.minimum(cell + 1, width - 1), channels, inside, PARTS, BLOCK_C)
                    here = cell
                upper = place - cell.to(tl.float32)
                total = add_parts(total, 1 - upper, left)
                if upper > 0:
                    total = add_parts(total, upper, right)
        store_parts(output, total, inside, True, BLOCK_C)
        output += channels


# ---- any number of samples ----


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def forward_any_ratio(
    tokens, grids, cu_seqlens, boxes, image_index, output, images, channels, out_h, out_w, ratio,
    WHOLE: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The shares of LANES rows or columns of cells are searched for together, those of the rows once a program."""
    channel = tl.program_id(1) * (PARTS * BLOCK_C) + tl.arange(0, BLOCK_C)
    inside = inside_parts(channel, channels, WHOLE, PARTS, BLOCK_C)
    lane = tl.arange(0, LANES)
    first_token, size, y_axis, x_axis, bin_row = _bin_row(
        grids, cu_seqlens, boxes, image_index, images, out_h, out_w, ratio
    )
    height, width = size
    y_start, y_bin, y_samples = y_axis
    x_start, x_bin, x_samples = x_axis
    y_offset = y_start + bin_row * y_bin
    first_row, end_row = bin_span(y_offset, y_bin, y_samples, height)
    held, row_share = -1, tl.zeros((LANES,), tl.float32)  # of rows from `held` on
    tokens += first_token * channels + channel
    output += tl.program_id(0).to(tl.int64) * out_w * channels + channel
    for bin_column in range(0, out_w):
        total = zero_parts(PARTS, BLOCK_C)
        x_offset = x_start + bin_column * x_bin
        first_column, end_column = bin_span(x_offset, x_bin, x_samples, width)
        for columns in range(first_column, end_column, LANES):
            column_share = bin_share(x_offset, x_bin, x_samples, columns + lane, width)
            for rows in range(first_row, end_row, LANES):
                if rows != held:
                    row_share, held = bin_share(y_offset, y_bin, y_samples, rows + lane, height), rows
                for x in range(columns, tl.minimum(columns + LANES, end_column)):
                    column = weighted_sum(
                        tokens + (width.to(tl.int64) * rows + x) * channels, width * channels, row_share, rows + lane,
                        rows, tl.minimum(rows + LANES, end_row), inside, PARTS, BLOCK_C,
                    )  # fmt: skip
                    total = add_parts_if_read(total, of_lane(column_share, columns + lane, x), column)
        store_parts(output, total, inside, True, BLOCK_C)
        output += channels
