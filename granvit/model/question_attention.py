"""Attention over packed questions without an L x L mask, for every LLM whose attention goes through transformers'
interface.

Token i attends to j <= i of its own segment (image part or question) and, in a question, to its whole image part. Those
are two calls of variable-length attention whose keys are disjoint, so their outputs are merged exactly:

    lse = log(exp(lse_own) + exp(lse_image))        out = exp(lse_own - lse) out_own + exp(lse_image - lse) out_image

Backward needs no merging: a part's probabilities are exp(s - lse) with the merged lse, and rowsum(dO * O) with the
merged O is the right delta for both, so each part's own flash backward, given merged out and lse, gives its exact share
of dq, dk and dv (as in ring attention). A part is flash attention on CUDA in half precision, plain PyTorch elsewhere.
Flash attention's backward takes another 128 * H * D float32 for each segment while it runs, which many short questions
notice.

Elsewhere that is slow; there a question's keys, its image part and itself, are gathered into small grids for
F.scaled_dot_product_attention instead (`Grids`), or the dense mask stays.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from granvit.questions.segments import Segments, find_spans
from granvit_kernels.registration import Operator

NAME = "granvit_questions"
"""Our name in transformers' interface; without a packed batch it is its SDPA, so that generate() never notices."""

HALF = (torch.float16, torch.bfloat16)

# Arguments that attention functions get and that change nothing here.
HARMLESS = {"position_ids", "cache_position", "position_embeddings", "use_cache", "cache", "past_key_values"}
HARMLESS |= {"logits_to_keep", "num_items_in_batch", "is_causal"}


# One part: queries [Tq, H, D] of sequence n attend to keys [Tk, Hkv, D] of sequence n; output [Tq, H, D], lse [H, Tq]
# (natural logarithm, float32 or wider).


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    # With max_q = 1 and fewer key heads the kernel takes every sequence for one query, empty ones too; a bound that is
    # too high only launches blocks that return at once.
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max(2, max_q), max_k, 0.0, causal, False, scale=scale
    )
    return out, lse


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int,
    max_k: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # The state of dropout's generator, which no dropout reads; torch.nn.attention.varlen passes the same.
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, cu_q, cu_k, max(2, max_q), max_k, 0.0, causal, state, unused, scale=scale
    )


def reference_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, of any dtype, computed in float32 or wider."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=_wide(q))
    for rows, columns in _sequences(cu_q, cu_k):
        scores, _, values = _scores(q[rows], k[columns], v[columns], causal, scale)
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = (scores.softmax(-1) @ values).transpose(0, 1).to(q.dtype)
    return out, lse


