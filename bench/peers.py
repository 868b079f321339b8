"""What others would write for the same operators: each peer on the same inputs, on any device, timed beside ours.

roi_gather's and pack_patches'; attention over regions has attention_peers.py.

Each function gives {name: make}; make() prepares what the peer may have beforehand for nothing (indices, weights,
masks) and returns what is timed. Making and running may raise: a peer that can't run is reported with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from workloads import BINS, PATCH, Pictures, Regions

HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Group:
    """Images of one size, which a peer that knows only rectangles can take as a batch."""

    tokens: slice
    height: int
    width: int
    boxes: Tensor  # [images, boxes an image, 4]

    def batch(self, packed: Tensor) -> Tensor:
        """Packed rows [T, ...] as [images, height * width, ...]."""
        return packed[self.tokens].unflatten(0, (len(self.boxes), self.height * self.width))


def groups(regions: Regions, one_batch: bool = True) -> list[Group]:
    """All images at once where they have one size, else (or without one_batch) image by image, with no copy."""
    boxes = regions.boxes.unflatten(0, (-1, regions.boxes_an_image))
    if regions.same_size and one_batch:
        return [Group(slice(None), *regions.grids[0], boxes)]
    made, start = [], 0
    for (height, width), theirs in zip(regions.grids, boxes, strict=True):
        made.append(Group(slice(start, start + height * width), height, width, theirs[None]))
        start += height * width
    return made


# ---- roi_gather ----
def corners(regions: Regions) -> tuple[Tensor, Tensor]:
    """Token indices and weights of each bin's samples' corners, both [R * BINS**2, 16]; boxes inside their images."""
    layout, boxes, device = regions.layout, regions.boxes, regions.boxes.device
    grids = layout.grids[regions.image_index]
    bins, halves = torch.arange(BINS, device=device), torch.arange(2, device=device) + 0.5
    cells, weights = [], []
    for axis in (1, 0):  # rows, columns
        size = grids[:, 1 - axis, None, None]
        start = boxes[:, axis] - 0.5
        step = ((boxes[:, axis + 2] - 0.5) - start) / BINS
        offset = halves * step[:, None] / 2
        at = start[:, None, None] + bins[:, None] * step[:, None, None] + offset[:, None]
        at = at.clamp(min=0).minimum(size - 1)
        low = at.long().minimum(size - 2)
        cells.append(torch.stack([low, low + 1], -1).flatten(2))
        weights.append(torch.stack([1 - (at - low), at - low], -1).flatten(2) / 2)
    row, column = cells[0][:, :, None, :, None], cells[1][:, None, :, None, :]
    width = grids[:, 1, None, None, None, None]
    first = layout.cu_seqlens[regions.image_index][:, None, None, None, None]
    index = first + row * width + column
    weight = weights[0][:, :, None, :, None] * weights[1][:, None, :, None, :]
    return index.reshape(-1, 16), weight.reshape(-1, 16)


def merged(index: Tensor, weight: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same with each token once a bin and none of weight 0: indices, weights, the bins' offsets."""
    keys = torch.arange(len(index), device=index.device)[:, None] * num_tokens + index
    used, place = keys[weight > 0].unique(return_inverse=True)
    summed = torch.zeros(len(used), device=index.device).index_add_(0, place, weight[weight > 0])
    counts = (used // num_tokens).bincount(minlength=len(index))
    return used % num_tokens, summed, counts.cumsum(0) - counts


def as_map(group: Group, tokens: Tensor) -> Tensor:
    """[images, C, height, width] in float32: order and dtype in one pass."""
    pixels = group.batch(tokens).unflatten(1, (group.height, group.width)).permute(0, 3, 1, 2)
    return pixels.to(torch.promote_types(tokens.dtype, torch.float32), memory_format=torch.contiguous_format)


def roi_gather_peers(regions: Regions, tokens: Tensor) -> dict[str, Callable]:
    """Of functions of nothing that give [R, BINS, BINS, C] in the tokens' dtype, perhaps flattened.

    The rectangular ones convert layout and dtype inside what is timed: torchvision has no bfloat16, and grid_sample's
    coordinates have the map's dtype, which in half precision misses by a good part of a token.
    """

    def bags(merge: bool) -> Callable:
        index, weight = corners(regions)
        offsets = None
        if merge:
            index, weight, offsets = merged(index, weight, len(tokens))
        weight = weight.to(tokens.dtype)
        return lambda: F.embedding_bag(index, tokens, offsets, mode="sum", per_sample_weights=weight)

    def torchvision() -> Callable:
        from torchvision.ops import roi_align

        def numbered(group: Group) -> Tensor:
            """Boxes as the kernel reads them, [K, 5]: from a list of tensors, an image each, every call would make them
            anew, by two launches an image."""
            image = torch.arange(len(group.boxes), device=group.boxes.device).repeat_interleave(group.boxes.shape[1])
            return torch.cat([image[:, None], group.boxes.flatten(0, 1)], 1)

        each = [(group, numbered(group)) for group in groups(regions)]

        def run() -> Tensor:
            pooled = [roi_align(as_map(group, tokens), boxes, BINS, 1.0, 2, aligned=True) for group, boxes in each]
            return torch.cat(pooled).permute(0, 2, 3, 1).to(tokens.dtype, memory_format=torch.contiguous_format)

        return run

    def places(group: Group) -> Tensor:
        """grid_sample's coordinates of 2 x 2 samples a bin: [images, boxes * 2 * BINS, 2 * BINS, 2]."""
        at = (torch.arange(2 * BINS, device=tokens.device) + 0.5) / (2 * BINS)
        low, high = group.boxes[..., None, :2], group.boxes[..., None, 2:]
        size = torch.tensor([group.width, group.height], device=tokens.device)
        centres = 2 * (low + at[:, None] * (high - low)) / size - 1  # [images, boxes, 2 * BINS, (x, y)]
        shape = (*centres.shape[:2], 2 * BINS, 2 * BINS)
        x, y = centres[..., None, :, 0].expand(shape), centres[..., :, None, 1].expand(shape)
        return torch.stack([x, y], -1).flatten(1, 2)

    def grid_sample() -> Callable:
        each = [(group, places(group)) for group in groups(regions)]
        options = {"mode": "bilinear", "padding_mode": "border", "align_corners": False}

        def run() -> Tensor:
            pooled = [F.avg_pool2d(F.grid_sample(as_map(g, tokens), at, **options), 2) for g, at in each]
            rows = [f.unflatten(2, (-1, BINS)).permute(0, 2, 3, 4, 1).flatten(0, 1) for f in pooled]
            return torch.cat(rows).to(tokens.dtype)

        return run

    return {
        "torchvision": torchvision,
        "embedding_bag, corners": partial(bags, False),
        "embedding_bag, merged": partial(bags, True),
        "grid_sample": grid_sample,
    }


def roi_align_loop_peers(regions: Regions, tokens: Tensor, bins: int, ratio: int) -> dict[str, Callable]:
    """torchvision in a Python loop over unpadded maps, as models that read regions off them call it: of functions of
    nothing that give [R, bins, bins, C]."""

    def loop(a_box_a_call: bool) -> Callable:
        from torchvision.ops import roi_align

        each = groups(regions, one_batch=False)

        def run() -> Tensor:
            pooled = []
            for group in each:
                image = as_map(group, tokens)
                boxes = group.boxes[0].split(1) if a_box_a_call else [group.boxes[0]]
                pooled += [roi_align(image, [rows], bins, 1.0, ratio, aligned=True) for rows in boxes]
            return torch.cat(pooled).permute(0, 2, 3, 1).to(tokens.dtype)

        return run

    return {
        "torchvision, an image a call": partial(loop, False),
        "torchvision, a box a call": partial(loop, True),
    }


# ---- pack_patches ----
def pack_patches_peers(pictures: Pictures, dtype: torch.dtype, resizing: bool | None = None) -> dict[str, Callable]:
    """Of functions of nothing that give the patches [T, PATCH**2 * 3]; the processor's are padded and float32.

    Pictures come as the peer likes them best, contiguous planes [3, H, W], stacked where they have one size.
    """
    resizing = pictures.resized if resizing is None else resizing
    planes = [image.permute(2, 0, 1).contiguous() for image in pictures.images]

    def processor() -> Callable:
        from transformers.models.siglip2.image_processing_siglip2 import Siglip2ImageProcessor

        most = max(h * w for h, w in pictures.grids)
        process = Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=most, do_resize=resizing)
        device = str(planes[0].device)
        return lambda: process(planes, return_tensors="pt", device=device)["pixel_values"]

    def rearranged(batch: Tensor, height: int, width: int) -> Tensor:
        """uint8 [N, 3, H, W] -> [N * height * width, PATCH**2 * 3]."""
        from torchvision.transforms.v2 import functional

        if resizing:
            batch = functional.resize(batch, [height * PATCH, width * PATCH], antialias=True)
        batch = (batch.to(torch.float32) / 255 - 0.5) / 0.5
        tiles = batch.unflatten(3, (width, PATCH)).unflatten(2, (height, PATCH))
        return tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(0, 2).to(dtype)

    def torchvision(compiled: bool) -> Callable:
        import torchvision.transforms.v2  # noqa: F401  its absence shows here

        function = rearranged
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(rearranged, dynamic=not pictures.same_size)
        if pictures.same_size:
            batch = torch.stack(planes)
            return lambda: function(batch, *pictures.grids[0])
        each = list(zip(planes, pictures.grids, strict=True))
        return lambda: torch.cat([function(plane[None], *grid) for plane, grid in each])

    return {
        "transformers' processor": processor,
        "torchvision": partial(torchvision, False),
        "torchvision, compiled": partial(torchvision, True),
    }


def unpadded(output: Tensor, pictures: Pictures) -> Tensor:
    """The patches of the processor's padded rows; others' as they are."""
    if output.dim() == 2:
        return output
    return torch.cat([rows[: h * w] for rows, (h, w) in zip(output, pictures.grids, strict=True)])
