"""The Triton kernels of region_attention. triton_launch.py launches them and says which program has which work.

Logits, softmax and accumulators are float32; products take the storage dtype, for which there are tensor cores.
Logits stay in natural units, and every one passes a tl.where before something is subtracted from it: so the
compiler can't contract the product with the scale into the subtraction, and forward and backward see the same
logits, however large. A token's weight is exp(logit) times its share (triton_regions.py), 0 or 1 without coverage.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common import INDICES, load_box
from ...triton_regions import area_cells, exp, next_cells, region_area, share, store_area, token_tile

# Triton makes a constant of a 1: of these it would only compile the same once more.
NUMBERS = ["images", "regions", "queries", "heads", "splits"]


@triton.jit
def _logits(a, b):
    """a [M, D] times b [N, D] transposed, float32 [M, N].

    A float32 product adds one term after another, and rounds each time. Over 256 terms that made an output's error more
    than twice plain PyTorch's, so the halves are summed apart. It also takes fewer registers.
    """
    if a.dtype == tl.float32 and a.shape[1] > 128:
        a_low, a_high = _halves(a)
        b_low, b_high = _halves(b)
        low = tl.dot(a_low, tl.trans(b_low), input_precision="ieee")
        return low + tl.dot(a_high, tl.trans(b_high), input_precision="ieee")
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def _halves(a):
    """a [M, D] -> its first and its last columns, [M, D / 2] each."""
    return tl.split(tl.permute(tl.reshape(a, (a.shape[0], 2, a.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _piece(cells, split, splits, BLOCK_N: tl.constexpr):
    """The cells [begin, end) that a split of a region's walk has: whole blocks, so that only the last is partial."""
    piece = tl.cdiv(tl.cdiv(cells, BLOCK_N), splits) * BLOCK_N
    begin = split * piece
    return begin, tl.minimum(begin + piece, cells)


