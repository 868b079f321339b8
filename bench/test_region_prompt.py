"""The model's region prompt beside attention to keys and values of every token, forward and backward, on a CPU.

16 images of 32x32 tokens, 768 channels, 12 heads, 6 boxes an image, coverage; from features and queries to projected
means, before the box's geometry and the projector. Both sides have the same parameters.
"""

import expected
import pytest
import torch
from comparison import near
from torch import nn
from workloads import make_regions, randn

from granvit.model.region_prompt import RegionPrompt
from granvit_kernels import region_attention

IMAGES, SIDE, HEADS, WIDTH, BOXES = 16, 32, 12, 768, 6


@pytest.mark.parametrize(("queries", "aim"), [(1, 15), (4, 8)])
def test_region_prompt(compare, queries, aim):
    made = make_regions([(SIDE, SIDE)] * IMAGES, BOXES, "cpu")
    place = made.layout, made.boxes, made.image_index
    torch.manual_seed(8)
    prompt = RegionPrompt(WIDTH, HEADS, queries, WIDTH)
    nn.init.normal_(prompt.value.bias)
    features = randn(made.layout.num_tokens, WIDTH, seed=5).requires_grad_()
    leaves = features, prompt.queries, prompt.key.weight, prompt.value.weight, prompt.value.bias
    upstream = randn(len(made.boxes), queries, WIDTH, seed=7)

    def both_ways(attend):
        def forward_and_backward():
            output = attend().flatten(2)
            return output.detach(), *torch.autograd.grad(output, leaves, upstream)

        return forward_and_backward

    def by_keys_and_values():
        shape = len(features), HEADS, WIDTH // HEADS
        keys, values = prompt.key(features).view(shape), prompt.value(features).view(shape)
        return region_attention(prompt.queries, keys, values, *place, coverage=True)

    peer = "keys and values, then region_attention"
    compare(
        "region_prompt", "forward+backward, float32",
        f"{IMAGES} images of {SIDE}x{SIDE} tokens, {HEADS}x{WIDTH // HEADS}, {BOXES} boxes, K = {queries}, coverage",
        both_ways(lambda: prompt.attend(features, *place)), {peer: lambda: both_ways(by_keys_and_values)},
        check=near(*expected.region_prompt(made, features, prompt.queries, prompt.key, prompt.value, upstream)),
        aims={peer: ("ratio", aim)}, rounds=11,
    )  # fmt: skip
