"""RoIAlign on packed tokens by the C++ kernel, csrc/cpu/roi_gather.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...native import cpu_why_not as why_not

__all__ = ["backward", "forward", "why_not"]


def forward(
    tokens: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
    out_h: int, out_w: int, sampling_ratio: int,
) -> Tensor:  # fmt: skip
    """As reference.forward; boxes finite, indices of the layout's images; a dtype of native.DTYPES."""
    tokens = tokens.contiguous()
    output = tokens.new_empty(boxes.shape[0], out_h, out_w, tokens.shape[1])
    problem, _keep = _problem(output, tokens.shape[0], grids, cu_seqlens, boxes, image_index, sampling_ratio)
    native.library().roi_gather_forward(problem, tokens.data_ptr(), output.data_ptr())
    return output


def backward(
    grad: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
    num_tokens: int, sampling_ratio: int,
) -> Tensor:  # fmt: skip
    """As reference.backward. Equal bits for any number of threads."""
    grad = grad.contiguous()
    grad_tokens = grad.new_empty(num_tokens, grad.shape[3])
    problem, _keep = _problem(grad, num_tokens, grids, cu_seqlens, boxes, image_index, sampling_ratio)
    native.library().roi_gather_backward(problem, grad.data_ptr(), grad_tokens.data_ptr())
    return grad_tokens


def _problem(
    output: Tensor, num_tokens: int, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
    sampling_ratio: int,
) -> tuple[Any, list[Tensor]]:  # fmt: skip
    """(csrc/bindings.cpp's RoiGather, which both directions need; tensors to keep alive)."""
    tensors = [t.contiguous() for t in (grids, cu_seqlens, boxes, image_index.long())]
    num_boxes, out_h, out_w, channels = output.shape
    problem = native.library().RoiGather(
        native.DTYPES[output.dtype], *(t.data_ptr() for t in tensors), grids.shape[0], num_boxes, channels,
        num_tokens, out_h, out_w, sampling_ratio, torch.get_num_threads(),
    )  # fmt: skip
    return problem, tensors
