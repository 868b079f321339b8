"""roi_gather on a CPU beside F.embedding_bag with per-sample weights and, where it is installed, torchvision.

16 images of 32x32 to 48x48 tokens, 768 channels, 1024 boxes (sides log-uniform in 0.1-0.9 of the image), 7x7 bins, in
their images' order, as a batch has them, and shuffled. embedding_bag gets each bin's token indices and weights
beforehand, not counted, and comes twice: with the 16 corners of a bin's 4 samples, as people write it, and with equal
tokens of a bin merged (about 9), which is the fastest that we know. Rows state their share of what a large copy reaches
in the same run: tokens and bins, or their gradients, moved once.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import expected
import pytest
import torch
from comparison import near
from peers import roi_gather_peers
from torch import Tensor
from workloads import BINS, Regions, make_regions, randn

from granvit_kernels import roi_gather

IMAGES, BOXES, CHANNELS = 16, 1024, 768


@pytest.fixture(scope="module", params=[False, True], ids=["in order", "shuffled"])
def regions(request) -> tuple[str, Regions]:
    generator = torch.Generator().manual_seed(0)
    grids = torch.randint(32, 49, (IMAGES, 2), generator=generator).tolist()
    made = make_regions(grids, BOXES // IMAGES, "cpu", (0.1, 0.9))
    if not request.param:
        return f"{IMAGES} images, {CHANNELS} channels, {BOXES} boxes in image order", made
    order = torch.randperm(BOXES, generator=generator)
    made = replace(made, boxes=made.boxes[order], image_index=made.image_index[order])
    return f"{IMAGES} images, {CHANNELS} channels, {BOXES} boxes shuffled", made


@pytest.fixture(scope="module")
def tokens(regions) -> Tensor:
    return randn(regions[1].layout.num_tokens, CHANNELS).requires_grad_()


def measure(compare: Callable, mode: str, regions: tuple, tokens: Tensor, names: dict[str, float], rounds: int) -> None:
    """names: {peer: its aim}."""
    workload, made = regions
    peers = {name: make for name, make in roi_gather_peers(made, tokens).items() if name in names}
    aims = {name: ("ratio", least) for name, least in names.items()}
    nbytes = tokens.element_size() * CHANNELS * (len(tokens) + len(made.boxes) * BINS**2)  # or of the gradients

    def ours() -> Tensor:
        return roi_gather(tokens, made.layout, made.boxes, made.image_index)

    if mode == "forward":
        with torch.no_grad():
            check = near(expected.roi_gather(made, tokens))
            compare("roi_gather", mode, workload, ours, peers, check=check, aims=aims, nbytes=nbytes, rounds=rounds)
        return
    grad = randn(len(made.boxes), BINS, BINS, CHANNELS, seed=4)

    def backward(run: Callable) -> Callable:
        output = run()
        return lambda: torch.autograd.grad(output, tokens, grad.view_as(output), retain_graph=True)[0]

    peers = {name: lambda make=make: backward(make()) for name, make in peers.items()}
    check = near(expected.roi_gather(made, tokens, grad))
    compare("roi_gather", mode, workload, backward(ours), peers, check=check, aims=aims, nbytes=nbytes, rounds=rounds)


@pytest.mark.parametrize(("mode", "least", "rounds"), [("forward", 1.5, 15), ("backward", 1.3, 9)])
def test_roi_gather(compare, regions, tokens, mode, least, rounds):
    names = {"embedding_bag, corners": least, "embedding_bag, merged": least}
    measure(compare, mode, regions, tokens, names, rounds)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_beside_torchvision(compare, regions, tokens, mode):
    if regions[0].endswith("shuffled"):
        pytest.skip("it takes boxes image by image")
    measure(compare, mode, regions, tokens, {"torchvision": 20}, rounds=3)
