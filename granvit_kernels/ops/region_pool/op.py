"""region_pool's launchers, and its registration as granvit::region_pool.

A backend module has why_not(device, dtype), forward and backward, with the arguments of the two functions here and what
they return; `reference` is the specification. Values always have as many heads as logits there: K queries of H heads
that share a value are K * H queries of one head.

Kernels shift by the largest logit and multiply weights by shares: no cell costs a logarithm. So that weights don't
vanish where the box is tiny, an axis' shares are taken relative to a number whose logarithm is added to lse: on the CPU
min(1, the extent of the box inside the image), in Triton (triton_regions.py) the cell's share where it is only one.
Relative shares are never under 2**-24.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import backends, checks
from ...registration import Operator
from . import cpu, reference, triton_launch

CANDIDATES = {"region_pool": {"triton": triton_launch, "cpu": cpu, "reference": reference}}


def _backend(value: Tensor) -> Any:
    return backends.choose("region_pool", CANDIDATES["region_pool"], device=value.device, dtype=value.dtype)


def forward(
    logits: Tensor, value: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
    coverage: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output [R, K, H, D], lse [R, K, H]), contiguous. On the CPU ValueError for a bad box or index."""
    checks.box_values(boxes, image_index, grids.shape[0])
    output, lse = _backend(value).forward(
        _of_heads(logits, value), value, grids, cu_seqlens, boxes, image_index, coverage
    )
    shape = boxes.shape[0], *logits.shape[1:]
    return output.view(*shape, value.shape[2]), lse.view(shape)


def backward(
    grad_output: Tensor, grad_lse: Tensor, logits: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor, coverage: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of logits and value, contiguous, each in its tensor's shape and dtype."""
    grad_logits, grad_value = _backend(value).backward(
        _of_heads(grad_output, value), _of_heads(grad_lse, value), _of_heads(logits, value), value,
        _of_heads(output, value), _of_heads(lse, value), grids, cu_seqlens, boxes, image_index, coverage,
    )  # fmt: skip
    return grad_logits.view(logits.shape), grad_value


def _of_heads(tensor: Tensor, value: Tensor) -> Tensor:
    """[N, K, H, ...] with as many heads as values have: [N, K * H, 1, ...] where value is [T, 1, D]."""
    return tensor if tensor.shape[2] == value.shape[1] else tensor.flatten(1, 2).unsqueeze(2)


def _fake_forward(logits, value, grids, cu_seqlens, boxes, image_index, coverage):
    shape = (boxes.shape[0], *logits.shape[1:])
    wide = torch.promote_types(value.dtype, torch.float32)
    return value.new_empty((*shape, value.shape[2])), value.new_empty(shape, dtype=wide)


def _fake_backward(grad_output, grad_lse, logits, value, *_):
    return logits.new_empty(logits.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, value, grids, cu_seqlens, boxes, image_index, ctx.coverage = inputs
    ctx.save_for_backward(logits, value, *output, grids, cu_seqlens, boxes, image_index)


def _backward(run: Any, ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple:
    return *run(grad_output, grad_lse, *ctx.saved_tensors, ctx.coverage), *(None,) * 5


_LAYOUT_AND_BOXES = "Tensor grids, Tensor cu_seqlens, Tensor boxes, Tensor image_index, bool coverage"

operator = Operator.define(
    f"region_pool(Tensor logits, Tensor value, {_LAYOUT_AND_BOXES}) -> (Tensor, Tensor)",
    forward,
    _fake_forward,
    backward_schema="region_pool_backward(Tensor grad_output, Tensor grad_lse, Tensor logits, Tensor value, "
    f"Tensor output, Tensor lse, {_LAYOUT_AND_BOXES}) -> (Tensor, Tensor)",
    backward_launch=backward,
    backward_fake=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=(0, 1),
)
