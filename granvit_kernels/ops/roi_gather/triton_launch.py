"""roi_gather by Triton kernels (triton_forward.py, triton_backward.py): how they are launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import launch
from ...launch import why_not

__all__ = ["Config", "backward", "forward", "why_not"]

FIXED = (1, 2)
"""Sampling ratios that have code of their own; others, adaptive ones included, share the general one."""


@dataclass(frozen=True)
class Config:
    """Of one launch, whose programs are warps: channels that a program holds, as `parts` vectors of `block_c`; tokens
    that it holds (backward)."""

    parts: int
    block_c: int
    tile: int = 4

    def programs(self, channels: int) -> int:
        """Those that share the channels."""
        return -(-channels // (self.parts * self.block_c))

    def options(self, channels: int, dtype: torch.dtype, sampling_ratio: int) -> dict[str, Any]:
        """What a kernel is compiled for.

        The limit on registers leaves a multiprocessor room for a third of the warps that it could hold; the general
        code and float32, which want more, for a quarter. Without one the compiler spills some to get by with fewer.
        """
        return {
            "WHOLE": channels % (self.parts * self.block_c) == 0, "PARTS": self.parts, "BLOCK_C": self.block_c,
            "maxnreg": 96 if dtype.itemsize == 2 and sampling_ratio in FIXED else 128, **ONE_WARP,
        }  # fmt: skip


ONE_WARP = {"num_warps": 1, "enable_fp_fusion": False}
"""Options of every kernel. A product and a sum are one operation where the kernel says so, by tl.fma, alone."""


def choose(kernel: str, channels: int, dtype: torch.dtype, sampling_ratio: int, device: torch.device) -> Config:
    """The least work: a program costs about as much as 384 channels do, whatever it holds. More than that, 12 a thread,
    would leave no room for other warps."""
    configs = [Config(parts, block) for parts in (1, 2, 3) for block in (32, 64, 128, 256) if parts * block <= 384]
    config = min(configs, key=lambda it: (it.programs(channels) * (384 + it.parts * it.block_c), it.parts))
    key = (channels, str(dtype).removeprefix("torch."), sampling_ratio)
    return launch.tuned(f"roi_gather_{kernel}", key, config, device)


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def forward(
    tokens: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
    out_h: int, out_w: int, sampling_ratio: int,
) -> Tensor:  # fmt: skip
    """As reference.forward."""
    from . import triton_forward

    tokens = tokens.contiguous()
    (regions, channels), images = (boxes.shape[0], tokens.shape[1]), grids.shape[0]
    output = tokens.new_empty(regions, out_h, out_w, channels)
    if output.numel() == 0 or images == 0:
        return output.zero_()
    config = choose("forward", channels, tokens.dtype, sampling_ratio, tokens.device)
    grids, cu_seqlens, boxes, image_index = _contiguous(grids, cu_seqlens, boxes, image_index)
    if sampling_ratio in FIXED:
        kernel, ratio = triton_forward.forward, {"SAMPLES": sampling_ratio}
    else:
        kernel, ratio = triton_forward.forward_any_ratio, {"ratio": sampling_ratio}
    with torch.cuda.device_of(tokens):
        kernel[(regions * out_h, config.programs(channels))](
            tokens=tokens, grids=grids, cu_seqlens=cu_seqlens, boxes=boxes, image_index=image_index, output=output,
            images=images, channels=channels, out_h=out_h, out_w=out_w, **ratio,
            **config.options(channels, tokens.dtype, sampling_ratio),
        )  # fmt: skip
    return output


def backward(
    grad: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
    num_tokens: int, sampling_ratio: int,
) -> Tensor:  # fmt: skip
    """As reference.backward. No atomics: equal bits in every run."""
    from ... import tiles
    from . import triton_backward

    grad = grad.contiguous()
    regions, out_h, out_w, channels = grad.shape
    grad_tokens = grad.new_empty(num_tokens, channels)
    if grad_tokens.numel() == 0:
        return grad_tokens
    config = choose("backward", channels, grad.dtype, sampling_ratio, grad.device)
    grids, cu_seqlens, boxes, image_index = _contiguous(grids, cu_seqlens, boxes, image_index)
    samples = sampling_ratio if sampling_ratio in FIXED else 0
    extents = boxes.new_empty(regions, 4, dtype=torch.int32)
    places = boxes.new_empty(regions, samples * (out_h + out_w))
    with torch.cuda.device_of(grad):
        plan = tiles.tile_tokens(cu_seqlens, image_index, num_tokens, config.tile)
        if regions:
            triton_backward.place_regions[(regions,)](
                regions=plan.regions, region_first=plan.first, grids=grids, boxes=boxes, image_index=image_index,
                extents=extents, places=places, images=grids.shape[0], out_h=out_h, out_w=out_w, ratio=sampling_ratio,
                SAMPLES=samples, **ONE_WARP,
            )  # fmt: skip
        triton_backward.backward[(plan.image.shape[0], config.programs(channels))](
            grad=grad, tile_image=plan.image, tile_token=plan.token, region_first=plan.first, regions=plan.regions,
            extents=extents, places=places, grids=grids, cu_seqlens=cu_seqlens, boxes=boxes, grad_tokens=grad_tokens,
            channels=channels, out_h=out_h, out_w=out_w, ratio=sampling_ratio, SAMPLES=samples, TILE=config.tile,
            **config.options(channels, grad.dtype, sampling_ratio),
        )  # fmt: skip
    return grad_tokens
