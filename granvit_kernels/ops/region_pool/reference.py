"""region_pool in plain PyTorch: the specification, for any device and for float64.

One region at a time: its cells are gathered, so nothing of size [R, T] ever exists. Arithmetic is float32 (float64 for
float64), whatever the storage type. `forward` can be differentiated by autograd itself; `backward` is the same gradient
written out, because the registered operator may not record a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...regions import met_tokens, wide


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """It runs everywhere."""
    return None


def forward(
    logits: Tensor, value: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
    coverage: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pool: (output [R, K, H, D] in value's dtype, lse [R, K, H] float32, or float64 for float64).

    logits [T, K, H], value [T, H, D], grids int32 [B, 2], cu_seqlens int32 [B + 1], boxes float32 [R, 4],
    image_index int [R].
    """
    shape = (boxes.shape[0], *logits.shape[1:])
    values = wide(value)
    outputs = list(values.new_zeros(*shape, value.shape[2]))
    lses = list(values.new_full(shape, float("-inf")))
    with torch.autocast(value.device.type, enabled=False):
        for region, tokens, bias in met_tokens(grids, cu_seqlens, boxes, image_index, coverage, values.dtype):
            covered = logits[tokens].to(values.dtype).permute(1, 2, 0) + bias
            lses[region] = covered.logsumexp(-1)
            outputs[region] = torch.einsum("khn,nhd->khd", covered.softmax(-1), values[tokens])
    if not outputs:
        return value.new_zeros(*shape, value.shape[2]), values.new_zeros(shape)
    return torch.stack(outputs).to(value.dtype), torch.stack(lses)


def backward(
    grad_output: Tensor, grad_lse: Tensor, logits: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor, coverage: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of logits and value, each in its tensor's shape and dtype.

    With p the weights that forward had, and g = grad_output:
    dvalue = p g, dlogits = p (g.value - g.output + grad_lse).
    """
    values = wide(value)
    grad_logits, grad_value = (torch.zeros(t.shape, dtype=values.dtype, device=t.device) for t in (logits, value))
    with torch.autocast(value.device.type, enabled=False):
        for region, tokens, bias in met_tokens(grids, cu_seqlens, boxes, image_index, coverage, values.dtype):
            gradient = wide(grad_output[region])
            covered = logits[tokens].to(values.dtype).permute(1, 2, 0) + bias
            weights = covered.softmax(-1)  # not exp(covered - lse): lse is rounded
            shift = (gradient * wide(output[region])).sum(-1) - grad_lse[region]
            through_value = torch.einsum("khd,nhd->khn", gradient, values[tokens])
            # A region's tokens are distinct: index_add_ has one term a row, and regions add in their order.
            grad_logits.index_add_(0, tokens, (weights * (through_value - shift[..., None])).permute(2, 0, 1))
            grad_value.index_add_(0, tokens, torch.einsum("khn,khd->nhd", weights, gradient))
    return grad_logits.to(logits.dtype), grad_value.to(value.dtype)
