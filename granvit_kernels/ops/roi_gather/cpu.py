"""RoIAlign on packed tokens by the C++ kernel, csrc/cpu/roi_gather.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from granvit_kernels import native
from granvit_kernels.native import cpu_why_not as why_not

__all__ = ["backward", "forward", "why_not"]


def forward(
    tokens: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
    out_h: int, out_w: int, sampling_ratio: int,
) -> Tensor:  # fmt: skip
    """As reference.forward; boxes finite, indices of the layout's images; a dtype of native.DTYPES."""
    tokens = tokens.contiguous()
    output = tokens.new_empty(boxes.shape[0], out_h, out_w, tokens.shape[1])
    boxes, image_index = boxes.contiguous(), image_index.contiguous().long()
    problem = _problem(output, grids, cu_seqlens, boxes, image_index, sampling_ratio)
    native.library().roi_gather_forward(problem, tokens.data_ptr(), output.data_ptr())
    return output


def backward(
    grad: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
    num_tokens: int, sampling_ratio: int,
) -> Tensor:  # fmt: skip
    """As reference.backward. Equal bits for any number of threads."""
    grad = grad.contiguous()
    grad_tokens = grad.new_empty(num_tokens, grad.shape[3])
    boxes, image_index = boxes.contiguous(), image_index.contiguous().long()
    problem = _problem(grad, grids, cu_seqlens, boxes, image_index, sampling_ratio)
    native.library().roi_gather_backward(problem, grad.data_ptr(), grad_tokens.data_ptr())
    return grad_tokens


def _problem(
    output: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor, sampling_ratio: int
):
    """What both directions need; the tensors must outlive the call."""
    num_boxes, out_h, out_w, channels = output.shape
    return native.library().RoiGather(
        native.DTYPES[output.dtype], grids.data_ptr(), cu_seqlens.data_ptr(), boxes.data_ptr(),
        image_index.data_ptr(), grids.shape[0], num_boxes, channels, out_h, out_w, sampling_ratio,
        torch.get_num_threads(),
    )  # fmt: skip
