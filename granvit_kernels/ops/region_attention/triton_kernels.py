"""The Triton kernels of region_attention. triton.py launches them and says which program has which work.

Logits, softmax and accumulators are float32; products take the storage dtype, for which there are tensor cores.
Logits stay in natural units, and every one passes a tl.where before something is subtracted from it: so the
compiler can't contract the product with the scale into the subtraction, and forward and backward see the same
logits, however large.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common import INDICES, finite_box, load_box

LOG2E = tl.constexpr(1.4426950408889634)

# Triton makes a constant of a 1: of these it would only compile the same once more.
NUMBERS = ["images", "regions", "queries", "heads", "splits"]


@triton.jit
def _exp(x):
    """e**x. tl.exp keeps denormal results too, at twice the instructions."""
    return tl.exp2(x * LOG2E)


@triton.jit
def _covered_cells(x1, y1, x2, y2, width, height, exists):
    """(row0, row1, column0, column1) as reference.covered_cells; nothing where `exists` is false."""
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
def _image(grids, cu_seqlens, image_index, region, images):
    """Of a region's image: its first token, width and height; and whether there is such an image."""
    image = tl.load(image_index + region).to(tl.int64)
    exists = (image >= 0) & (image < images)
    start = tl.load(cu_seqlens + image, mask=exists, other=0)
    width = tl.load(grids + image * 2 + 1, mask=exists, other=0)
    height = tl.load(grids + image * 2, mask=exists, other=0)
    return start, width, height, exists