def reference_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale):
    """The formulas of flash attention's backward: it takes out and lse on trust, which is what merging needs."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    shared = q.shape[1] // k.shape[1]
    for rows, columns in _sequences(cu_q, cu_k):
        scores, keys, values = _scores(q[rows], k[columns], v[columns], causal, scale)
        p = (scores - lse[:, rows, None]).exp()
        do = grad[rows].transpose(0, 1).to(p.dtype)
        delta = (do * out[rows].transpose(0, 1)).sum(-1, keepdim=True)
        ds = p * (do @ values.mT - delta) * scale
        dq[rows] = (ds @ keys).transpose(0, 1).to(q.dtype)
        for target, heads in ((dk, ds.mT @ q[rows].transpose(0, 1).to(p.dtype)), (dv, p.mT @ do)):
            target[columns] = heads.unflatten(0, (-1, shared)).sum(1).transpose(0, 1).to(k.dtype)
    return dq, dk, dv


def _sequences(cu_q: Tensor, cu_k: Tensor):
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    for n in range(len(ends_q) - 1):
        yield slice(ends_q[n], ends_q[n + 1]), slice(ends_k[n], ends_k[n + 1])


def _scores(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(scores [H, Tq, Tk], keys and values [H, Tk, D]), a key head repeated for the query heads that share it."""
    keys, values = (t.repeat_interleave(q.shape[1] // t.shape[1], 1).transpose(0, 1).to(_wide(q)) for t in (k, v))
    scores = q.transpose(0, 1).to(_wide(q)) @ keys.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
    return scores, keys, values


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


# The two parts merged, as one operator: granvit::question_attention.


def _parts(q: Tensor) -> tuple[Any, Any]:
    flash = q.is_cuda and q.dtype in HALF
    return (flash_forward, flash_backward) if flash else (reference_forward, reference_backward)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_segments: Tensor, cu_questions: Tensor, cu_images: Tensor,
    question_tokens: Tensor, image_tokens: Tensor, max_segment: int, max_questions: int, max_image: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output [T, H, D], lse [H, T])."""
    if not len(q):
        return _fake_forward(q)
    part, _ = _parts(q)
    out, lse = part(q, k, v, cu_segments, cu_segments, max_segment, max_segment, True, scale)
    out = out.contiguous()
    if not len(question_tokens):
        return out, lse
    keys, values = k.index_select(0, image_tokens), v.index_select(0, image_tokens)
    queries = q.index_select(0, question_tokens)
    image_out, image_lse = part(queries, keys, values, cu_questions, cu_images, max_questions, max_image, False, scale)
    own_lse = lse.index_select(1, question_tokens)
    # Shares in lse's dtype, float32 at least: a product with half precision is of that dtype, and rounded once.
    ahead = (own_lse - image_lse).mT[..., None]
    merged = (image_out * torch.sigmoid(-ahead)).add_(out.index_select(0, question_tokens) * torch.sigmoid(ahead))
    out.index_copy_(0, question_tokens, merged.to(out.dtype))
    lse.index_copy_(1, question_tokens, torch.logaddexp(own_lse, image_lse))
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_segments: Tensor, cu_questions: Tensor,
    cu_images: Tensor, question_tokens: Tensor, image_tokens: Tensor, max_segment: int, max_questions: int,
    max_image: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    if not len(q):
        return _fake_backward(grad, q, k, v)
    _, part = _parts(q)
    grads = part(grad, q, k, v, out, lse, cu_segments, cu_segments, max_segment, max_segment, True, scale)
    grads = tuple(each.contiguous() for each in grads)
    if not len(question_tokens):
        return grads
    grad, q, out = (t.index_select(0, question_tokens) for t in (grad, q, out))
    k, v = (t.index_select(0, image_tokens) for t in (k, v))
    lse = lse.index_select(1, question_tokens)
    more = part(grad, q, k, v, out, lse, cu_questions, cu_images, max_questions, max_image, False, scale)
    for sum_, each, tokens in zip(grads, more, (question_tokens, image_tokens, image_tokens), strict=True):
        sum_.index_add_(0, tokens, each)  # no token stands twice in tokens, so the order of additions is no question
    return grads


def _fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=_wide(q))


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:8])
    ctx.sizes = inputs[8:]
    ctx.mark_non_differentiable(output[1])


def _backward(run: Any, ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    return *run(grad.contiguous(), *ctx.saved_tensors, *ctx.sizes), *(None,) * 9


_SEGMENTS = (
    "Tensor cu_segments, Tensor cu_questions, Tensor cu_images, Tensor question_tokens, Tensor image_tokens, "
    "SymInt max_segment, SymInt max_questions, SymInt max_image, float scale"
)
operator = Operator.define(
    f"question_attention(Tensor q, Tensor k, Tensor v, {_SEGMENTS}) -> (Tensor, Tensor)",
    forward,
    _fake_forward,
    backward_schema="question_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SEGMENTS}) -> (Tensor, Tensor, Tensor)",
    backward_launch=backward,
    backward_fake=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=(0, 1, 2),
)


def question_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None = None) -> Tensor:
    """Attention [T, H, D] of q [T, H, D] and k, v [T, Hkv, D], H a multiple of Hkv, over packed questions.

    T is segments' [B * L]; scale=None is D**-0.5. Exact and once differentiable in q, k and v. Padding attends to
    padding. Flash attention on CUDA in half precision; plain PyTorch elsewhere, a Python loop over segments.
    """
    out, _ = operator(
        q, k, v, segments.cu_segments, segments.cu_questions, segments.cu_images, segments.question_tokens,
        segments.image_tokens, segments.max_segment, segments.max_questions, segments.max_image,
        q.shape[-1] ** -0.5 if scale is None else scale,
    )  # fmt: skip
    return out


# What the LLM's layers call.


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    granvit_segments: Segments | Grids | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention [B, L, H, D] of query [B, H, L, D], key and value [B, Hkv, L, D], as transformers' interface has it.

    Without granvit_segments it is transformers' SDPA. With them attention_mask is not read; ValueError for what would
    change attention and is not done here: dropout, soft caps, windows, sinks, a cache, or any argument that is unknown.
    """
    if granvit_segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    unknown = [k for k, value in kwargs.items() if k not in HARMLESS and value is not None and value is not False]
    if dropout or unknown or kwargs.get("is_causal") is False:
        asked = ", ".join(unknown or (["dropout"] if dropout else ["is_causal=False"]))
        raise ValueError(
            f"llm: {type(module).__name__} asks attention for {asked}, which packed questions have not; "
            "attn_implementation='eager' takes the dense mask"
        )
    if key.shape != value.shape or query.shape[2:] != key.shape[2:]:
        raise ValueError(
            f"llm: {type(module).__name__} attends from {list(query.shape)} to keys {list(key.shape)} and values "
            f"{list(value.shape)}; accepted are equal lengths and head sizes"
        )
    dtype = compute_dtype(query)
    flat = (t.transpose(1, 2).flatten(0, 1).to(dtype) for t in (query, key, value))
    if isinstance(granvit_segments, Grids):
        out = granvit_segments.attend(*flat, scaling)
    else:
        out = question_attention(*flat, granvit_segments, scaling)
    return out.unflatten(0, (query.shape[0], query.shape[2])), None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def compute_dtype(t: Tensor) -> torch.dtype:
    """In which products with t are computed: autocast's where it is on (rotary embeddings leave its dtype). A tensor on
    meta stands for one on a GPU."""
    kind = "cuda" if t.is_meta else t.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and t.dtype != torch.float64 else t.dtype


def why_not_flash(llm: PreTrainedModel, embeds: Tensor) -> str | None:
    """None if the LLM attends to packed embeds [B, L, D] by flash attention, else why it doesn't."""
    if llm.config._attn_implementation != NAME:
        return f"the LLM's attention is {llm.config._attn_implementation!r}, not transformers' interface"
    if embeds.device.type not in ("cuda", "meta"):  # meta stands for a GPU
        return f"flash attention runs on CUDA, not on {embeds.device.type}"
    config = llm.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    return _why_no_kernel(embeds.device, compute_dtype(embeds), heads, shared, size)


@functools.lru_cache
def _why_no_kernel(device: torch.device, dtype: torch.dtype, heads: int, shared: int, size: int) -> str | None:
    if dtype not in HALF:
        return f"flash attention takes half precision, not {dtype}"
    if torch.version.hip or tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11):
        return "the layout of flash attention's log-sum-exp is known of torch >= 2.11 on CUDA"
    if size % 8:
        return f"flash attention takes heads of a multiple of 8 channels, not {size}"
    if device.type == "meta":
        return None
    q, k = (torch.empty(1, h, 8, size, dtype=dtype, device=device, requires_grad=True) for h in (heads, shared))
    params = torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, True, heads != shared)
    if not torch.backends.cuda.can_use_flash_attention(params):
        return f"flash attention on this GPU does not take heads of {size} channels in {dtype}"
    return None


