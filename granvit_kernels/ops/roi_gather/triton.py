"""roi_gather by Triton kernels (triton_kernels.py): how they are launched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import launch
from ...launch import why_not

__all__ = ["Config", "backward", "forward", "why_not"]

FIXED = (1, 2)
"""Sampling ratios that have code of their own; others, adaptive ones included, share the general one."""


@dataclass(frozen=True)
class Config:
    """Of one launch: channels a program holds, tokens a program holds (backward), warps."""

    block_c: int
    tile: int
    warps: int


def choose(kernel: str, channels: int, dtype: torch.dtype, sampling_ratio: int, device: torch.device) -> Config:
    """16 bytes a thread of one warp, or the power of two that wastes less than an eighth of the channels.

    A tile's tokens read a bin's gradient once for all that it touches; two a sample keep within the registers of every
    architecture. The general code takes one token.
    """
    elements = 16 // dtype.itemsize
    block = 32 * elements
    while block > 32 and -channels % block * 8 > channels:
        block //= 2
    tile = 2 * sampling_ratio if sampling_ratio in FIXED else 1
    key = (channels, str(dtype).removeprefix("torch."), sampling_ratio)
    return launch.tuned(f"roi_gather_{kernel}", key, Config(block, tile, 1), device)


def _samples(sampling_ratio: int) -> int:
    """The kernels' SAMPLES."""
    return sampling_ratio if sampling_ratio in FIXED else 0


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def forward(
    tokens: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
    out_h: int, out_w: int, sampling_ratio: int,
) -> Tensor:  # fmt: skip
    """As reference.forward."""
    from . import triton_kernels

    tokens = tokens.contiguous()
    (regions, channels), images = (boxes.shape[0], tokens.shape[1]), grids.shape[0]
    output = tokens.new_empty(regions, out_h, out_w, channels)
    if output.numel() == 0 or images == 0:
        return output.zero_()
    config = choose("forward", channels, tokens.dtype, sampling_ratio, tokens.device)
    grids, cu_seqlens, boxes, image_index = _contiguous(grids, cu_seqlens, boxes, image_index)
    grid = (regions * out_h, -(-channels // config.block_c))
    with torch.cuda.device_of(tokens):
        triton_kernels.forward[grid](
            tokens=tokens, grids=grids, cu_seqlens=cu_seqlens, boxes=boxes, image_index=image_index, output=output,
            images=images, channels=channels, out_h=out_h, out_w=out_w, ratio=sampling_ratio,
            SAMPLES=_samples(sampling_ratio), BLOCK_C=config.block_c, num_warps=config.warps, enable_fp_fusion=False,
        )  # fmt: skip
    return output


def backward(
    grad: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
    num_tokens: int, sampling_ratio: int,
) -> Tensor:  # fmt: skip
    """As reference.backward. No atomics: equal bits in every run."""
    from ... import tiles
    from . import triton_kernels

    grad = grad.contiguous()
    _, out_h, out_w, channels = grad.shape
    grad_tokens = grad.new_empty(num_tokens, channels)
    if grad_tokens.numel() == 0:
        return grad_tokens
    config = choose("backward", channels, grad.dtype, sampling_ratio, grad.device)
    grids, cu_seqlens, boxes, image_index = _contiguous(grids, cu_seqlens, boxes, image_index)
    with torch.cuda.device_of(grad):
        plan = tiles.tile_tokens(cu_seqlens, image_index, num_tokens, config.tile)
        grid = (plan.image.shape[0], -(-channels // config.block_c))
        triton_kernels.backward[grid](
            grad=grad, tile_image=plan.image, tile_token=plan.token, region_first=plan.first, regions=plan.regions,
            grids=grids, cu_seqlens=cu_seqlens, boxes=boxes, grad_tokens=grad_tokens,
            channels=channels, out_h=out_h, out_w=out_w, ratio=sampling_ratio,
            SAMPLES=_samples(sampling_ratio), TILE=config.tile, BLOCK_C=config.block_c, num_warps=config.warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    return grad_tokens
