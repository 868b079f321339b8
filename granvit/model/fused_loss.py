"""Liger's fused linear cross entropy: the loss of hidden states without their logits, where it can be had."""

from __future__ import annotations

from torch import Tensor, nn

try:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
except ImportError:  # an optional extra: pip install granvit[liger]
    liger_fused_linear_cross_entropy = None


def can_fuse(hidden: Tensor, table: nn.Module) -> bool:
    """Whether Liger is installed, there are hidden states [A, D] and they are on a GPU, and the output table is a plain
    linear layer: its weight not in shards just now, and no adapter on it."""
    if liger_fused_linear_cross_entropy is None or not hidden.is_cuda or not len(hidden):
        return False
    return type(table) is nn.Linear and type(table.weight) in (nn.Parameter, Tensor)


def fused_cross_entropy(hidden: Tensor, table: nn.Linear, rows: int, targets: Tensor) -> Tensor:
    """Cross entropy [A] of targets [A] among the table's first `rows` rows, float32, from hidden [A, D].

    Logits are made for a few tokens at a time, in the forward pass and again in the backward pass, and never kept.
    """
    bias = None if table.bias is None else table.bias[:rows]
    return liger_fused_linear_cross_entropy(hidden, table.weight[:rows], targets, bias=bias, reduction="none").float()
