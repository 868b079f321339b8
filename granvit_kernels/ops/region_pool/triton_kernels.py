"""The Triton kernels of region_pool. triton_launch.py launches them and says which program has which work.

A region's rows are its K * H softmaxes. The value's heads lie side by side in its channels, [T, HEADS * SIZE]: a
product takes all rows with all channels, and of its entries those count whose channel is of the row's head. So one
shared head and H heads are the same kernels, and a head of 72 is not padded.

Weights and accumulators are float32; products take the storage dtype, for which there are tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common import INDICES, load_box
from ...triton_regions import area_cells, exp, next_cells, region_area, share, store_area, token_tile

NUMBERS = ["images", "chunks"]
"""Triton makes a constant of a 1: of these it would only compile the same once more."""


@triton.jit
def own_channels(row, channel, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """[rows, channels]: whether a channel is of the row's head; false past the last channel."""
    return (row % HEADS)[:, None] == (channel // SIZE)[None, :]


# ---- region-major: a program walks the cells under a region's box ----


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def weigh(
    logits, grids, cu_seqlens, boxes, image_index, lse, shift, areas, origins, images,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, COVERAGE: tl.constexpr,
):  # fmt: skip
    """One region, BLOCK_R of its rows: the sums of their weights, from the logits alone.

    lse [R, K, H]. For `pool`: shift [R, K, H], so that the weights exp(logit - shift) * share add up to 1; areas
    float32 [R, 4] and origins int32 [R, 2] (first token and width of the image), as region_area has them.
    """
    region = tl.program_id(0)
    left, top, right, bottom, log_share, start, width = region_area(
        grids, cu_seqlens, boxes, image_index, region, images, COVERAGE
    )
    row0, column0, columns, cells = area_cells(left, top, right, bottom)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    lane = tl.arange(0, BLOCK_N)
    y, x = lane // columns, lane % columns
    logits += (start + row0 * width + column0).to(tl.int64) * ROWS

    most = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, cells, BLOCK_N):
        read = (row < ROWS)[:, None] & (first + lane < cells)[None, :]
        at = (y * width + x).to(tl.int64) * ROWS
        logit = tl.load(logits + at[None, :] + row[:, None], mask=read, other=float("-inf")).to(tl.float32)
        weight = share(top, bottom, row0 + y) * share(left, right, column0 + x)
        larger = tl.maximum(most, tl.max(logit, 1))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # -inf - -inf is no number
        total = total * exp(most - base) + tl.sum(exp(logit - base[:, None]) * weight[None, :], 1)
        most = larger
        y, x = next_cells(y, x, columns, BLOCK_N)

    total = tl.where(cells > 0, total, 1.0)
    log_sum = most + tl.log(total)  # without a cell, or with no logit above -inf: -inf
    at = region.to(tl.int64) * ROWS + row
    tl.store(shift + at, log_sum, mask=row < ROWS)
    tl.store(lse + at, log_sum + log_share, mask=row < ROWS)
    if tl.program_id(1) == 0:
        store_area(areas, region, left, top, right, bottom)
        tl.store(origins + region.to(tl.int64) * 2, start)
        tl.store(origins + region.to(tl.int64) * 2 + 1, width)


