"""What the operators are measured on with a GPU: made on any device and at any size, so that the tests can check the
peers (peers.py) on a tiny one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from granvit_kernels import PackedLayout, fit_grid

PATCH = 16
BINS = 7

DESCRIPTIONS = {
    "A": "512 images of 512x512 px, 6 boxes each",
    "B": "64 images of 224 to 1536 px, 6 boxes each",
    "C": "one image of 4096 tokens, 512 boxes",
    "D": "1024 images of 64x64 px, one box each",
}
COUNTS = {"A": (512, 6), "B": (64, 6), "C": (1, 512), "D": (1024, 1)}
"""Images, and boxes an image."""

SIDES = {"A": (512, 512), "B": (224, 1536), "C": (1024, 1024), "D": (64, 64)}
"""Shortest and longest side of an image in pixels, drawn log-uniformly."""

BOX_SIDES = (0.05, 0.9)
"""Of a box, as a share of its image's, drawn log-uniformly: our convention, from a word to nearly everything."""


@dataclass(frozen=True)
class Regions:
    """Boxes of packed images, as many an image, in the images' order."""

    layout: PackedLayout
    boxes: Tensor
    image_index: Tensor
    grids: list[tuple[int, int]]

    @property
    def boxes_an_image(self) -> int:
        return len(self.boxes) // len(self.grids)

    @property
    def same_size(self) -> bool:
        return len(set(self.grids)) == 1

    def met(self) -> Tensor:
        """Cells that each box meets with positive area, int64 [R]. The boxes must lie inside their images."""
        x1, y1, x2, y2 = self.boxes.T
        return ((x2.ceil() - x1.floor()) * (y2.ceil() - y1.floor())).long()


def cell_shares(boxes: Tensor, height: int, width: int) -> Tensor:
    """The share of each cell of a grid that each box [..., 4] covers, [..., height * width]: 0 where it does not meet
    the cell."""

    def along(low: Tensor, high: Tensor, size: int) -> Tensor:
        cell = torch.arange(size, device=boxes.device)
        return (torch.minimum(high[..., None], cell + 1) - torch.maximum(low[..., None], cell)).clamp(min=0)

    x1, y1, x2, y2 = boxes.unbind(-1)
    return (along(y1, y2, height)[..., :, None] * along(x1, x2, width)[..., None, :]).flatten(-2)


def log_uniform(low: float, high: float, *shape: int, generator: torch.Generator) -> Tensor:
    return low * (high / low) ** torch.rand(*shape, generator=generator)


def make_regions(grids: list[tuple[int, int]], boxes: int, device: str, sides=BOX_SIDES) -> Regions:
    """`boxes` an image, anywhere inside it."""
    generator = torch.Generator().manual_seed(0)
    layout = PackedLayout.from_grids(grids)
    image_index = torch.arange(len(grids)).repeat_interleave(boxes)
    side = log_uniform(*sides, len(image_index), 2, generator=generator)
    corner = torch.rand(side.shape, generator=generator) * (1 - side)
    found = layout.to_grid(torch.cat([corner, corner + side], 1), image_index)
    return Regions(layout.to(device), found.to(device), image_index.to(device), [tuple(grid) for grid in grids])


def image_sizes(workload: str, images: int | None = None) -> list[tuple[int, int]]:
    """(height, width) in pixels, whole patches."""
    images = images or COUNTS[workload][0]
    generator = torch.Generator().manual_seed(1)
    drawn = log_uniform(*SIDES[workload], images, 2, generator=generator)
    return [tuple(side) for side in ((drawn / PATCH).round().long() * PATCH).tolist()]


def regions(workload: str, device: str, images: int | None = None, boxes: int | None = None) -> Regions:
    """One of DESCRIPTIONS; images, boxes: fewer than it has, for tests."""
    grids = [(height // PATCH, width // PATCH) for height, width in image_sizes(workload, images)]
    return make_regions(grids, boxes or COUNTS[workload][1], device)


@dataclass(frozen=True)
class Pictures:
    """Pictures [H, W, 3] to pack, and the grids they are resampled to."""

    images: list[Tensor]
    grids: list[tuple[int, int]]

    @property
    def resized(self) -> bool:
        pairs = zip(self.grids, self.images, strict=True)
        return any((h * PATCH, w * PATCH) != tuple(image.shape[:2]) for (h, w), image in pairs)

    @property
    def same_size(self) -> bool:
        return len({tuple(image.shape) for image in self.images}) == 1

    @property
    def tokens(self) -> int:
        return sum(h * w for h, w in self.grids)


def picture_sizes(
    workload: str, resized: bool, images: int | None = None, budget: int = 1024
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(height, width) in pixels, and the grids in patches: the workload's images as they are, or larger by a fifth and
    resampled to at most `budget` patches."""
    sizes = image_sizes(workload, images)
    if not resized:
        return sizes, [(height // PATCH, width // PATCH) for height, width in sizes]
    sizes = [(height * 6 // 5, width * 6 // 5) for height, width in sizes]
    return sizes, [fit_grid(height, width, PATCH, budget) for height, width in sizes]


def pictures(workload: str, resized: bool, device: str, images: int | None = None, budget: int = 1024) -> Pictures:
    """Noise of picture_sizes' sizes."""
    sizes, grids = picture_sizes(workload, resized, images, budget)
    generator = torch.Generator(device).manual_seed(2)
    made = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator, device=device) for size in sizes]
    return Pictures(made, grids)


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 3) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(seed))


GRAPH = "granvit, CUDA graph"

PACKING_SHARE = 0.9
"""Aim of a training step: this share of what packing saves, the ratio of operations with both sides' padding."""

AIMS = [
    ("roi_gather", "forward", "A", GRAPH, "share", 0.70),
    ("roi_gather", "forward", "A", "torchvision", "ratio", 5),
    ("roi_gather", "backward", "A", "torchvision", "ratio", 8),
    ("region_attention", "forward+backward", "A", GRAPH, "share", 0.60),
    ("region_attention", "forward+backward", "A", "FlexAttention", "ratio", 5),
    ("region_attention", "forward+backward", "A", "gather, then varlen attention", "ratio", 3),
    ("pack_patches", "as it is", "A", GRAPH, "share", 0.70),
    ("pack_patches", "as it is", "A", "transformers' processor", "ratio", 10),
    ("pack_patches", "resized", "A", "transformers' processor", "ratio", 10),
    ("training", "pretrain", "large", "granvit", "mfu", 0.45),
]
"""(operator, mode, workload, provider, figure, at least): on a GPU of Hopper's kind in bfloat16. share: of the
bandwidth of a large copy on the same card. ratio: of the provider's median to ours. mfu: of the card's peak."""


def aims(operator: str, mode: str, workload: str) -> dict[str, tuple[str, float]]:
    """{provider: (figure, least)} of AIMS; workload: its letter or shape."""
    wanted = operator, mode, workload
    return {provider: (figure, least) for *case, provider, figure, least in AIMS if tuple(case) == wanted}
