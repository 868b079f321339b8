"""region_attention by Triton kernels (triton_kernels.py): which program has which work, and the launches.

Forward, and backward for the queries: a program a region, head and block of queries, which walks the cells of the
region's box; several of them share a large box where there are too few to fill the chip. Backward for keys and
values: a program a tile of an image's tokens and head, which visits the image's regions. No atomics.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ... import launch
from ...launch import power_of_two
from ...launch import products_why_not as why_not

__all__ = ["backward", "forward", "why_not"]


@dataclass(frozen=True)
class Walk:
    """How programs walk boxes: cells at a time, warps of a program, depth of the pipeline of loads."""

    block_n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tokens:
    """How programs take tiles of tokens: tokens of a tile, columns (queries of regions) at a time, warps, stages."""

    block_t: int
    block_m: int
    warps: int
    stages: int


def _walk(queries: int, size: int, dtype: torch.dtype, coverage: bool = False) -> Walk:
    """The default for a block of `queries` queries and heads of `size`, both padded. Sizes are what the compiler fits
    into registers (bench/results/aot.json), not yet what a clock prefers.

    A warp has 16 rows of a 16-bit product: one warp a program for few queries repeats nothing, and many programs a
    multiprocessor hide each other's waiting. float32 has no such product, and shares its work out among threads.
    coverage: backward, shares of cells take registers too, so fewer cells go by at a time.
    """
    if dtype == torch.float32:
        if size <= 64:
            return Walk(block_n=16, warps=4, stages=2)
        return Walk(block_n=32 if size <= 128 else 16, warps=8, stages=1)
    if size <= 128:
        many = size <= 32 or (size <= 64 and not coverage) or queries > 32
        return Walk(block_n=32 if many else 16, warps=max(queries // 16, 1), stages=2)
    return Walk(block_n=32 if queries > 16 else 16, warps=queries // 8, stages=2)


def _tokens(queries: int, size: int, dtype: torch.dtype) -> Tokens:
    if dtype == torch.float32:
        return Tokens(block_t=32 if size <= 128 else 16, block_m=16, warps=4 if size <= 64 else 8, stages=1)
    return Tokens(block_t=64 if size <= 64 else 32, block_m=16, warps=4 if size <= 128 else 8, stages=1)


PROGRAMS = 8
"""Programs a multiprocessor that a walk's launch aims for: each keeps a few KiB of keys and values on their way."""

MOST_SPLITS = 64


EVERY_REGISTER = 255
"""A thread's at most: all that it can have, where ptxas, left alone, spills a few to fit one more program."""


