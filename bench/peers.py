"""What others would write for the same operators: each peer on the same inputs, on any device, timed beside ours.

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
from workloads import BINS, PATCH, Pictures, Regions, cell_shares

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


def roi_gather_peers(regions: Regions, tokens: Tensor) -> dict[str, Callable]:
    """Of functions of nothing that give [R, BINS, BINS, C] in the tokens' dtype, perhaps flattened.

    The rectangular ones convert layout and dtype inside what is timed: torchvision has no bfloat16, and grid_sample's
    coordinates have the map's dtype, which in half precision misses by a good part of a token.
    """

    def maps(group: Group) -> Tensor:
        pixels = group.batch(tokens).unflatten(1, (group.height, group.width)).permute(0, 3, 1, 2)
        # Order and dtype in one pass.
        return pixels.to(torch.promote_types(tokens.dtype, torch.float32), memory_format=torch.contiguous_format)

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
            pooled = [roi_align(maps(group), boxes, BINS, 1.0, 2, aligned=True) for group, boxes in each]
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
            pooled = [F.avg_pool2d(F.grid_sample(maps(g), at, **options), 2) for g, at in each]
            rows = [f.unflatten(2, (-1, BINS)).permute(0, 2, 3, 4, 1).flatten(0, 1) for f in pooled]
            return torch.cat(rows).to(tokens.dtype)

        return run

    return {
        "torchvision": torchvision,
        "embedding_bag, corners": partial(bags, False),
        "embedding_bag, merged": partial(bags, True),
        "grid_sample": grid_sample,
    }


# ---- region_attention ----
def region_attention_peers(
    regions: Regions, query: Tensor, key: Tensor, value: Tensor, coverage: bool = False
) -> dict[str, Callable]:
    """Of functions of nothing that give [R, K, H, D]; query [K, H, D] is shared by all regions. Only an additive mask
    can say how much of a cell is covered."""
    count, queries = len(regions.boxes), len(query)

    def shares(group: Group) -> Tensor:  # [images, boxes, height * width]
        return cell_shares(group.boxes, group.height, group.width)

    def masked(one_batch: bool, additive: bool) -> Callable:
        each = []
        for group in groups(regions, one_batch):
            mask = shares(group).repeat_interleave(queries, 1)[:, None]
            if additive:
                mask = (mask if coverage else (mask > 0).float()).log().to(key.dtype)
            else:
                mask = mask > 0
            each.append((group, mask))

        def run() -> Tensor:
            outputs = []
            for group, mask in each:
                images, boxes = group.boxes.shape[:2]
                q = query.transpose(0, 1)[None, :, None].expand(images, -1, boxes, -1, -1).flatten(2, 3)
                k, v = (group.batch(t).transpose(1, 2) for t in (key, value))
                out = F.scaled_dot_product_attention(q, k, v, mask)
                outputs.append(out.unflatten(2, (boxes, queries)).permute(0, 2, 3, 1, 4).flatten(0, 1))
            return torch.cat(outputs)

        return run

    def gather() -> Callable:
        """All regions' tokens copied out once, then attention over sequences of their own lengths."""
        each, start = [], 0
        for group in groups(regions):
            cells = shares(group).nonzero()
            each.append(start + cells[:, 0] * group.height * group.width + cells[:, 2])
            start += len(group.boxes) * group.height * group.width
        every, lengths = torch.cat(each), regions.met()
        ends = F.pad(lengths.cumsum(0), (1, 0)).int()
        if key.device.type == "cuda":
            from torch.nn.attention.varlen import varlen_attn

            starts = torch.arange(0, (count + 1) * queries, queries, dtype=torch.int32, device=key.device)
            longest = int(lengths.max())

            def attend(k: Tensor, v: Tensor) -> Tensor:
                rows = query.expand(count, -1, -1, -1).flatten(0, 1)
                return varlen_attn(rows, k, v, starts, ends, queries, longest).unflatten(0, (count, queries))
        else:  # it has no CPU backend
            split, q = lengths.tolist(), query.transpose(0, 1)[None]

            def attend(k: Tensor, v: Tensor) -> Tensor:
                pairs = zip(k.split(split), v.split(split), strict=True)
                outputs = [
                    F.scaled_dot_product_attention(q, a.transpose(0, 1)[None], b.transpose(0, 1)[None])
                    for a, b in pairs
                ]
                return torch.cat(outputs).transpose(1, 2)

        return lambda: attend(key.index_select(0, every), value.index_select(0, every))

    batch = "one batch" if regions.same_size else "image by image"
    additive = {f"masked SDPA, {batch}, additive mask": partial(masked, True, True)}
    if coverage:
        return additive
    on_cpu = key.device.type == "cpu"
    return {
        f"masked SDPA, {batch}, boolean mask": partial(masked, True, False),
        **additive,
        **({"masked SDPA, image by image": partial(masked, False, False)} if on_cpu else {}),
        "gather, then SDPA a region" if on_cpu else "gather, then varlen attention": gather,
    }


def flex_attention_peers(regions: Regions, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable]:
    """FlexAttention, which compiles for every shape, and the making of its mask, which returns None."""
    count, queries = len(regions.boxes), len(query)

    def block_mask():
        """Images of one size as a batch, others as one long sequence."""
        from torch.nn.attention.flex_attention import create_block_mask

        images = len(regions.grids) if regions.same_size else 1
        rows, columns = count // images, len(key) // images
        owner, place = regions.layout.image_ids(), regions.layout.positions()
        y, x = place[:, 0].contiguous(), place[:, 1].contiguous()
        x1, y1, x2, y2 = (side.contiguous() for side in regions.boxes.T)

        def meets(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            r, t = batch * rows + row // queries, batch * columns + column
            inside = (x1[r] < x[t] + 1) & (x2[r] > x[t]) & (y1[r] < y[t] + 1) & (y2[r] > y[t])
            return inside & (owner[t] == regions.image_index[r])

        return images, create_block_mask(meets, images, None, rows * queries, columns, device=str(key.device))

    def flex() -> Callable:
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.reset()  # a new shape is compiled for itself, not taken for one more of a dynamic size
        attend = torch.compile(flex_attention, dynamic=False) if key.device.type == "cuda" else flex_attention
        images, mask = block_mask()

        def run() -> Tensor:
            q = query.transpose(0, 1)[None, :, None].expand(images, -1, count // images, -1, -1).flatten(2, 3)
            k, v = (t.unflatten(0, (images, -1)).transpose(1, 2) for t in (key, value))
            out = attend(q, k, v, block_mask=mask)
            return out.unflatten(2, (-1, queries)).permute(0, 2, 3, 1, 4).flatten(0, 1)

        return run

    return {"FlexAttention": flex, "FlexAttention's block mask": lambda: lambda: block_mask() and None}


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
