"""roi_gather's launchers, and its registration as granvit::roi_gather."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import backends, checks
from ...registration import Operator
from . import cpu, reference
from . import triton_launch as triton

CANDIDATES = {"roi_gather": {"triton": triton, "cpu": cpu, "reference": reference}}


def _backend(tensor: Tensor) -> Any:
    return backends.choose("roi_gather", CANDIDATES["roi_gather"], device=tensor.device, dtype=tensor.dtype)


def forward(
    tokens: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
    out_h: int, out_w: int, sampling_ratio: int,
) -> Tensor:  # fmt: skip
    """Tokens [T, C] -> [R, out_h, out_w, C]. On the CPU ValueError for a bad box or index."""
    checks.box_values(boxes, image_index, grids.shape[0])
    return _backend(tokens).forward(
        tokens, grids, cu_seqlens, boxes, image_index, out_h, out_w, sampling_ratio
    )


def backward(
    grad: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
    num_tokens: int, sampling_ratio: int,
) -> Tensor:  # fmt: skip
    """grad [R, out_h, out_w, C] -> the tokens' gradient [num_tokens, C]."""
    return _backend(grad).backward(grad, grids, cu_seqlens, boxes, image_index, num_tokens, sampling_ratio)


def _fake_forward(tokens, grids, cu_seqlens, boxes, image_index, out_h, out_w, sampling_ratio):
    return tokens.new_empty(boxes.shape[0], out_h, out_w, tokens.shape[1])


def _fake_backward(grad, grids, cu_seqlens, boxes, image_index, num_tokens, sampling_ratio):
    return grad.new_empty(num_tokens, grad.shape[3])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tokens, grids, cu_seqlens, boxes, image_index, _, _, ctx.sampling_ratio = inputs
    ctx.num_tokens = tokens.shape[0]
    ctx.save_for_backward(grids, cu_seqlens, boxes, image_index)


def _backward(run: Any, ctx: Any, grad: Tensor) -> tuple:
    return run(grad, *ctx.saved_tensors, ctx.num_tokens, ctx.sampling_ratio), *(None,) * 7


operator = Operator.define(
    "roi_gather(Tensor tokens, Tensor grids, Tensor cu_seqlens, Tensor boxes, Tensor image_index, "
    "SymInt out_h, SymInt out_w, int sampling_ratio) -> Tensor",
    forward,
    _fake_forward,
    backward_schema="roi_gather_backward(Tensor grad, Tensor grids, Tensor cu_seqlens, Tensor boxes, "
    "Tensor image_index, SymInt num_tokens, int sampling_ratio) -> Tensor",
    backward_launch=backward,
    backward_fake=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
)
