"""region_attention beside what a user would write with torch's attention, forward and backward, on a CPU.

16 images of 32x32 tokens, 12 heads x 64, 6 boxes an image, 4 queries shared by all regions. The peers get what they can
have beforehand for nothing: masks and token indices are made outside the timed part, while ours starts from the boxes.
Once more as the model calls it: one query, 16 heads x 72 and coverage, which only an additive mask can tell.
"""

from collections.abc import Callable

import expected
import pytest
import torch
from attention_peers import region_attention_peers
from comparison import near
from torch import Tensor
from workloads import make_regions, randn

from granvit_kernels import region_attention

IMAGES, SIDE, BOXES = 16, 32, 6


@pytest.mark.parametrize(
    ("low", "high", "heads", "size", "queries", "coverage", "over_masked", "over_gather"),
    [
        pytest.param(0.2, 0.9, 12, 64, 4, False, 3, 4, id="large"),
        pytest.param(0.05, 0.4, 12, 64, 4, False, 4, 2.5, id="small"),
        pytest.param(0.05, 0.9, 16, 72, 1, True, 3, 2.5, id="as the model calls it"),
    ],
)
def test_region_attention(compare, low, high, heads, size, queries, coverage, over_masked, over_gather):
    made = make_regions([(SIDE, SIDE)] * IMAGES, BOXES, "cpu", (low, high))
    query = randn(queries, heads, size, seed=4).requires_grad_()
    key, value = (randn(made.layout.num_tokens, heads, size, seed=seed).requires_grad_() for seed in (5, 6))
    upstream = randn(len(made.boxes), queries, heads, size, seed=7)

    def both_ways(run: Callable) -> Callable:
        def forward_and_backward() -> tuple[Tensor, ...]:
            output = run(query, key, value)
            return output, *torch.autograd.grad(output, (query, key, value), upstream)

        return forward_and_backward

    def ours(*tensors: Tensor) -> Tensor:
        return region_attention(*tensors, made.layout, made.boxes, made.image_index, coverage=coverage)

    peers = region_attention_peers(made, query, key, value, coverage)
    workload = (
        f"{IMAGES} images of {SIDE}x{SIDE} tokens, {heads}x{size}, {BOXES} boxes of {low}-{high}, "
        f"{queries} {'query, coverage' if coverage else 'queries'}"
    )
    compare(
        "region_attention", "forward+backward, float32", workload, both_ways(ours),
        {name: lambda make=make: both_ways(make()) for name, make in peers.items()},
        check=near(*expected.region_attention(made, query, key, value, upstream, coverage)),
        aims={name: ("ratio", over_masked if name.startswith("masked") else over_gather) for name in peers},
        rounds=21,
    )  # fmt: skip
