"""region_pool by the C++ kernel for the CPU (csrc/cpu/region_pool.cpp): hands it addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...native import cpu_why_not as why_not

__all__ = ["backward", "forward", "why_not"]


def forward(
    logits: Tensor, value: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
    coverage: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As reference.forward."""
    shape = (boxes.shape[0], *logits.shape[1:])
    output, lse = value.new_empty(*shape, value.shape[2]), value.new_empty(shape, dtype=torch.float32)
    problem, regions, _keep = _prepare(logits, value, grids, cu_seqlens, output, lse, boxes, image_index)
    native.library().region_pool_forward(problem, *regions, coverage, torch.get_num_threads())
    return output, lse


def backward(
    grad_output: Tensor, grad_lse: Tensor, logits: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor, coverage: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As reference.backward."""
    problem, regions, _keep = _prepare(logits, value, grids, cu_seqlens, output, lse, boxes, image_index)
    grad_logits, grad_value = logits.new_empty(logits.shape, dtype=torch.float32), value.new_empty(value.shape)
    tensors = (grad_output.contiguous(), grad_lse.contiguous(), grad_logits, grad_value)
    native.library().region_pool_backward(
        problem, *regions, coverage, torch.get_num_threads(), *(t.data_ptr() for t in tensors)
    )
    return grad_logits.to(logits.dtype), grad_value


def _prepare(
    logits: Tensor, value: Tensor, grids: Tensor, cu_seqlens: Tensor, output: Tensor, lse: Tensor, boxes: Tensor,
    image_index: Tensor,
) -> tuple[Any, tuple[int, int], list[Tensor]]:  # fmt: skip
    """(csrc/bindings.cpp's RegionPool, addresses of boxes and indices, tensors to keep alive)."""
    value = value if value.stride(-1) == 1 else value.contiguous()  # only the last dimension has to be dense
    logits = logits.float().contiguous()
    output, lse, boxes = (t.contiguous() for t in (output, lse, boxes))
    image_index = image_index.long().contiguous()
    tensors = [logits, value, grids.contiguous(), cu_seqlens.contiguous(), output, lse]
    sizes = [grids.shape[0], *output.shape, value.shape[0]]
    addresses = (tensor.data_ptr() for tensor in tensors)
    problem = native.library().RegionPool(native.DTYPES[value.dtype], sizes, value.stride()[:2], *addresses)
    return problem, (boxes.data_ptr(), image_index.data_ptr()), [*tensors, boxes, image_index]