@triton.jit(do_not_specialize=NUMBERS)
def pool(
    logits, value, shift, areas, origins, output, value_token, chunks,
    ROWS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One region, BLOCK_R of its rows and BLOCK_C channels: weights times values, BLOCK_N cells at a time."""
    region, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks  # a region's chunks side by side
    left, top, right, bottom = load_box(areas, region)
    start = tl.load(origins + region.to(tl.int64) * 2)
    width = tl.load(origins + region.to(tl.int64) * 2 + 1)
    row0, column0, columns, cells = area_cells(left, top, right, bottom)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_N)
    y, x = lane // columns, lane % columns
    token = (start + row0 * width + column0).to(tl.int64)
    logits += token * ROWS
    value += token * (value_token * UNIT)
    at = region.to(tl.int64) * ROWS + row
    base = tl.load(shift + at, mask=row < ROWS, other=0.0)

    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(0, cells, BLOCK_N):
        inside = first + lane < cells
        offset = (y * width + x).to(tl.int64)
        read = (row < ROWS)[:, None] & inside[None, :]
        logit = tl.load(logits + (offset * ROWS)[None, :] + row[:, None], mask=read, other=float("-inf"))
        read = inside[:, None] & (channel < HEADS * SIZE)[None, :]
        values = tl.load(value + (offset * (value_token * UNIT))[:, None] + channel[None, :], mask=read, other=0.0)
        weight = share(top, bottom, row0 + y) * share(left, right, column0 + x)
        p = exp(logit.to(tl.float32) - base[:, None]) * weight[None, :]
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision="ieee")
        y, x = next_cells(y, x, columns, BLOCK_N)

    write = (row < ROWS)[:, None] & own_channels(row, channel, HEADS, SIZE)
    output += (at * SIZE)[:, None] + (channel % SIZE)[None, :]
    tl.store(output, acc.to(output.dtype.element_ty), mask=write)


@triton.jit
def compare(
    grad_output, grad_lse, output, delta, ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One region, BLOCK_R of its rows: delta [R, K, H] = sum(grad_output * output) - grad_lse."""
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = tl.program_id(0).to(tl.int64) * ROWS + row
    dot = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, SIZE, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        read = (row < ROWS)[:, None] & (d < SIZE)[None, :]
        gradient = tl.load(grad_output + (at * SIZE)[:, None] + d[None, :], mask=read, other=0.0)
        pooled = tl.load(output + (at * SIZE)[:, None] + d[None, :], mask=read, other=0.0)
        dot += tl.sum(gradient.to(tl.float32) * pooled.to(tl.float32), 1)
    tl.store(delta + at, dot - tl.load(grad_lse + at, mask=row < ROWS, other=0.0), mask=row < ROWS)


# ---- token-major: a program has a tile of an image's tokens, and visits the regions that meet it ----


@triton.jit
def _met_regions(areas, image_regions, begin, stop, top, bottom, left, right, LANES: tl.constexpr):
    """(regions, place, count) of the LANES regions from `begin` on: place numbers those that meet the tile, from 1 in
    their order, and is 0 for the rest."""
    lane = begin + tl.arange(0, LANES)
    region = tl.load(image_regions + lane, mask=lane < stop, other=0)
    x1, y1, x2, y2 = load_box(areas, region)
    met = (lane < stop) & (y1 < bottom + 1) & (y2 > top) & (x1 < right + 1) & (x2 > left)
    place = tl.cumsum(met.to(tl.int32), 0)
    return region, tl.where(met, place, 0), tl.max(place, 0)


@triton.jit
def _weights(logit, shift, delta, areas, region, row, y, x, ROWS: tl.constexpr):
    """A region's (weights [tokens, rows]; which tokens it meets; delta, and whether it is finite, [rows]).

    Where anything in a row's gradient or output is not finite, neither is delta. In products it would meet the zeros of
    tokens that the region does not touch: so its gradient is not to be read, and its own tokens get NaN as weights.
    """
    at = region.to(tl.int64) * ROWS + row
    change = tl.load(delta + at, mask=row < ROWS, other=0.0)
    finite = tl.abs(change) < float("inf")
    base = tl.where(finite, tl.load(shift + at, mask=row < ROWS, other=0.0), float("nan"))
    left, top, right, bottom = load_box(areas, region)
    weight = share(top, bottom, y) * share(left, right, x)
    met = weight > 0
    p = tl.where(met[:, None] & (row < ROWS)[None, :], exp(logit - base[None, :]) * weight[:, None], 0.0)
    return p, met, change, finite


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def backward_logits(
    grad_output, logits, value, shift, delta, areas, grids, cu_seqlens,
    tile_image, tile_token, region_first, image_regions, grad_logits, value_token, chunks,
    ROWS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, UNIT: tl.constexpr, LANES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of tokens, BLOCK_R rows: p * (grad_output . value - delta), summed over the regions in their order."""
    tile = tl.program_id(0)
    image = tl.load(tile_image + tile)
    if image < 0:
        return
    low, count, y, x, top, bottom, left, right = token_tile(grids, cu_seqlens, tile_token, image, tile, BLOCK_T)
    token = tl.arange(0, BLOCK_T)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (token < count)[:, None] & (row < ROWS)[None, :]
    entry = low.to(tl.int64) * ROWS + (token * ROWS)[:, None] + row[None, :]
    logit = tl.load(logits + entry, mask=inside, other=float("-inf")).to(tl.float32)
    value += low.to(tl.int64) * (value_token * UNIT)

    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    start, stop = tl.load(region_first + image), tl.load(region_first + image + 1)
    for begin in range(start, stop, LANES):
        regions, place, met_regions = _met_regions(areas, image_regions, begin, stop, top, bottom, left, right, LANES)
        for n in range(1, met_regions + 1):
            region = tl.sum(tl.where(place == n, regions, 0), 0)
            p, met, change, finite = _weights(logit, shift, delta, areas, region, row, y, x, ROWS)
            gradient = grad_output + region.to(tl.int64) * (ROWS * SIZE)
            product = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
            for chunk in range(chunks):  # not known to the compiler, which would unroll it, and spill
                channel = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
                read = (met & (token < count))[:, None] & (channel < HEADS * SIZE)[None, :]
                at = (token * (value_token * UNIT))[:, None] + channel[None, :]
                values = tl.load(value + at, mask=read, other=0.0)
                if HEADS > 1:  # what is not finite is of one head, and reaches its rows by their delta
                    values = tl.where(tl.abs(values.to(tl.float32)) < float("inf"), values, 0.0)
                read = ((row < ROWS) & finite)[:, None] & own_channels(row, channel, HEADS, SIZE)
                g = tl.load(gradient + (row * SIZE)[:, None] + (channel % SIZE)[None, :], mask=read, other=0.0)
                product = tl.dot(values, tl.trans(g), product, input_precision="ieee")
            total += tl.where(met[:, None], p * (product - change[None, :]), 0.0)
    tl.store(grad_logits + entry, total.to(grad_logits.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def backward_value(
    grad_output, logits, shift, delta, areas, grids, cu_seqlens,
    tile_image, tile_token, region_first, image_regions, grad_value, chunks,
    ROWS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of tokens, and every so many-th chunk of BLOCK_C channels: p * grad_output, summed over the regions in
    their order."""
    tile = tl.program_id(0)
    image = tl.load(tile_image + tile)
    if image < 0:
        return
    low, count, y, x, top, bottom, left, right = token_tile(grids, cu_seqlens, tile_token, image, tile, BLOCK_T)
    token = tl.arange(0, BLOCK_T)
    logits += low.to(tl.int64) * ROWS
    grad_value += low.to(tl.int64) * (HEADS * SIZE)
    start, stop = tl.load(region_first + image), tl.load(region_first + image + 1)
    for chunk in range(tl.program_id(1), chunks, tl.num_programs(1)):
        channel = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for begin in range(start, stop, LANES):
            regions, place, met_regions = _met_regions(
                areas, image_regions, begin, stop, top, bottom, left, right, LANES
            )
            for n in range(1, met_regions + 1):
                region = tl.sum(tl.where(place == n, regions, 0), 0)
                gradient = grad_output + region.to(tl.int64) * (ROWS * SIZE)
                for first in range(0, ROWS, BLOCK_R):
                    row = first + tl.arange(0, BLOCK_R)
                    inside = (token < count)[:, None] & (row < ROWS)[None, :]
                    logit = tl.load(logits + (token * ROWS)[:, None] + row[None, :], mask=inside, other=float("-inf"))
                    p, met, _, finite = _weights(logit.to(tl.float32), shift, delta, areas, region, row, y, x, ROWS)
                    own = (row < ROWS)[:, None] & own_channels(row, channel, HEADS, SIZE)
                    if HEADS > 1:
                        if tl.min(finite.to(tl.int32), 0) == 0:  # NaN, too, must not meet other heads' zeros
                            spoilt = tl.max((own & (finite == 0)[:, None]).to(tl.int32), 0) > 0
                            acc = tl.where(met[:, None] & spoilt[None, :], float("nan"), acc)
                        p = tl.where(finite[None, :], p, 0.0)
                    read = own & finite[:, None]
                    g = tl.load(gradient + (row * SIZE)[:, None] + (channel % SIZE)[None, :], mask=read, other=0.0)
                    acc = tl.dot(p.to(g.dtype), g, acc, input_precision="ieee")
        write = (token < count)[:, None] & (channel < HEADS * SIZE)[None, :]
        at = (token * (HEADS * SIZE))[:, None] + channel[None, :]
        tl.store(grad_value + at, acc.to(grad_value.dtype.element_ty), mask=write)
