"""Cross entropy from hidden states, with logits that exist for a slice of the vocabulary at a time.

Of 3,000 answer tokens and 152,000 rows the logits are 1.8 GB in float32, and PyTorch's cross entropy holds several
tensors of that size. In slices, each at most CHUNK bytes, the forward pass keeps two numbers a token, and the backward
pass makes each slice's logits again. (F.linear_cross_entropy of torch 2.13 takes one table, and older torch has none.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from .question_attention import compute_dtype

try:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
except ImportError:  # an optional extra: pip install granvit[liger]
    liger_fused_linear_cross_entropy = None

CHUNK = 2**28
"""Bytes of logits, in float32 or wider, that may exist at once."""


def logits_of(hidden: Tensor, table: nn.Module, rows: int, more: Tensor) -> Tensor:
    """Logits [..., rows + M] of hidden states [..., D]: of the table's first `rows` rows, then of `more` [M, D]."""
    own = table(hidden)[..., :rows]
    return torch.cat((own, F.linear(hidden, more.to(hidden.dtype))), dim=-1) if len(more) else own


def linear_cross_entropy(hidden: Tensor, table: nn.Module, rows: int, more: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy [A] of targets [A] (int64, in 0 to rows + M - 1) under `logits_of` hidden states [A, D], in float32
    or, of float64, in float64. In slices a target out of range gives NaN, which costs a GPU no wait.

    Logits of at most CHUNK bytes are made whole, which is fastest. So are those of a table that is not a plain linear
    layer, because its weight is sharded at that moment or the layer is wrapped.
    """
    if can_fuse(hidden, table) and not len(more):  # Liger takes one table; to put two together would copy both
        return _liger(hidden, table, rows, targets)
    dtype = compute_dtype(hidden)
    itemsize = torch.promote_types(dtype, torch.float32).itemsize
    step = CHUNK // (itemsize * max(1, len(hidden)))
    if step >= rows + len(more) or not _plain(table):
        return F.cross_entropy(widened(logits_of(hidden, table, rows, more)), targets, reduction="none")
    return _Sliced.apply(hidden.to(dtype), targets, table.weight, table.bias, more, rows, max(1, step))


def widened(logits: Tensor) -> Tensor:
    """Logits as losses are computed from them: float64 stays, anything narrower becomes float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def can_fuse(hidden: Tensor, table: nn.Module) -> bool:
    """Whether Liger is installed, there are hidden states [A, D], they are on a GPU, and the table is plain."""
    return liger_fused_linear_cross_entropy is not None and hidden.is_cuda and len(hidden) > 0 and _plain(table)


def _plain(table: nn.Module) -> bool:
    return type(table) is nn.Linear and type(table.weight) in (nn.Parameter, Tensor)


def _liger(hidden: Tensor, table: nn.Linear, rows: int, targets: Tensor) -> Tensor:
    bias = None if table.bias is None else table.bias[:rows]
    return liger_fused_linear_cross_entropy(hidden, table.weight[:rows], targets, bias=bias, reduction="none").float()


class _Sliced(torch.autograd.Function):
    """The losses of hidden [A, D], which has the dtype that products are taken in; sums over slices are float32 or
    wider. What needs no gradient costs none."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, more: Tensor,
        rows: int, step: int,
    ) -> Tensor:  # fmt: skip
        total, picked = None, torch.nan  # of a target that is no row: F.cross_entropy would raise or end the process
        for first, table, where in _slices(rows, len(more), step):
            logits = _logits(hidden, (weight, more)[table][where], None if table else bias, where)
            place, inside = _place(targets, first, logits)
            part_total = logits.logsumexp(1, keepdim=True)
            total = part_total if total is None else torch.logaddexp(total, part_total)
            picked = logits.gather(1, place).where(inside, picked)
        ctx.save_for_backward(hidden, targets, weight, bias, more, total)
        ctx.rows, ctx.step = rows, step
        return (total - picked).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, share: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, weight, bias, more, total = ctx.saved_tensors
        needed = *ctx.needs_input_grad[:4], ctx.needs_input_grad[4] and len(more)
        into = torch.zeros_like(hidden, dtype=total.dtype) if needed[0] else None
        weight_grad, bias_grad, more_grad = (
            torch.zeros_like(tensor) if need else None
            for tensor, need in zip((weight, bias, more), needed[2:], strict=True)
        )
        for first, table, where in _slices(ctx.rows, len(more), ctx.step):
            part, part_grad = ((weight, weight_grad), (more, more_grad))[table]
            slope = _logits(hidden, part[where], None if table else bias, where).sub_(total).exp_()  # probabilities
            place, inside = _place(targets, first, slope)
            slope.scatter_add_(1, place, -inside.to(slope.dtype)).mul_(share[:, None])
            if bias_grad is not None and not table:
                bias_grad[where] = slope.sum(0)
            slope = slope.to(hidden.dtype)
            if into is not None:
                into += slope @ part[where].to(hidden.dtype)
            if part_grad is not None:
                part_grad[where] = slope.T @ hidden
        return None if into is None else into.to(hidden.dtype), None, weight_grad, bias_grad, more_grad, None, None


def _slices(rows: int, more: int, step: int) -> Iterator[tuple[int, int, slice]]:
    """Of two tables with so many rows: number of a slice's first row among all, its table (0 or 1), its rows there."""
    for table, (first, size) in enumerate(((0, rows), (rows, more))):
        for start in range(0, size, step):
            yield first + start, table, slice(start, min(start + step, size))


def _logits(hidden: Tensor, part: Tensor, bias: Tensor | None, where: slice) -> Tensor:
    """Logits [A, N] of a slice [N, D] of a table, in float32 or float64."""
    shift = None if bias is None else bias[where].to(hidden.dtype)
    return widened(F.linear(hidden, part.to(hidden.dtype), shift))


def _place(targets: Tensor, first: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """In the logits of a slice that begins with row `first`: the columns [A, 1] of targets [A], and which of the
    targets are there, bool [A, 1]; of the others the column is 0."""
    place = targets[:, None] - first
    inside = (place >= 0) & (place < logits.shape[1])
    return place.where(inside, 0), inside