@triton.jit
def _share(low, high, cell):
    """Log of the share of [cell, cell + 1] that [low, high] covers. Cells outside give anything."""
    cell = cell.to(tl.float32)
    return tl.log(tl.maximum(tl.minimum(high, cell + 1) - tl.maximum(low, cell), 0.0))


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
def _offset(y, x, width, SHORT: tl.constexpr):
    """Tokens from a box's first cell. SHORT: times the stride, it fits 32 bits, and a wider product costs more."""
    offset = y * width + x
    return offset if SHORT else offset.to(tl.int64)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def forward_walk(
    query, key, value, grids, cu_seqlens, boxes, image_index, output, lse, part_max,
    scale, images, regions, queries, heads, query_stride, key_token, key_head, value_token, value_head, splits,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
    SHORT: tl.constexpr, COVERAGE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One region, head, block of queries and split: BLOCK_K queries walk the cells of the region's box.

    SPLIT: leave the sums unnormalised, output [splits, R, K, H, D], lse (their weight) and part_max [splits, R, K, H],
    for `merge`. Strides of key and value come divided by UNIT.
    """
    head = tl.program_id(0) % heads  # fastest: the heads of a token lie side by side
    region = tl.program_id(0) // heads
    split = tl.program_id(1)
    start, width, height, exists = _image(grids, cu_seqlens, image_index, region, images)
    x1, y1, x2, y2 = load_box(boxes, region)
    row0, row1, column0, column1 = _covered_cells(x1, y1, x2, y2, width, height, exists)
    columns = column1 - column0
    cells = (row1 - row0) * columns
    begin, end = _piece(cells, split, splits, BLOCK_N)

    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    row = (region.to(tl.int64) * queries + k) * heads + head
    inside = (k < queries)[:, None] & (d < SIZE)[None, :]
    at = region.to(tl.int64) * query_stride + (k * heads + head) * SIZE
    q = tl.load(query + at[:, None] + d[None, :], mask=inside, other=0.0)
    token = start.to(tl.int64) + row0.to(tl.int64) * width + column0
    key += token * (key_token * UNIT) + head.to(tl.int64) * (key_head * UNIT)
    value += token * (value_token * UNIT) + head.to(tl.int64) * (value_head * UNIT)

    # Each lane steps from cell to cell without dividing again.
    lane = tl.arange(0, BLOCK_N)
    wide = tl.maximum(columns, 1)
    y, x = (begin + lane) // wide, (begin + lane) % wide
    step_y, step_x = BLOCK_N // wide, BLOCK_N % wide

    most = tl.full([BLOCK_K], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        offset = _offset(y, x, width, SHORT)
        read = (first + lane < end)[:, None] & (d < SIZE)[None, :]
        keys = tl.load(key + (offset * (key_token * UNIT))[:, None] + d[None, :], mask=read, other=0.0)
        values = tl.load(value + (offset * (value_token * UNIT))[:, None] + d[None, :], mask=read, other=0.0)
        logits = _logits(q, keys) * scale
        if COVERAGE:
            logits += (_share(y1, y2, row0 + y) + _share(x1, x2, column0 + x))[None, :]
        logits = tl.where((first + lane < end)[None, :], logits, float("-inf"))
        larger = tl.maximum(most, tl.max(logits, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # -inf - -inf is no number
        p = _exp(logits - shift[:, None])
        shrink = _exp(most - shift)
        total = total * shrink + tl.sum(p, 1)
        acc *= shrink[:, None]
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision="ieee")
        most = larger
        x += step_x
        y += step_y + (x >= wide).to(tl.int32)
        x = tl.where(x >= wide, x - wide, x)

    if SPLIT:
        row += split.to(tl.int64) * regions * queries * heads
        tl.store(part_max + row, most, mask=k < queries)
        tl.store(lse + row, total, mask=k < queries)
        tl.store(output + (row * SIZE)[:, None] + d[None, :], acc, mask=inside)
    else:
        # Without a cell: zeros. With cells, but no logit above -inf: 0 / 0, as softmax has it.
        total = tl.where(cells > 0, total, 1.0)
        tl.store(lse + row, tl.where(cells > 0, most + tl.log(total), float("-inf")), mask=k < queries)
        acc = acc / total[:, None]
        tl.store(output + (row * SIZE)[:, None] + d[None, :], acc.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def merge(
    part, part_sum, part_max, grids, cu_seqlens, boxes, image_index, output, lse,
    images, regions, queries, heads, splits,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One region, head and block of queries: the sums that `forward_walk` left, added in the splits' order."""
    head, region = tl.program_id(0) % heads, tl.program_id(0) // heads
    _, width, height, exists = _image(grids, cu_seqlens, image_index, region, images)
    x1, y1, x2, y2 = load_box(boxes, region)
    row0, row1, _, _ = _covered_cells(x1, y1, x2, y2, width, height, exists)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    row = (region.to(tl.int64) * queries + k) * heads + head
    inside = (k < queries)[:, None] & (d < SIZE)[None, :]
    all_rows = regions.to(tl.int64) * queries * heads

    most = tl.full([BLOCK_K], float("-inf"), tl.float32)
    for split in range(splits):
        most = tl.maximum(most, tl.load(part_max + split * all_rows + row, mask=k < queries, other=float("-inf")))
    shift = tl.where(most == float("-inf"), 0.0, most)
    total = tl.zeros([BLOCK_K], tl.float32)
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for split in range(splits):
        at = split * all_rows + row
        weight = _exp(tl.load(part_max + at, mask=k < queries, other=float("-inf")) - shift)
        total += weight * tl.load(part_sum + at, mask=k < queries, other=0.0)
        acc += weight[:, None] * tl.load(part + (at * SIZE)[:, None] + d[None, :], mask=inside, other=0.0)
    total = tl.where(row1 > row0, total, 1.0)
    tl.store(lse + row, tl.where(row1 > row0, most + tl.log(total), float("-inf")), mask=k < queries)
    acc = acc / total[:, None]
    tl.store(output + (row * SIZE)[:, None] + d[None, :], acc.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def backward_walk(
    grad_output, grad_lse, query, key, value, output, lse, grids, cu_seqlens, boxes, image_index, grad_query, delta,
    covered, scale, images, regions, queries, heads, query_stride, key_token, key_head, value_token, value_head, splits,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
    SHORT: tl.constexpr, COVERAGE: tl.constexpr,
):  # fmt: skip
    """The forward's walk again, for the queries' gradient: grad_query [splits, R, K, H, D].

    For `backward_tokens`: delta [R, K, H] = sum(grad_output * output) - grad_lse, and covered int32 [R, 4], each
    region's row0, row1, column0 and column1.
    """
    head, region, split = tl.program_id(0) % heads, tl.program_id(0) // heads, tl.program_id(1)
    start, width, height, exists = _image(grids, cu_seqlens, image_index, region, images)
    x1, y1, x2, y2 = load_box(boxes, region)
    row0, row1, column0, column1 = _covered_cells(x1, y1, x2, y2, width, height, exists)
    columns = column1 - column0
    cells = (row1 - row0) * columns
    begin, end = _piece(cells, split, splits, BLOCK_N)

    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    row = (region.to(tl.int64) * queries + k) * heads + head
    inside = (k < queries)[:, None] & (d < SIZE)[None, :]
    at = region.to(tl.int64) * query_stride + (k * heads + head) * SIZE
    q = tl.load(query + at[:, None] + d[None, :], mask=inside, other=0.0)
    g = tl.load(grad_output + (row * SIZE)[:, None] + d[None, :], mask=inside, other=0.0)
    out = tl.load(output + (row * SIZE)[:, None] + d[None, :], mask=inside, other=0.0)
    dot = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    change = dot - tl.load(grad_lse + row, mask=k < queries, other=0.0)
    if split == 0:
        tl.store(delta + row, change, mask=k < queries)
        if (head == 0) & (tl.program_id(2) == 0):
            covered += region.to(tl.int64) * 4
            tl.store(covered, row0)
            tl.store(covered + 1, row1)
            tl.store(covered + 2, column0)
            tl.store(covered + 3, column1)
    shift = tl.load(lse + row, mask=k < queries, other=float("inf"))
    shift = tl.where(shift == float("-inf"), float("inf"), shift)  # no logit above -inf: no weights
    token = start.to(tl.int64) + row0.to(tl.int64) * width + column0
    key += token * (key_token * UNIT) + head.to(tl.int64) * (key_head * UNIT)
    value += token * (value_token * UNIT) + head.to(tl.int64) * (value_head * UNIT)

    lane = tl.arange(0, BLOCK_N)
    wide = tl.maximum(columns, 1)
    y, x = (begin + lane) // wide, (begin + lane) % wide
    step_y, step_x = BLOCK_N // wide, BLOCK_N % wide

    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        offset = _offset(y, x, width, SHORT)
        read = (first + lane < end)[:, None] & (d < SIZE)[None, :]
        keys = tl.load(key + (offset * (key_token * UNIT))[:, None] + d[None, :], mask=read, other=0.0)
        values = tl.load(value + (offset * (value_token * UNIT))[:, None] + d[None, :], mask=read, other=0.0)
        logits = _logits(q, keys) * scale
        if COVERAGE:
            logits += (_share(y1, y2, row0 + y) + _share(x1, x2, column0 + x))[None, :]
        logits = tl.where((first + lane < end)[None, :], logits, float("-inf"))
        p = _exp(logits - shift[:, None])
        through_value = tl.dot(g, tl.trans(values), input_precision="ieee")
        grad_logits = p * (through_value - change[:, None])
        acc = tl.dot(grad_logits.to(keys.dtype), keys, acc, input_precision="ieee")
        x += step_x
        y += step_y + (x >= wide).to(tl.int32)
        x = tl.where(x >= wide, x - wide, x)

    row += split.to(tl.int64) * regions * queries * heads
    acc = (acc * scale).to(grad_query.dtype.element_ty)
    tl.store(grad_query + (row * SIZE)[:, None] + d[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def backward_tokens(
    grad_output, query, key, value, lse, delta, covered, grids, cu_seqlens, boxes,
    tile_image, tile_token, region_first, image_regions, grad_key, grad_value,
    scale, queries, heads, query_stride, key_token, key_head, value_token, value_head,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, UNIT: tl.constexpr,
    COVERAGE: tl.constexpr,
):  # fmt: skip
    """One tile of an image's tokens and a head: their gradients, from all of the image's regions in their order.

    The tile's keys and values stay; BLOCK_M columns at a time go by, a column being one query of one region, so that
    regions of few queries share a block.
    """
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    image = tl.load(tile_image + tile)
    if image < 0:
        return
    width = tl.load(grids + image * 2 + 1)
    start, stop = tl.load(cu_seqlens + image), tl.load(cu_seqlens + image + 1)
    token = tl.load(tile_token + tile) + tl.arange(0, BLOCK_T)
    cell = token - start
    y, x = cell // width, cell % width
    # The box around the tile: what it does not meet need not be computed.
    low = tl.load(tile_token + tile) - start
    high = tl.minimum(low + BLOCK_T, stop - start) - 1
    top, bottom = low // width, high // width
    left = tl.where(top == bottom, low % width, 0)
    right = tl.where(top == bottom, high % width, width - 1)

    d = tl.arange(0, BLOCK_D)
    inside = (token < stop)[:, None] & (d < SIZE)[None, :]
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
        row0, row1, column0, column1 = load_box(covered, region)
        near = (column < columns) & (row0 <= bottom) & (row1 > top) & (column0 <= right) & (column1 > left)
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

            met = (y[:, None] >= row0[None, :]) & (y[:, None] < row1[None, :])
            met &= (x[:, None] >= column0[None, :]) & (x[:, None] < column1[None, :])
            logits = _logits(keys, q) * scale
            if COVERAGE:
                x1, y1, x2, y2 = load_box(boxes, region)
                logits += _share(y1[None, :], y2[None, :], y[:, None]) + _share(x1[None, :], x2[None, :], x[:, None])
            p = _exp(tl.where(met, logits, float("-inf")) - shift[None, :])
            p = tl.where(met, p, 0.0)
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
