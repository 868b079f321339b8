"""region_pool by Triton kernels (triton_kernels.py): which program has which work, and the launches.

Forward: a program a region sums its weights from the logits alone; then one for each chunk of channels walks the cells
under the box once more and multiplies. Backward: a program a region for what its rows have in common; then one for each
tile of an image's tokens, which visits the regions that meet it, first for the logits' gradient, then for the value's.
No atomics.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
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
class Pool:
    """How programs walk boxes: channels of a program, cells at a time, warps, depth of the pipeline of loads."""

    block_c: int
    block_n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """How programs take a tile of tokens: channels at a time, warps, stages, and the most registers of a thread."""

    block_c: int
    warps: int
    stages: int
    registers: int


ROWS = 16
"""At a time in the backward kernels: a tile's weights of more take registers that would keep other programs away."""

LANES = 32
"""Regions at a time that a tile looks at, to find those that meet it."""

PROGRAMS = 8
"""Programs a multiprocessor that the launch for the value's gradient aims for."""


def _fitting(channels: int, most: int) -> int:
    """The largest block of channels, at most `most`, of which no more than a quarter idles."""
    block = most
    while block > 16 and -channels % block * 4 > channels + -channels % block:
        block //= 2
    return block


def _pool(rows: int, heads: int, channels: int, dtype: torch.dtype) -> Pool:
    """The default for a block of `rows` rows, padded. Accumulators take 32 to 64 registers of a thread."""
    if dtype == torch.float32:
        return Pool(block_c=_fitting(channels, 128 if rows <= 32 else 64), block_n=32, warps=4, stages=1)
    return Pool(block_c=_fitting(channels, 256 if rows <= 32 else 128), block_n=32, warps=4, stages=2)


def _logits(rows: int, heads: int, channels: int, dtype: torch.dtype) -> Tiles:
    """Three programs of 168 registers fit a multiprocessor; ptxas, left alone, spills a few to fit four."""
    stages, registers = 1 if dtype == torch.float32 else 2, 168 if heads == 1 else 255
    return Tiles(block_c=_fitting(channels, 64), warps=4, stages=stages, registers=registers)


def _value(rows: int, heads: int, channels: int, dtype: torch.dtype) -> Tiles:
    """Half of a thread's registers accumulate. With 128 of them four programs fit a multiprocessor, one more than
    ptxas, left alone, would have; several blocks of rows, or heads with values of their own, need more on Ampere."""
    if dtype == torch.float32:
        return Tiles(block_c=_fitting(channels, 64), warps=4, stages=1, registers=255)
    registers = 128 if heads == 1 and rows <= ROWS else 255
    return Tiles(block_c=_fitting(channels, 128), warps=4, stages=1, registers=registers)


