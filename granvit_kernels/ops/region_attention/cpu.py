"""region_attention by the C++ kernel for the CPU (csrc/cpu/region_attention.cpp): hands it addresses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...native import cpu_why_not as why_not

__all__ = ["backward", "forward", "why_not"]


def forward(
    query: Tensor, key: Tensor, value: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor,
    image_index: Tensor, scale: float, coverage: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As reference.forward."""
    shape = (boxes.shape[0], *query.shape[-3:])
    output, lse = query.new_empty(shape), query.new_empty(shape[:3], dtype=torch.float32)
    problem, regions, _keep = _prepare(
        query, key, value, grids, cu_seqlens, output, lse, boxes, image_index, scale
    )
    native.library().region_attention_forward(problem, *regions, coverage, torch.get_num_threads())
    return output, lse


def backward(
    grad_output: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    lse: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor, scale: float,
    coverage: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As reference.backward."""
    problem, regions, _keep = _prepare(
        query, key, value, grids, cu_seqlens, output, lse, boxes, image_index, scale
    )
    grad_query = query.new_empty(query.shape, dtype=torch.float32)
    grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
    tensors = (grad_output.contiguous(), grad_lse.contiguous(), grad_query, grad_key, grad_value)
    native.library().region_attention_backward(
        problem, *regions, coverage, torch.get_num_threads(), *(t.data_ptr() for t in tensors)
    )
    return grad_query.to(query.dtype), grad_key, grad_value


def _prepare(
    query: Tensor, key: Tensor, value: Tensor, grids: Tensor, cu_seqlens: Tensor, output: Tensor,
    lse: Tensor, boxes: Tensor, image_index: Tensor, scale: float,
) -> tuple[Any, tuple[int, int], list[Tensor]]:  # fmt: skip
    """(csrc/bindings.cpp's RegionAttention, addresses of boxes and indices, tensors to keep alive)."""
    # Of key and value, only the last dimension has to be dense.
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
    query, output, lse, boxes = (t.contiguous() for t in (query, output, lse, boxes))
    image_index = image_index.long().contiguous()
    tensors = [query, key, value, grids.contiguous(), cu_seqlens.contiguous(), output, lse]
    sizes = [grids.shape[0], *output.shape, key.shape[0]]
    # Not query.stride(0): no or one region counts as contiguous with any stride, and 0 says "shared" to the kernel.
    region_stride = math.prod(query.shape[1:]) if query.dim() == 4 else 0
    strides = [region_stride, *key.stride()[:2], *value.stride()[:2]]
    addresses = (tensor.data_ptr() for tensor in tensors)
    problem = native.library().RegionAttention(native.DTYPES[query.dtype], sizes, strides, scale, *addresses)
    return problem, (boxes.data_ptr(), image_index.data_ptr()), [*tensors, boxes, image_index]
