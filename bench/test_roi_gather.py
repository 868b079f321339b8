"""roi_gather beside F.embedding_bag with per-sample weights and, where it is installed, torchvision's
roi_align.

16 images of 32x32 to 48x48 tokens, 768 channels, 1024 boxes (sides log-uniform in 0.1-0.9 of the image), 7x7
bins. The
peers get what they need beforehand, not counted: embedding_bag each bin's token indices and weights,
    torchvision each image's feature map. embedding_bag comes twice: with the 16 corners of a bin's 4 samples,
    as one writes it, and with equal tokens of a bin merged (about 9), which is the fastest that we know.
    Boxes come in their images' order, as a batch has them, and shuffled.
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from granvit_kernels import PackedLayout, roi_gather

IMAGES, BOXES, CHANNELS, BINS = 16, 1024, 768, 7


class Workload:
    def __init__(self, shuffled: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layout = PackedLayout.from_grids(torch.randint(32, 49, (IMAGES, 2), generator=generator))
        self.tokens = torch.randn(self.layout.num_tokens, CHANNELS, generator=generator).requires_grad_(True)
        side = 0.1 * 9 ** torch.rand(BOXES, 2, generator=generator)
        corner = torch.rand(BOXES, 2, generator=generator) * (1 - side)
        self.image = torch.arange(BOXES) // (BOXES // IMAGES)
        if shuffled:
            self.image = self.image[torch.randperm(BOXES, generator=generator)]
        self.boxes = self.layout.to_grid(torch.cat([corner, corner + side], 1), self.image)
        self.grad = torch.randn(BOXES, BINS, BINS, CHANNELS, generator=generator)

    def corners(self) -> tuple[Tensor, Tensor]:
        """Token indices and weights of each bin's 4 samples' 4 corners, both [BOXES * BINS**2, 16]."""
        grids = self.layout.grids[self.image]
        cells, weights = [], []
        for axis in (1, 0):  # rows, columns
            size = grids[:, 1 - axis, None, None]
            start = self.boxes[:, axis] - 0.5
            step = ((self.boxes[:, axis + 2] - 0.5) - start) / BINS
            offset = (torch.arange(2) + 0.5) * step[:, None] / 2
            at = start[:, None, None] + torch.arange(BINS)[:, None] * step[:, None, None] + offset[:, None]
            at = at.clamp(min=0).minimum(size - 1)
            low = at.long().minimum(size - 2)
            cells.append(torch.stack([low, low + 1], -1).flatten(2))
            weights.append(torch.stack([1 - (at - low), at - low], -1).flatten(2) / 2)
        row, column = cells[0][:, :, None, :, None], cells[1][:, None, :, None, :]
        width = grids[:, 1, None, None, None, None]
        first = self.layout.cu_seqlens[self.image][:, None, None, None, None]
        index = first + row * width + column
        weight = weights[0][:, :, None, :, None] * weights[1][:, None, :, None, :]
        return index.reshape(-1, 16), weight.reshape(-1, 16)

    def merged(self, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same with each token once a bin and none of weight 0: indices, weights, the bins' offsets."""
        keys = torch.arange(len(index))[:, None] * self.layout.num_tokens + index
        used, place = keys[weight > 0].unique(return_inverse=True)
        summed = torch.zeros(len(used)).index_add_(0, place, weight[weight > 0])
        counts = (used // self.layout.num_tokens).bincount(minlength=len(index))
        return used % self.layout.num_tokens, summed, counts.cumsum(0) - counts

    def providers(self) -> dict:
        """{name: function that gives [BOXES, BINS, BINS, CHANNELS], perhaps flattened}, ours first."""
        index, weight = self.corners()
        used, summed, offsets = self.merged(index, weight)
        bag = {"mode": "sum"}
        providers = {
            "granvit": lambda: roi_gather(self.tokens, self.layout, self.boxes, self.image),
            "embedding_bag, corners": lambda: F.embedding_bag(
                index, self.tokens, per_sample_weights=weight, **bag
            ),
            "embedding_bag, merged": lambda: F.embedding_bag(
                used, self.tokens, offsets, per_sample_weights=summed, **bag
            ),
        }
        for run in list(providers.values())[1:]:
            found = run().view(BOXES, BINS, BINS, CHANNELS)
            torch.testing.assert_close(found, providers["granvit"](), rtol=0, atol=1e-4)
        return providers


@pytest.fixture(scope="module", params=[False, True], ids=["in order", "shuffled"])
def workload(request):
    made = Workload(request.param)
    made.name = "16 images, 768 channels, 1024 boxes " + ("shuffled" if request.param else "in image order")
    return made


def test_forward(compare, workload):
    with torch.no_grad():
        ratios = compare("roi_gather", "forward", workload.name, workload.providers())
    assert min(ratio for name, ratio in ratios.items() if name != "granvit") >= 1.5


def backward(output: Tensor, inputs, grad: Tensor):
    return lambda: torch.autograd.grad(output, inputs, grad.view_as(output), retain_graph=True)


def test_backward(compare, workload):
    providers = {
        name: backward(run(), workload.tokens, workload.grad) for name, run in workload.providers().items()
    }
    ratios = compare("roi_gather", "backward", workload.name, providers, rounds=9)
    assert min(ratio for name, ratio in ratios.items() if name != "granvit") >= 1.3


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_beside_torchvision(compare, workload, mode):
    from torchvision.ops import roi_align

    layout = workload.layout
    grids, ends = layout.grids.tolist(), layout.cu_seqlens.tolist()
    maps = [
        workload.tokens.detach()[a:b]
        .unflatten(0, grid)
        .permute(2, 0, 1)[None]
        .contiguous()
        .requires_grad_(True)
        for a, b, grid in zip(ends, ends[1:], grids, strict=False)
    ]
    order = [(workload.image == i).nonzero()[:, 0] for i in range(IMAGES)]
    boxes = [workload.boxes[rows] for rows in order]

    def theirs() -> list[Tensor]:
        return [roi_align(m, [b], BINS, 1.0, 2, aligned=True) for m, b in zip(maps, boxes, strict=True)]

    def ours() -> Tensor:
        return roi_gather(workload.tokens, layout, workload.boxes, workload.image)

    found = torch.cat(theirs()).permute(0, 2, 3, 1)
    torch.testing.assert_close(found, ours()[torch.cat(order)], rtol=0, atol=1e-4)
    if mode == "forward":
        with torch.no_grad():
            ratios = compare("roi_gather", mode, workload.name, {"granvit": ours, "torchvision": theirs}, rounds=3)
        assert ratios["torchvision"] >= 20
        return
    grads = [workload.grad[rows].permute(0, 3, 1, 2).contiguous() for rows in order]
    outputs = theirs()
    providers = {
        "granvit": backward(ours(), workload.tokens, workload.grad),
        "torchvision": lambda: torch.autograd.grad(outputs, maps, grads, retain_graph=True),
    }
    assert compare("roi_gather", mode, workload.name, providers, rounds=3)["torchvision"] >= 20
