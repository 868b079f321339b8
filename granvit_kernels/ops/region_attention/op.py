"""region_attention's launchers, and its registration as granvit::region_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import backends, checks
from ...registration import Operator
from . import cpu, reference, triton_launch

CANDIDATES = {"region_attention": {"triton": triton_launch, "cpu": cpu, "reference": reference}}


def _backend(query: Tensor) -> Any:
    candidates = CANDIDATES["region_attention"]
    return backends.choose("region_attention", candidates, device=query.device, dtype=query.dtype)


def forward(
    query: Tensor, key: Tensor, value: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor,
    image_index: Tensor, scale: float, coverage: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output [R, K, H, D], lse [R, K, H]), contiguous. On the CPU ValueError for a bad box or index."""
    checks.box_values(boxes, image_index, grids.shape[0])
    return _backend(query).forward(query, key, value, grids, cu_seqlens, boxes, image_index, scale, coverage)


def backward(
    grad_output: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    lse: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor, scale: float,
    coverage: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, contiguous, each in its tensor's shape and dtype."""
    return _backend(query).backward(
        grad_output, grad_lse, query, key, value, output, lse, grids, cu_seqlens, boxes, image_index,
        scale, coverage,
    )  # fmt: skip


def _fake_forward(query, key, value, grids, cu_seqlens, boxes, image_index, scale, coverage):
    shape = (boxes.shape[0], *query.shape[-3:])
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(shape), query.new_empty(shape[:3], dtype=wide)


def _fake_backward(grad_output, grad_lse, query, key, value, *_):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, grids, cu_seqlens, boxes, image_index, ctx.scale, ctx.coverage = inputs
    ctx.save_for_backward(query, key, value, *output, grids, cu_seqlens, boxes, image_index)


def _backward(run: Any, ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple:
    return *run(grad_output, grad_lse, *ctx.saved_tensors, ctx.scale, ctx.coverage), *(None,) * 6


_LAYOUT_AND_BOXES = (
    "Tensor grids, Tensor cu_seqlens, Tensor boxes, Tensor image_index, float scale, bool coverage"
)

operator = Operator.define(
    f"region_attention(Tensor query, Tensor key, Tensor value, {_LAYOUT_AND_BOXES}) -> (Tensor, Tensor)",
    forward,
    _fake_forward,
    backward_schema="region_attention_backward(Tensor grad_output, Tensor grad_lse, Tensor query, "
    f"Tensor key, Tensor value, Tensor output, Tensor lse, {_LAYOUT_AND_BOXES}) -> (Tensor, Tensor, Tensor)",
    backward_launch=backward,
    backward_fake=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=(0, 1, 2),
)
