"""Softmax attention within each image of a packed sequence, by the fastest way that the device has."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from granvit_kernels import PackedLayout, libraries

try:
    from flash_attn import flash_attn_varlen_func as flash_attn_2
except ImportError:
    flash_attn_2 = None
try:
    from flash_attn_interface import flash_attn_varlen_func as flash_attn_3
except ImportError:
    flash_attn_3 = None
try:  # torch >= 2.11
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Softmax attention of q, k, v [T, H, D] within each image. Returns [T, H, D].

    On CUDA in half precision by flash attention: torch.nn.attention.varlen, or the library that GRANVIT_LIBRARIES names
    (see granvit_kernels.libraries). Else by one SDPA call for each run of consecutive images of equal length: a batch
    of crops of one grid is one call.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    name = flash_attention() if half and q.is_cuda else "torch" if half and q.is_meta and varlen_attn else None
    if name is None:
        return sdpa_by_image(q, k, v, layout)
    function = {"flash-attn-3": flash_attn_3, "flash-attn-2": flash_attn_2, "torch": varlen_attn}[name]
    return by_flash(function, q, k, v, layout)


@torch.compiler.assume_constant_result
def flash_attention() -> str | None:
    """Which flash attention runs on this GPU: the library that is named, torch's, or flash-attn 2 where torch is too
    old to have one; None where there is none. Raises RuntimeError where the one that is named can't run."""
    name = libraries.named("encoder's attention")
    if name is None and varlen_attn is not None:
        return "torch"
    return name or ("flash-attn-2" if flash_attn_2 is not None else None)


def by_flash(function: Callable, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """All of them take q, k, v, where sequences begin in q and k, int32 [B + 1], and their longest in q and k, ints."""
    cu, longest = layout.cu_seqlens, layout.max_seqlen
    out = function(q, k, v, cu, cu, longest, longest)
    return out[0] if isinstance(out, tuple) else out  # flash-attn 3's first releases return log-sum-exp too


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
