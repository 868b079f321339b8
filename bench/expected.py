"""The operators' exact results: plain float64, image by image, by formulas of their own. No kernel or peer takes part.

Boxes lie inside their images and meet a cell, as the benchmarks' do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import BINS, PATCH, Pictures, Regions, cell_shares


def by_image(regions: Regions) -> Iterator[tuple[slice, tuple[int, int], Tensor]]:
    """(its tokens, its grid, which boxes are its own) of every image."""
    start = 0
    for image, (height, width) in enumerate(regions.grids):
        yield slice(start, start + height * width), (height, width), (regions.image_index == image).nonzero()[:, 0]
        start += height * width


# ---- roi_gather ----
def shares(low: Tensor, high: Tensor, size: int, bins: int, ratio: int) -> Tensor:
    """Weights of an axis' cells in each bin, [boxes, bins, size]: the mean of `ratio` samples (0: one a cell that the
    bin is long, rounded up), each linear between the two cells whose centres it lies between. low, high: float32."""
    # How many is decided in float32, as the operator and torchvision do.
    counts = torch.full_like(low, ratio) if ratio else (((high - 0.5) - (low - 0.5)) / bins).ceil()
    low, high, counts = low.double()[:, None, None], high.double()[:, None, None], counts.double()[:, None, None]
    sample = torch.arange(int(counts.max()), device=low.device, dtype=torch.float64)
    place = torch.arange(bins, device=low.device)[:, None] + (sample + 0.5) / counts  # [boxes, bins, samples]
    at = (low + place * (high - low) / bins - 0.5).clamp(0, size - 1)
    weights = (1 - (at[..., None] - torch.arange(size, device=low.device)).abs()).clamp(min=0)
    return (weights * (sample < counts)[..., None]).sum(2) / counts


def axes(
    regions: Regions, bins: int = BINS, ratio: int = 2
) -> Iterator[tuple[slice, tuple[int, int], Tensor, Tensor, Tensor]]:
    """by_image, and the shares of its boxes down and across."""
    for rows, (height, width), which in by_image(regions):
        x1, y1, x2, y2 = regions.boxes[which].T
        down, across = shares(y1, y2, height, bins, ratio), shares(x1, x2, width, bins, ratio)
        yield rows, (height, width), which, down, across


def read_tokens(regions: Regions, bins: int = BINS, ratio: int = 2) -> int:
    """How many tokens have a weight in any box."""
    return sum(
        int(torch.einsum("bph,bqw->hw", down, across).count_nonzero())
        for _, _, _, down, across in axes(regions, bins, ratio)
    )


def roi_gather(
    regions: Regions, tokens: Tensor, grad: Tensor | None = None, bins: int = BINS, ratio: int = 2
) -> Tensor:
    """float32 [R, bins, bins, C] of tokens [T, C]; with the gradient of that, the gradient of the tokens [T, C]."""
    count, channels = len(regions.boxes), tokens.shape[1]
    shape = (count, bins, bins, channels) if grad is None else tokens.shape
    result = torch.zeros(shape, device=tokens.device)
    for rows, (height, width), which, down, across in axes(regions, bins, ratio):
        if grad is None:
            image = tokens[rows].detach().double().unflatten(0, (height, width))
            lines = torch.einsum("bqw,hwc->bhqc", across, image)
            result[which] = torch.einsum("bph,bhqc->bpqc", down, lines).float()
        else:
            lines = torch.einsum("bph,bpqc->bhqc", down, grad[which].double())
            result[rows] = torch.einsum("bqw,bhqc->hwc", across, lines).flatten(0, 1).float()
    return result


# ---- region_attention ----
def region_attention(
    regions: Regions, query: Tensor, key: Tensor, value: Tensor, upstream: Tensor, coverage: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [R, K, H, D] and the gradients of query [K, H, D], key and value [T, H, D], float32."""
    output = torch.empty(upstream.shape, device=query.device)
    gradients = tuple(torch.zeros(t.shape, device=t.device) for t in (query, key, value))
    for rows, grid, which in by_image(regions):
        covered = cell_shares(regions.boxes[which].double(), *grid)[:, None, None]
        bias = covered.log() if coverage else torch.zeros_like(covered).masked_fill(covered <= 0, -torch.inf)
        q, k, v = (t.detach().double().requires_grad_() for t in (query, key[rows], value[rows]))
        weights = (torch.einsum("khd,nhd->khn", q, k) * q.shape[-1] ** -0.5 + bias).softmax(-1)
        attended = torch.einsum("bkhn,nhd->bkhd", weights, v)
        output[which] = attended.detach().float()
        parts = torch.autograd.grad(attended, (q, k, v), upstream[which].double())
        gradients[0].add_(parts[0])
        for whole, part in zip(gradients[1:], parts[1:], strict=True):
            whole[rows] = part.float()
    return output, *gradients


def region_prompt(
    regions: Regions, features: Tensor, query: Tensor, key: nn.Linear, value: nn.Linear, upstream: Tensor
) -> tuple[Tensor, ...]:
    """region_attention with coverage of features [T, C] that key and value project: output [R, K, C] and the gradients
    of features, query, key.weight, value.weight and value.bias, float32. (key.bias drops out of the softmax.)"""
    leaves = features, query, key.weight, value.weight, value.bias
    output, gradients = torch.empty_like(upstream, dtype=torch.float32), [torch.zeros_like(t).float() for t in leaves]
    for rows, grid, which in by_image(regions):
        x, q, key_weight, value_weight, bias = parts = [
            t.detach().double().requires_grad_() for t in (features[rows], *leaves[1:])
        ]
        keys, values = (t.unflatten(1, q.shape[1:]) for t in (x @ key_weight.T, x @ value_weight.T + bias))
        shares = cell_shares(regions.boxes[which].double(), *grid)[:, None, None]
        logits = torch.einsum("khd,nhd->khn", q, keys) * q.shape[-1] ** -0.5
        attended = torch.einsum("bkhn,nhd->bkhd", (logits + shares.log()).softmax(-1), values).flatten(2)
        output[which] = attended.detach().float()
        first, *rest = torch.autograd.grad(attended, parts, upstream[which].double())
        gradients[0][rows] = first.float()
        for whole, part in zip(gradients[1:], rest, strict=True):
            whole += part.float()
    return output, *gradients


# ---- pack_patches ----
def pack_patches(pictures: Pictures, number: int = 8) -> list[tuple[slice, Tensor]]:
    """(its rows, its patches [h * w, PATCH**2 * 3] in float64) of at most `number` pictures, evenly spread; mean and
    deviation are 0.5. By torch's antialiased interpolation of whole pictures, exact to a tenth of an 8-bit step, on the
    CPU."""
    starts = torch.tensor([0] + [h * w for h, w in pictures.grids]).cumsum(0).tolist()
    chosen = torch.linspace(0, len(pictures.images) - 1, min(number, len(pictures.images))).long().unique().tolist()
    packed = []
    for i in chosen:
        height, width = pictures.grids[i]
        planes = pictures.images[i].cpu().permute(2, 0, 1)[None].double()
        planes = F.interpolate(planes, (height * PATCH, width * PATCH), mode="bilinear", antialias=True)[0]
        tiles = ((planes / 255 - 0.5) / 0.5).reshape(3, height, PATCH, width, PATCH).permute(1, 3, 2, 4, 0)
        patches = tiles.flatten(2).flatten(0, 1).to(pictures.images[i].device)
        packed.append((slice(starts[i], starts[i + 1]), patches))
    return packed
