"""region_attention in plain PyTorch: the specification, for any device and for float64.

One region at a time: its cells are gathered, so nothing of size [R, T] ever exists. Arithmetic is float32
(float64 for float64), whatever the storage type. `forward` can be differentiated by autograd itself;
`backward` is the same gradient written out, because the registered operator may not record a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...regions import met_tokens, wide


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """It runs everywhere."""
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grids: Tensor,
    cu_seqlens: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    scale: float,
    coverage: bool,
) -> tuple[Tensor, Tensor]:
    """Attend: (output [R, K, H, D] in query's dtype, lse [R, K, H] float32, or float64 for float64).

    query [R, K, H, D] or [K, H, D] (shared by all regions), key and value [T, H, D], grids int32 [B, 2],
    cu_seqlens int32 [B + 1], boxes float32 [R, 4], image_index int [R].
    """
    count = boxes.shape[0]
    queries = wide(query).expand(count, *query.shape[-3:])
    outputs = [torch.zeros_like(queries[0]) for _ in range(count)] if count else []
    lses = [queries.new_full(queries.shape[1:3], float("-inf")) for _ in range(count)]
    with torch.autocast(query.device.type, enabled=False):
        for region, tokens, bias in met_tokens(grids, cu_seqlens, boxes, image_index, coverage, queries.dtype):
            logits = torch.einsum("khd,nhd->khn", queries[region], wide(key[tokens])) * scale + bias
            lses[region] = logits.logsumexp(-1)
            outputs[region] = torch.einsum("khn,nhd->khd", logits.softmax(-1), wide(value[tokens]))
    if not count:
        return query.new_zeros(queries.shape), queries.new_zeros(queries.shape[:3])
    return torch.stack(outputs).to(query.dtype), torch.stack(lses)


def backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grids: Tensor,
    cu_seqlens: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    scale: float,
    coverage: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each in its tensor's shape and dtype.

    With p = exp(logits - lse), recomputed, and g = grad_output:
    dv = p g, dlogits = p (g.v - g.output + grad_lse).
    """
    count = boxes.shape[0]
    queries = wide(query).expand(count, *query.shape[-3:])
    grad_queries = torch.zeros(queries.shape, dtype=queries.dtype, device=queries.device)
    grad_key, grad_value = (torch.zeros(t.shape, dtype=queries.dtype, device=t.device) for t in (key, value))
    with torch.autocast(query.device.type, enabled=False):
        for region, tokens, bias in met_tokens(grids, cu_seqlens, boxes, image_index, coverage, queries.dtype):
            keys, gradient = wide(key[tokens]), wide(grad_output[region])
            logits = torch.einsum("khd,nhd->khn", queries[region], keys) * scale + bias
            weights = (logits - lse[region][..., None]).exp()
            shift = (gradient * wide(output[region])).sum(-1) - grad_lse[region]
            through_value = torch.einsum("khd,nhd->khn", gradient, wide(value[tokens]))
            grad_logits = weights * (through_value - shift[..., None]) * scale
            grad_queries[region] = torch.einsum("khn,nhd->khd", grad_logits, keys)
            # A region's tokens are distinct: index_add_ has one term a row, and regions add in their order.
            grad_key.index_add_(0, tokens, torch.einsum("khn,khd->nhd", grad_logits, queries[region]))
            grad_value.index_add_(0, tokens, torch.einsum("khn,khd->nhd", weights, gradient))
    if query.dim() == 3:
        total = torch.zeros(query.shape, dtype=queries.dtype, device=query.device)
        for grad_query in grad_queries:
            total += grad_query
        grad_queries = total
    return grad_queries.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