def forward(
    logits: Tensor, value: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
    coverage: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As reference.forward."""
    shape = (boxes.shape[0], *logits.shape[1:])
    output = value.new_empty((*shape, value.shape[2]))
    lse = value.new_empty(shape, dtype=torch.float32)
    if not output.numel() or not value.numel():
        return output.zero_(), lse.fill_(-math.inf)
    call, kernels = _Call(logits, value, grids, cu_seqlens, boxes, image_index, coverage), _kernels()
    config = call.tuned("forward", _pool)
    chunks = -(-call.channels // config.block_c)
    with torch.cuda.device_of(value):
        shift, areas, origins = call.weigh(kernels, lse)
        kernels.pool[(call.regions * chunks, call.row_blocks)](
            logits=call.logits, value=call.value, shift=shift, areas=areas, origins=origins, output=output,
            value_token=call.value_token, chunks=chunks, **call.sizes, UNIT=call.unit, BLOCK_R=call.block_r,
            BLOCK_C=config.block_c, BLOCK_N=config.block_n, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return output, lse


def backward(
    grad_output: Tensor, grad_lse: Tensor, logits: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor, coverage: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As reference.backward."""
    grad_logits, grad_value = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (logits, value))
    if not output.numel() or not value.numel():
        return grad_logits.zero_(), grad_value.zero_()
    from ...tiles import tile_tokens

    call, kernels = _Call(logits, value, grids, cu_seqlens, boxes, image_index, coverage), _kernels()
    grad_output = grad_output.contiguous()
    delta, block_d = torch.empty_like(lse), min(power_of_two(call.size), 4096 // call.block_r)
    with torch.cuda.device_of(value):
        # Anew, not from lse: rounding that the logarithm of a tiny share brought would be in every weight.
        shift, areas, _ = call.weigh(kernels, torch.empty_like(lse))
        kernels.compare[(call.regions, call.row_blocks)](
            grad_output=grad_output, grad_lse=grad_lse.contiguous(), output=output.contiguous(),
            delta=delta, ROWS=call.rows, SIZE=call.size, BLOCK_R=call.block_r, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
        block_t = 32 if value.dtype == torch.float32 else 64
        tiles = tile_tokens(call.place["cu_seqlens"], call.place["image_index"], len(value), block_t)
        common = dict(
            grad_output=grad_output, logits=call.logits, shift=shift, delta=delta, areas=areas,
            grids=call.place["grids"], cu_seqlens=call.place["cu_seqlens"], tile_image=tiles.image,
            tile_token=tiles.token, region_first=tiles.first, image_regions=tiles.regions,
            **call.sizes, LANES=LANES, BLOCK_T=block_t, BLOCK_R=ROWS,
        )  # fmt: skip
        config, count = call.tuned("backward_logits", _logits), len(tiles.image)
        chunks = -(-call.channels // config.block_c)
        kernels.backward_logits[(count, -(-call.rows // ROWS))](
            **common, value=call.value, value_token=call.value_token, UNIT=call.unit, grad_logits=grad_logits,
            chunks=chunks, BLOCK_C=config.block_c,
            num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        )  # fmt: skip
        config = call.tuned("backward_value", _value)
        chunks = -(-call.channels // config.block_c)
        kernels.backward_value[(count, _slices(count, chunks, value.device))](
            **common, grad_value=grad_value, chunks=chunks,
            BLOCK_C=config.block_c, num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        )  # fmt: skip
    return grad_logits, grad_value


def _slices(tiles: int, chunks: int, device: torch.device) -> int:
    """Programs that share a tile's chunks of channels: 1 where the tiles alone fill the chip."""
    return min(-(-PROGRAMS * launch.multiprocessors(device) // tiles), chunks)


class _Call:
    """What the launches of one call have in common: tensors as the kernels take them, and sizes."""

    def __init__(
        self, logits: Tensor, value: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
        coverage: bool,
    ):  # fmt: skip
        self.coverage, (self.heads, self.size) = coverage, value.shape[1:]
        # A token's heads side by side.
        dense = value.stride(2) == 1 and (self.heads == 1 or value.stride(1) == self.size)
        self.logits, self.value = logits.contiguous(), value if dense else value.contiguous()
        self.place = dict(
            grids=grids.contiguous(), cu_seqlens=cu_seqlens.contiguous(), boxes=boxes.contiguous(),
            image_index=image_index.contiguous(), images=grids.shape[0],
        )  # fmt: skip
        self.regions, self.rows, self.channels = len(boxes), math.prod(logits.shape[1:]), self.heads * self.size
        self.sizes = dict(ROWS=self.rows, HEADS=self.heads, SIZE=self.size)
        self.block_r = min(max(power_of_two(self.rows), 16), 64)
        self.row_blocks = -(-self.rows // self.block_r)
        # Triton sees that 16 divides an argument, and no smaller number; a vector of 72 channels needs 8. A stride of
        # 64 bits goes whole: what is left of it would pass as 32, and its product with the unit overflow.
        stride = self.value.stride(0)
        self.unit = math.gcd(16, stride) if stride < 2**31 else 1
        self.value_token = stride // self.unit

    def weigh(self, kernels: SimpleNamespace, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Writes lse; returns shift, areas and origins, as the kernel `weigh` has them."""
        boxes = self.place["boxes"]
        shift, areas = torch.empty_like(lse), torch.empty_like(boxes)
        origins = boxes.new_empty((self.regions, 2), dtype=torch.int32)
        kernels.weigh[(self.regions, self.row_blocks)](
            logits=self.logits, **self.place, lse=lse, shift=shift, areas=areas, origins=origins,
            ROWS=self.rows, BLOCK_R=self.block_r, BLOCK_N=2048 // self.block_r, COVERAGE=self.coverage, num_warps=4,
        )  # fmt: skip
        return shift, areas, origins

    def tuned(self, kernel: str, default: Callable[[int, int, int, torch.dtype], Any]) -> Any:
        dtype = self.value.dtype
        key = (self.block_r, self.heads, self.channels, str(dtype).removeprefix("torch."))
        usual = default(self.block_r, self.heads, self.channels, dtype)
        return launch.tuned(f"region_pool_{kernel}", key, usual, self.value.device)


@functools.cache
def _kernels() -> SimpleNamespace:
    """triton_kernels, imported here: the package works without triton."""
    from . import triton_kernels

    return triton_kernels