# Without flash attention: few SDPA calls on small dense grids.


@dataclass
class Grid:
    """Rows that are one SDPA call: tokens of queries [S, Q] and keys [S, K] (int64; repeated where a row is shorter),
    and what is added to scores [S, 1, Q, K], or None where attention is causal."""

    queries: Tensor
    keys: Tensor
    bias: Tensor | None


@dataclass
class Grids:
    """All attention of a packed batch. place: int64 [T], where in the grids' outputs, flattened one after the other, a
    token's own stands; padding's is one row of zeros behind them."""

    grids: list[Grid]
    place: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """As question_attention, but zeros for padding."""
        if q.device.type == "cpu" and q.dtype in HALF:
            # PyTorch's CPU attention is many times slower backward in half precision than in float32.
            with torch.autocast("cpu", enabled=False):
                return self.attend(q.float(), k.float(), v.float(), scale).to(q.dtype)
        outs = []
        for grid in self.grids:
            rows = (_rows(t, tokens) for t, tokens in ((q, grid.queries), (k, grid.keys), (v, grid.keys)))
            out = F.scaled_dot_product_attention(
                *rows,
                attn_mask=grid.bias,
                is_causal=grid.bias is None,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            outs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
        outs.append(q.new_zeros(1, q.shape[1:].numel()))
        return F.embedding(self.place, torch.cat(outs)).view(q.shape)


def _rows(t: Tensor, tokens: Tensor) -> Tensor:
    """t [T, H, D] at tokens [S, N] -> [S, H, N, D]."""
    return F.embedding(tokens, t.flatten(1)).unflatten(-1, t.shape[1:]).transpose(1, 2)


GAIN = 4
"""Grids are taken where they hold at least so many times fewer pairs of tokens than the dense mask: gathering their
keys costs something too. Measured on 2 cores, 4 heads of 32, attention forward and backward against the mask's: pairs
3.4 times fewer, 1.02 of its time; 8 times, 0.50; 17 times, 0.23."""


def find_grids(image_index: Tensor, question_index: Tensor, dtype: torch.dtype) -> Grids | None:
    """Grids of a batch's image_index and question_index [B, L] on the host, or None where the dense mask is no more
    work. Segments of about one length share a grid (measured: factors from 1.2 to 2 differ by less than 10 %)."""
    spans = find_spans(image_index.numpy(), question_index.numpy())
    asked, image_alone = spans.part >= 0, (spans.image >= 0) & (spans.part < 0)
    keys = np.where(asked, spans.length[spans.part], 0)
    kind = np.stack([asked, _class(spans.length, image_alone), _class(spans.length, asked), _class(keys, asked)], 1)
    _, kind = np.unique(kind, axis=0, return_inverse=True)
    kind = np.where(spans.image >= 0, kind.ravel(), -1)
    groups = [np.flatnonzero(kind == each) for each in np.unique(kind[kind >= 0])]
    sizes = [(len(g), int(spans.length[g].max()), int(keys[g].max())) for g in groups]
    pairs = sum(rows * own * (own + image) for rows, own, image in sizes)
    if not groups or GAIN * pairs > image_index.shape[0] * image_index.shape[1] ** 2:
        return None
    place, grids, done = np.full(image_index.numel(), -1), [], 0
    for group, (rows, own, image) in zip(groups, sizes, strict=True):
        queries, real = _padded(spans.start[group], spans.length[group], own)
        place[queries[real]] = done + np.flatnonzero(real)
        done += rows * own
        if not image:
            grids.append(Grid(torch.from_numpy(queries), torch.from_numpy(queries), None))
            continue
        part = spans.part[group]
        before, seen = _padded(spans.start[part], spans.length[part], image)
        causal = np.broadcast_to(np.tri(own, dtype=bool), (rows, own, own))
        allowed = np.concatenate([np.broadcast_to(seen[:, None], (rows, own, image)), causal], 2)
        bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~torch.from_numpy(allowed), -torch.inf)
        columns = np.concatenate([before, queries], 1)
        grids.append(Grid(torch.from_numpy(queries), torch.from_numpy(columns), bias[:, None]))
    place[place < 0] = done
    return Grids(grids, torch.from_numpy(place))


def _class(lengths: np.ndarray, which: np.ndarray) -> np.ndarray:
    """0 where lengths[which] are within a factor of 1.5 of the largest, 1 within the next, and so on; 0 elsewhere."""
    classes = np.zeros(len(lengths), dtype=np.int64)
    chosen = np.maximum(lengths[which], 1)
    classes[which] = np.log(chosen.max(initial=1) / chosen) / np.log(1.5)
    return classes


def _padded(start: np.ndarray, length: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int64 [S, width], of which are real bool [S, width]); past its end a row repeats its first token."""
    real = np.arange(width) < length[:, None]
    return np.where(real, start[:, None] + np.arange(width), start[:, None]), real
