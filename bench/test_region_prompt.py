"""The model's region prompt beside attention to keys and values of every token, by our own region_attention and by
torch's, forward and backward, on a CPU.

16 images of 32x32 tokens, 768 channels, 12 heads, 6 boxes an image, coverage; from features and queries to projected
means, before the box's geometry and the projector. Both sides have the same parameters.
"""

import expected
import pytest
import torch
from attention_peers import region_attention_peers, region_prompt_peers
from comparison import near
from torch import nn
from workloads import make_regions, randn

from granvit.model.region_prompt import RegionPrompt

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
            output = attend()
            return output.detach(), *torch.autograd.grad(output, leaves, upstream)

        return forward_and_backward

    peers = region_prompt_peers(region_attention_peers, made, features, prompt.queries, prompt.key, prompt.value)
    compare(
        "region_prompt", "forward+backward, float32",
        f"{IMAGES} images of {SIDE}x{SIDE} tokens, {HEADS}x{WIDTH // HEADS}, {BOXES} boxes, K = {queries}, coverage",
        both_ways(lambda: prompt.attend(features, *place).flatten(2)),
        {name: lambda make=make: both_ways(make()) for name, make in peers.items()},
        check=near(*expected.region_prompt(made, features, prompt.queries, prompt.key, prompt.value, upstream)),
        aims={"region_attention, keys and values": ("ratio", aim)}, rounds=11,
    )  # fmt: skip
