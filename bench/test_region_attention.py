"""region_attention beside what a user would write with torch's attention, forward and backward, on a CPU.

16 images of 32x32 tokens, 12 heads x 64, 6 boxes an image, 4 queries shared by all regions. The peers get what they can
have beforehand for nothing: masks and token indices are made outside the timed part, while ours starts from the boxes.
"""

import expected
import pytest
import torch
from comparison import near
from peers import region_attention_peers
from workloads import make_regions, randn

from granvit_kernels import region_attention

IMAGES, SIDE, HEADS, SIZE, BOXES, QUERIES = 16, 32, 12, 64, 6, 4


@pytest.mark.parametrize(
    ("low", "high", "over_masked", "over_gather"),
    [(0.2, 0.9, 3, 4), (0.05, 0.4, 4, 2.5)],
    ids=["large", "small"],
)
def test_region_attention(compare, low, high, over_masked, over_gather):
    made = make_regions([(SIDE, SIDE)] * IMAGES, BOXES, "cpu", (low, high))
    query = randn(QUERIES, HEADS, SIZE, seed=4).requires_grad_()
    key, value = (randn(made.layout.num_tokens, HEADS, SIZE, seed=seed).requires_grad_() for seed in (5, 6))
    upstream = randn(len(made.boxes), QUERIES, HEADS, SIZE, seed=7)

    def both_ways(run):
        def forward_and_backward():
            output = run()
            return output, *torch.autograd.grad(output, (query, key, value), upstream)

        return forward_and_backward

    ours = both_ways(lambda: region_attention(query, key, value, made.layout, made.boxes, made.image_index))
    peers = region_attention_peers(made, query, key, value)
    workload = (
        f"{IMAGES} images of {SIDE}x{SIDE} tokens, {HEADS}x{SIZE}, {BOXES} boxes of {low}-{high}, "
        f"{QUERIES} queries"
    )
    compare(
        "region_attention", "forward+backward, float32", workload, ours,
        {name: lambda make=make: both_ways(make()) for name, make in peers.items()},
        check=near(*expected.region_attention(made, query, key, value, upstream)),
        aims={name: ("ratio", over_masked if name.startswith("masked") else over_gather) for name in peers},
        rounds=21,
    )  # fmt: skip
