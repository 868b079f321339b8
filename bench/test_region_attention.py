"""region_attention beside what a user would write with torch's attention, forward and backward.

16 images of 32x32 tokens, 12 heads x 64, 6 boxes an image, 4 queries shared by all regions. The peers get
what they can have beforehand for nothing: masks and token indices are made outside the timed part, while ours
starts from the boxes. All providers' outputs and gradients are compared first.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from granvit_kernels import PackedLayout, region_attention

IMAGES, SIDE, HEADS, SIZE, BOXES, QUERIES = 16, 32, 12, 64, 6, 4
TOKENS = SIDE * SIDE


def make_boxes(low: float, high: float) -> Tensor:
    """[R, 4] in patch units, sides log-uniform in [low, high] of the image, anywhere inside it."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(IMAGES * BOXES, 2, generator=generator)
    sides = SIDE * torch.exp(math.log(low) + uniform * math.log(high / low))
    corners = torch.rand(IMAGES * BOXES, 2, generator=generator) * (SIDE - sides)
    return torch.cat([corners, corners + sides], dim=1)


def met_cells(boxes: Tensor) -> Tensor:
    """[R, TOKENS]: whether each box meets each cell of its image."""
    y, x = torch.arange(TOKENS) // SIDE, torch.arange(TOKENS) % SIDE
    x1, y1, x2, y2 = boxes.T[:, :, None]
    return (x1 < x + 1) & (x2 > x) & (y1 < y + 1) & (y2 > y)


def peers(met: Tensor) -> dict:
    """{name: function of (query [K, H, D], key, value [T, H, D]) -> [R, K, H, D]}."""
    mask = met.view(IMAGES, BOXES, 1, TOKENS).expand(-1, -1, QUERIES, -1).reshape(IMAGES, 1, -1, TOKENS)
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    tokens = [cells.nonzero()[:, 0] + i // BOXES * TOKENS for i, cells in enumerate(met)]
    every, lengths = torch.cat(tokens), [len(t) for t in tokens]

    def queries(query: Tensor, images: int) -> Tensor:  # [images, H, BOXES * K, D]
        return query.transpose(0, 1)[None, :, None].expand(images, -1, BOXES, -1, -1).flatten(2, 3)

    def regions(output: Tensor) -> Tensor:
        return output.unflatten(2, (BOXES, QUERIES)).permute(0, 2, 3, 1, 4).flatten(0, 1)

    def batch(attn_mask: Tensor):
        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            key, value = (t.unflatten(0, (IMAGES, TOKENS)).transpose(1, 2) for t in (key, value))
            return regions(F.scaled_dot_product_attention(queries(query, IMAGES), key, value, attn_mask))

        return run

    def image_by_image(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        each, split = queries(query, 1), [t.transpose(0, 1).split(TOKENS, 1) for t in (key, value)]
        outputs = [
            F.scaled_dot_product_attention(each, k[None], v[None], mask[i : i + 1])
            for i, (k, v) in enumerate(zip(*split, strict=True))
        ]
        return regions(torch.cat(outputs))

    def gather(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        each, key, value = (
            query.transpose(0, 1)[None],
            key.index_select(0, every),
            value.index_select(0, every),
        )
        outputs = [
            F.scaled_dot_product_attention(each, k.transpose(0, 1)[None], v.transpose(0, 1)[None])
            for k, v in zip(key.split(lengths), value.split(lengths), strict=True)
        ]
        return torch.cat(outputs).transpose(1, 2)

    return {
        "masked SDPA, one batch, boolean mask": batch(mask),
        "masked SDPA, one batch, additive mask": batch(bias),
        "masked SDPA, image by image": image_by_image,
        "gather, then SDPA a region": gather,
    }


@pytest.mark.parametrize(
    ("low", "high", "over_masked", "over_gather"),
    [(0.2, 0.9, 3, 4), (0.05, 0.4, 4, 2.5)],
    ids=["large", "small"],
)
def test_region_attention(compare, low, high, over_masked, over_gather):
    torch.manual_seed(0)
    layout = PackedLayout.from_grids([(SIDE, SIDE)] * IMAGES)
    boxes, image_index = make_boxes(low, high), torch.arange(IMAGES).repeat_interleave(BOXES)
    query = torch.randn(QUERIES, HEADS, SIZE, requires_grad=True)
    key, value = (torch.randn(IMAGES * TOKENS, HEADS, SIZE, requires_grad=True) for _ in range(2))
    upstream = torch.randn(IMAGES * BOXES, QUERIES, HEADS, SIZE)
    functions = {
        "granvit": lambda q, k, v: region_attention(q, k, v, layout, boxes, image_index),
        **peers(met_cells(boxes)),
    }

    def both_ways(function):
        output = function(query, key, value)
        return output, *torch.autograd.grad(output, (query, key, value), upstream)

    expected = both_ways(functions["granvit"])
    for function in functions.values():
        for ours, theirs in zip(expected, both_ways(function), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
    workload = (
        f"{IMAGES} images of {SIDE}x{SIDE} tokens, {HEADS}x{SIZE}, {BOXES} boxes of {low}-{high}, "
        f"{QUERIES} queries"
    )
    providers = {name: lambda f=function: both_ways(f) for name, function in functions.items()}
    ratios = compare("region_attention", "forward+backward, float32", workload, providers, rounds=21)
    assert min(ratio for name, ratio in ratios.items() if name.startswith("masked")) >= over_masked
    assert ratios["gather, then SDPA a region"] >= over_gather