def _splits(programs: int, num_tokens: int, block_n: int, device: torch.device) -> int:
    """Programs that share one box: 1 where `programs` alone fill the chip. From what the host knows."""
    fitting = max(num_tokens // (4 * block_n), 1)  # a piece of fewer blocks is not worth a program
    return max(min(PROGRAMS * launch.multiprocessors(device) // max(programs, 1), fitting, MOST_SPLITS), 1)


def forward(
    query: Tensor, key: Tensor, value: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor,
    image_index: Tensor, scale: float, coverage: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As reference.forward."""
    shape = (boxes.shape[0], *query.shape[-3:])
    output, lse = query.new_empty(shape), query.new_empty(shape[:3], dtype=torch.float32)
    if not output.numel() or not key.numel():
        return output.zero_(), lse.fill_(-math.inf)
    call = _Call(query, key, value, grids, cu_seqlens, boxes, image_index)
    walk = call.tuned("forward", _walk)
    splits = call.splits(walk)
    kernels, grid = _kernels(), call.grid(splits)
    if splits > 1:
        part = query.new_empty((splits, *shape), dtype=torch.float32)
        # Two tensors: where the second half of one begins, and whether 16 divides it, would change with the batch.
        part_max, part_sum = (query.new_empty((splits, *shape[:3]), dtype=torch.float32) for _ in range(2))
    else:
        part, part_max, part_sum = output, lse, lse
    with torch.cuda.device_of(query):
        kernels.forward_walk[grid](
            **call.tensors, **call.place, output=part, lse=part_sum, part_max=part_max,
            scale=scale, **call.counts, **call.strides, splits=splits,
            **call.constants, BLOCK_K=call.block_k, BLOCK_N=walk.block_n,
            COVERAGE=coverage, SPLIT=splits > 1, num_warps=walk.warps, num_stages=walk.stages,
        )  # fmt: skip
        if splits > 1:
            kernels.merge[call.grid(1)](
                part=part, part_sum=part_sum, part_max=part_max, **call.place, output=output, lse=lse,
                **call.counts, splits=splits,
                SIZE=call.size, BLOCK_D=call.block_d, BLOCK_K=call.block_k, COVERAGE=coverage, num_warps=4,
            )  # fmt: skip
    return output, lse


def backward(
    grad_output: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    lse: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor, scale: float,
    coverage: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As reference.backward."""
    grad_key, grad_value = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (key, value))
    if not output.numel() or not key.numel():
        return query.new_zeros(query.shape), grad_key.zero_(), grad_value.zero_()
    from ...tiles import tile_tokens

    call = _Call(query, key, value, grids, cu_seqlens, boxes, image_index)
    grad_output, grad_lse, output, lse = (t.contiguous() for t in (grad_output, grad_lse, output, lse))
    walk = call.tuned("backward_walk", functools.partial(_walk, coverage=coverage))
    tokens = call.tuned("backward_tokens", _tokens)
    splits = call.splits(walk)
    shared = query.dim() == 3
    # What is added up over regions or splits is so in float32, in an order that never changes.
    summed = shared or splits > 1
    grad_query = query.new_empty((splits, *output.shape), dtype=torch.float32 if summed else query.dtype)
    delta, areas, log_shares = torch.empty_like(lse), torch.empty_like(call.place["boxes"]), boxes.new_empty(len(boxes))
    kernels = _kernels()
    with torch.cuda.device_of(query):
        kernels.backward_walk[call.grid(splits)](
            grad_output=grad_output, grad_lse=grad_lse, **call.tensors, output=output, lse=lse, **call.place,
            grad_query=grad_query, delta=delta, areas=areas, log_shares=log_shares,
            scale=scale, **call.counts, **call.strides, splits=splits,
            **call.constants, BLOCK_K=call.block_k, BLOCK_N=walk.block_n,
            COVERAGE=coverage, num_warps=walk.warps, num_stages=walk.stages,
            maxnreg=EVERY_REGISTER if coverage or call.size > (64 if call.queries > 32 else 128) else None,
        )  # fmt: skip
        tiles = tile_tokens(call.place["cu_seqlens"], call.place["image_index"], key.shape[0], tokens.block_t)
        kernels.backward_tokens[(tiles.image.shape[0] * call.heads,)](
            grad_output=grad_output, **call.tensors, lse=lse, delta=delta, areas=areas, log_shares=log_shares,
            grids=call.place["grids"], cu_seqlens=call.place["cu_seqlens"],
            tile_image=tiles.image, tile_token=tiles.token, region_first=tiles.first, image_regions=tiles.regions,
            grad_key=grad_key, grad_value=grad_value,
            scale=scale, queries=call.queries, heads=call.heads, **call.strides,
            **call.constants, BLOCK_T=tokens.block_t, BLOCK_M=tokens.block_m,
            num_warps=tokens.warps, num_stages=tokens.stages, maxnreg=EVERY_REGISTER,
        )  # fmt: skip
    if shared:
        grad_query = grad_query.flatten(0, 1).sum(0).to(query.dtype)
    else:
        grad_query = grad_query.sum(0).to(query.dtype) if splits > 1 else grad_query[0]
    return grad_query, grad_key, grad_value


class _Call:
    """What the launches of one call have in common: tensors as the kernels take them, sizes, constants; in dicts, by
    the kernels' names for them."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor,
        image_index: Tensor,
    ):  # fmt: skip
        # Of key and value, only the last dimension has to be dense.
        key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
        self.tensors = dict(query=query.contiguous(), key=key, value=value)
        self.place = dict(
            grids=grids.contiguous(), cu_seqlens=cu_seqlens.contiguous(), boxes=boxes.contiguous(),
            image_index=image_index.contiguous(),
        )  # fmt: skip
        self.regions, self.tokens, self.dtype, self.device = boxes.shape[0], key.shape[0], key.dtype, key.device
        self.queries, self.heads, self.size = query.shape[-3:]
        self.counts = dict(images=grids.shape[0], regions=self.regions, queries=self.queries, heads=self.heads)
        strides = [*key.stride()[:2], *value.stride()[:2]]
        # Triton sees that 16 divides an argument, and no smaller number; a vector of a head of 72 needs 8. Where
        # one needs 64 bits all go whole: what is left of it would pass as 32, and its product with the unit overflow.
        unit = math.gcd(16, *strides) if max(strides) < 2**31 else 1
        names = ("key_token", "key_head", "value_token", "value_head")
        self.strides = {name: stride // unit for name, stride in zip(names, strides, strict=True)}
        # Not query.stride(0): one region counts as contiguous with any stride.
        self.strides["query_stride"] = math.prod(query.shape[1:]) if query.dim() == 4 else 0
        most = 16 if query.dtype == torch.float32 else 64  # a block's queries; more make more programs
        self.block_k = min(max(power_of_two(self.queries), 16), most)
        self.block_d = max(power_of_two(self.size), 16)
        self.constants = dict(SIZE=self.size, BLOCK_D=self.block_d, UNIT=unit)

    def grid(self, splits: int) -> tuple[int, int, int]:
        return self.regions * self.heads, splits, -(-self.queries // self.block_k)

    def splits(self, walk: Walk) -> int:
        return _splits(math.prod(self.grid(1)), self.tokens, walk.block_n, self.device)

    def tuned(self, kernel: str, default: Any) -> Any:
        key = (self.block_k, self.size, str(self.dtype).removeprefix("torch."))
        usual = default(self.block_k, self.block_d, self.dtype)
        return launch.tuned(f"region_attention_{kernel}", key, usual, self.device)


@functools.cache
def _kernels() -> SimpleNamespace:
    """triton_kernels, imported here: the package works without triton."""
    from . import triton_kernels

    return triton_kernels