@triton.jit
def _query_rows(region, head, queries, heads, query_stride, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of the program's queries: (their rows in [R, K, H], which of them exist, their places in the query)."""
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = (region.to(tl.int64) * queries + k) * heads + head
    return row, k < queries, region.to(tl.int64) * query_stride + (k * heads + head) * SIZE


@triton.jit
def _walked(
    q, key, value, key_token, value_token, y, x, inside, width, row0, column0, left, top, right, bottom, scale,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of a walk, the cells (y, x) counted from its first: (logits, -inf where the walk is over, their
    weights' factors, keys and values)."""
    d = tl.arange(0, BLOCK_D)
    offset = (y * width + x).to(tl.int64)
    read = inside[:, None] & (d < SIZE)[None, :]
    keys = tl.load(key + (offset * key_token)[:, None] + d[None, :], mask=read, other=0.0)
    values = tl.load(value + (offset * value_token)[:, None] + d[None, :], mask=read, other=0.0)
    logits = tl.where(inside[None, :], _logits(q, keys) * scale, float("-inf"))
    return logits, share(top, bottom, row0 + y) * share(left, right, column0 + x), keys, values


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def forward_walk(
    query, key, value, grids, cu_seqlens, boxes, image_index, output, lse, part_max,
    scale, images, regions, queries, heads, query_stride, key_token, key_head, value_token, value_head, splits,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
    COVERAGE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One region, head, block of queries and split: BLOCK_K queries walk the cells of the region's box.

    SPLIT: leave the sums unnormalised, output [splits, R, K, H, D], lse (their weight) and part_max [splits, R, K, H],
    for `merge`. Strides of key and value come divided by UNIT.
    """
    # The head is fastest: the heads of a token lie side by side.
    head, region, split = tl.program_id(0) % heads, tl.program_id(0) // heads, tl.program_id(1)
    left, top, right, bottom, log_share, start, width = region_area(
        grids, cu_seqlens, boxes, image_index, region, images, COVERAGE
    )
    row0, column0, columns, cells = area_cells(left, top, right, bottom)
    begin, end = _piece(cells, split, splits, BLOCK_N)
    row, exists, at = _query_rows(region, head, queries, heads, query_stride, SIZE, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (d < SIZE)[None, :]
    q = tl.load(query + at[:, None] + d[None, :], mask=inside, other=0.0)
    key_token, value_token = key_token * UNIT, value_token * UNIT  # int64 with the offsets they are multiplied by
    first_token = start.to(tl.int64) + row0 * width + column0
    key += first_token * key_token + head.to(tl.int64) * (key_head * UNIT)
    value += first_token * value_token + head.to(tl.int64) * (value_head * UNIT)
    lane = tl.arange(0, BLOCK_N)
    y, x = (begin + lane) // columns, (begin + lane) % columns

    most = tl.full([BLOCK_K], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        logits, weight, _, values = _walked(
            q, key, value, key_token, value_token, y, x, first + lane < end, width, row0, column0,
            left, top, right, bottom, scale, SIZE, BLOCK_D,
        )  # fmt: skip
        larger = tl.maximum(most, tl.max(logits, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # -inf - -inf is no number
        p = exp(logits - shift[:, None])
        if COVERAGE:
            p *= weight[None, :]
        shrink = exp(most - shift)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        most = larger
        y, x = next_cells(y, x, columns, BLOCK_N)

    if SPLIT:
        row += split.to(tl.int64) * regions * queries * heads
        tl.store(part_max + row, most, mask=exists)
        tl.store(lse + row, total, mask=exists)
        tl.store(output + (row * SIZE)[:, None] + d[None, :], acc, mask=inside)
    else:
        # Without a cell: zeros. With cells, but no logit above -inf: 0 / 0, as softmax has it.
        total = tl.where(cells > 0, total, 1.0)
        tl.store(lse + row, most + tl.log(total) + log_share, mask=exists)
        acc = acc / total[:, None]
        tl.store(output + (row * SIZE)[:, None] + d[None, :], acc.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def merge(
    part, part_sum, part_max, grids, cu_seqlens, boxes, image_index, output, lse,
    images, regions, queries, heads, splits,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, COVERAGE: tl.constexpr,
):  # fmt: skip
    """One region, head and block of queries: the sums that `forward_walk` left, added in the splits' order."""
    head, region = tl.program_id(0) % heads, tl.program_id(0) // heads
    left, top, right, bottom, log_share, _, _ = region_area(
        grids, cu_seqlens, boxes, image_index, region, images, COVERAGE
    )
    row, exists, _ = _query_rows(region, head, queries, heads, 0, SIZE, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (d < SIZE)[None, :]
    all_rows = regions.to(tl.int64) * queries * heads

    most = tl.full([BLOCK_K], float("-inf"), tl.float32)
    for split in range(splits):
        most = tl.maximum(most, tl.load(part_max + split * all_rows + row, mask=exists, other=float("-inf")))
    shift = tl.where(most == float("-inf"), 0.0, most)
    total = tl.zeros([BLOCK_K], tl.float32)
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for split in range(splits):
        at = split * all_rows + row
        weight = exp(tl.load(part_max + at, mask=exists, other=float("-inf")) - shift)
        total += weight * tl.load(part_sum + at, mask=exists, other=0.0)
        acc += weight[:, None] * tl.load(part + (at * SIZE)[:, None] + d[None, :], mask=inside, other=0.0)
    total = tl.where(bottom > top, total, 1.0)
    tl.store(lse + row, most + tl.log(total) + log_share, mask=exists)
    acc = acc / total[:, None]
    tl.store(output + (row * SIZE)[:, None] + d[None, :], acc.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def backward_walk(
    grad_output, grad_lse, query, key, value, output, lse, grids, cu_seqlens, boxes, image_index, grad_query, delta,
    areas, log_shares, scale, images, regions, queries, heads, query_stride,
    key_token, key_head, value_token, value_head, splits,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
    COVERAGE: tl.constexpr,
):  # fmt: skip
    """The forward's walk again, for the queries' gradient: grad_query [splits, R, K, H, D].

    For `backward_tokens`: delta [R, K, H] = sum(grad_output * output) - grad_lse, and each region's area [R, 4] and
    log_share [R], as region_area has them.
    """
    head, region, split = tl.program_id(0) % heads, tl.program_id(0) // heads, tl.program_id(1)
    left, top, right, bottom, log_share, start, width = region_area(
        grids, cu_seqlens, boxes, image_index, region, images, COVERAGE
    )
    row0, column0, columns, cells = area_cells(left, top, right, bottom)
    begin, end = _piece(cells, split, splits, BLOCK_N)
    row, exists, at = _query_rows(region, head, queries, heads, query_stride, SIZE, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (d < SIZE)[None, :]
    q = tl.load(query + at[:, None] + d[None, :], mask=inside, other=0.0)
    key_token, value_token = key_token * UNIT, value_token * UNIT  # int64 with the offsets they are multiplied by
    first_token = start.to(tl.int64) + row0 * width + column0
    key += first_token * key_token + head.to(tl.int64) * (key_head * UNIT)
    value += first_token * value_token + head.to(tl.int64) * (value_head * UNIT)
    lane = tl.arange(0, BLOCK_N)
    y, x = (begin + lane) // columns, (begin + lane) % columns

    g = tl.load(grad_output + (row * SIZE)[:, None] + d[None, :], mask=inside, other=0.0)
    out = tl.load(output + (row * SIZE)[:, None] + d[None, :], mask=inside, other=0.0)
    dot = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    change = dot - tl.load(grad_lse + row, mask=exists, other=0.0)
    if split == 0:
        tl.store(delta + row, change, mask=exists)
        if (head == 0) & (tl.program_id(2) == 0):
            store_area(areas, region, left, top, right, bottom)
            tl.store(log_shares + region, log_share)
    shift = tl.load(lse + row, mask=exists, other=float("inf"))
    shift = tl.where(shift == float("-inf"), float("inf"), shift)  # no logit above -inf: no weights

    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        logits, weight, keys, values = _walked(
            q, key, value, key_token, value_token, y, x, first + lane < end, width, row0, column0,
            left, top, right, bottom, scale, SIZE, BLOCK_D,
        )  # fmt: skip
        if COVERAGE:
            p = exp(logits + log_share - shift[:, None]) * weight[None, :]
        else:
            p = exp(logits - shift[:, None])
        through_value = tl.dot(g, tl.trans(values), input_precision="ieee")
        grad_logits = p * (through_value - change[:, None])
        acc = tl.dot(grad_logits.to(keys.dtype), keys, acc, input_precision="ieee")
        y, x = next_cells(y, x, columns, BLOCK_N)

    row += split.to(tl.int64) * regions * queries * heads
    acc = (acc * scale).to(grad_query.dtype.element_ty)
    tl.store(grad_query + (row * SIZE)[:, None] + d[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def backward_tokens(
    grad_output, query, key, value, lse, delta, areas, log_shares, grids, cu_seqlens,
    tile_image, tile_token, region_first, image_regions, grad_key, grad_value,
    scale, queries, heads, query_stride, key_token, key_head, value_token, value_head,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One tile of an image's tokens and a head: their gradients, from all of the image's regions in their order.

    The tile's keys and values stay; BLOCK_M columns at a time go by, a column being one query of one region, so that
    regions of few queries share a block.
    """
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    image = tl.load(tile_image + tile)
    if image < 0:
        return
    low, count, y, x, top, bottom, left, right = token_tile(grids, cu_seqlens, tile_token, image, tile, BLOCK_T)
    token = low + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    inside = (tl.arange(0, BLOCK_T) < count)[:, None] & (d < SIZE)[None, :]
    at = head.to(tl.int64) * (key_head * UNIT) + token.to(tl.int64) * (key_token * UNIT)
    keys = tl.load(key + at[:, None] + d[None, :], mask=inside, other=0.0)
    at = head.to(tl.int64) * (value_head * UNIT) + token.to(tl.int64) * (value_token * UNIT)
    values = tl.load(value + at[:, None] + d[None, :], mask=inside, other=0.0)

    acc_key = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    acc_value = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    first = tl.load(region_first + image)
    columns = (tl.load(region_first + image + 1) - first) * queries
    for begin in range(0, columns, BLOCK_M):
        column = begin + tl.arange(0, BLOCK_M)
        region = tl.load(image_regions + first + column // queries, mask=column < columns, other=0)
        x1, y1, x2, y2 = load_box(areas, region)
        near = (column < columns) & (y1 < bottom + 1) & (y2 > top) & (x1 < right + 1) & (x2 > left)
        row = (region.to(tl.int64) * queries + column % queries) * heads + head
        # Where anything in q, g or their output is not finite, neither is `change`. In the products below it would meet
        # the zeros of tokens that the region does not touch: its own tokens get NaN through the weights instead.
        change = tl.load(delta + row, mask=column < columns, other=0.0)
        finite = tl.abs(change) < float("inf")
        if tl.max(near.to(tl.int32)) > 0:
            q_row = region.to(tl.int64) * query_stride + (column % queries * heads + head) * SIZE
            read = (near & finite)[:, None] & (d < SIZE)[None, :]
            q = tl.load(query + q_row[:, None] + d[None, :], mask=read, other=0.0)
            g = tl.load(grad_output + (row * SIZE)[:, None] + d[None, :], mask=read, other=0.0)
            shift = tl.load(lse + row, mask=near, other=float("inf"))
            shift = tl.where(shift == float("-inf"), float("inf"), shift)
            shift = tl.where(finite, shift, float("nan"))

            weight = share(y1[None, :], y2[None, :], y[:, None]) * share(x1[None, :], x2[None, :], x[:, None])
            met = (weight > 0) & near[None, :]
            logits = tl.where(met, _logits(keys, q) * scale, float("-inf"))
            log_share = tl.load(log_shares + region, mask=near, other=0.0)
            p = tl.where(met, exp(logits + log_share[None, :] - shift[None, :]) * weight, 0.0)
            acc_value = tl.dot(p.to(g.dtype), g, acc_value, input_precision="ieee")
            through_value = tl.dot(values, tl.trans(g), input_precision="ieee")
            grad_logits = tl.where(met, p * (through_value - change[None, :]), 0.0)
            rounded = grad_logits.to(q.dtype)
            acc_key = tl.dot(rounded, q, acc_key, input_precision="ieee")
            if q.dtype != tl.float32:
                # What rounding left out: regions' gradients may cancel in their sum, and then it would show.
                rest = (grad_logits - rounded.to(tl.float32)).to(q.dtype)
                acc_key = tl.dot(rest, q, acc_key, input_precision="ieee")

    at = (token.to(tl.int64) * heads + head) * SIZE
    tl.store(grad_key + at[:, None] + d[None, :], (acc_key * scale).to(grad_key.dtype.element_ty), mask=inside)
    tl.store(grad_value + at[:, None] + d[None, :], acc_value.to(grad_value.dtype.element_ty), mask=inside)
