"""Softmax attention within each image of a packed sequence, by the fastest way that the device has."""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from granvit_kernels import PackedLayout

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
try:  # torch >= 2.11
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Softmax attention of q, k, v [T, H, D] within each image. Returns [T, H, D].

    On CUDA in half precision by flash attention (flash-attn if it is installed, else torch.nn.attention.varlen), else
    by one SDPA call for each run of consecutive images of equal length: a batch of crops of one grid is one call.
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        if flash_attn_varlen_func is not None:
            cu, longest = layout.cu_seqlens, layout.max_seqlen
            return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest)
        if varlen_attn is not None:
            cu, longest = layout.cu_seqlens, layout.max_seqlen
            return varlen_attn(q, k, v, cu, cu, longest, longest)
    return sdpa_by_image(q, k, v, layout)


@torch.compiler.disable  # it would unroll the loop and compile anew for every batch
def sdpa_by_image(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    if q.device.type == "cpu" and q.dtype in (torch.float16, torch.bfloat16):
        # PyTorch's CPU attention is many times slower backward in half precision than in float32.
        with torch.autocast("cpu", enabled=False):
            return sdpa_by_image(q.float(), k.float(), v.float(), layout).to(q.dtype)
    runs = [(length, sum(1 for _ in run)) for length, run in groupby(h * w for h, w in layout.host_grids)]
    sizes = [length * count for length, count in runs]
    pieces = []
    for (length, count), *qkv in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        rows = (t.view(count, length, *t.shape[1:]).transpose(1, 2) for t in qkv)
        pieces.append(F.scaled_dot_product_attention(*rows).transpose(1, 2).flatten(0, 1))
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0] if pieces else q
