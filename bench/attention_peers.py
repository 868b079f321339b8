"""What others would write for attention over regions; as peers.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from peers import Group, groups
from torch import Tensor, nn
from workloads import Regions, cell_shares

from granvit_kernels import region_attention


def region_attention_peers(
    regions: Regions, query: Tensor, key: Tensor, value: Tensor, coverage: bool = False
) -> dict[str, Callable]:
    """Of functions of a query [K, H, D] that all regions share, and of key and value [T, H, D], like these, that give
    [R, K, H, D]. With coverage only those that can say how much of a cell is covered."""
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

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
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
        each, biases, start = [], [], 0
        for group in groups(regions):
            covered = shares(group)
            cells = covered.nonzero()
            each.append(start + cells[:, 0] * group.height * group.width + cells[:, 2])
            biases.append(covered[covered > 0].log().to(key.dtype))
            start += len(group.boxes) * group.height * group.width
        every, lengths = torch.cat(each), regions.met()
        ends = F.pad(lengths.cumsum(0), (1, 0)).int()
        if key.device.type == "cuda":
            from torch.nn.attention.varlen import varlen_attn

            starts = torch.arange(0, (count + 1) * queries, queries, dtype=torch.int32, device=key.device)
            longest = int(lengths.max())

            def attend(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
                rows = query.expand(count, -1, -1, -1).flatten(0, 1)
                return varlen_attn(rows, k, v, starts, ends, queries, longest).unflatten(0, (count, queries))
        else:  # it has no CPU backend
            split = lengths.tolist()
            masks = [bias[None] if coverage else None for bias in torch.cat(biases).split(split)]

            def attend(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
                q = query.transpose(0, 1)[None]
                each = zip(k.split(split), v.split(split), masks, strict=True)
                outputs = [
                    F.scaled_dot_product_attention(q, a.transpose(0, 1)[None], b.transpose(0, 1)[None], mask)
                    for a, b, mask in each
                ]
                return torch.cat(outputs).transpose(1, 2)

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend(query, key.index_select(0, every), value.index_select(0, every))

        return run

    batch = "one batch" if regions.same_size else "image by image"
    additive = {f"masked SDPA, {batch}, additive mask": partial(masked, True, True)}
    on_cpu = key.device.type == "cpu"
    if coverage:  # varlen attention takes no bias
        return {**additive, **({"gather, then SDPA a region": gather} if on_cpu else {})}
    return {
        f"masked SDPA, {batch}, boolean mask": partial(masked, True, False),
        **additive,
        **({"masked SDPA, image by image": partial(masked, False, False)} if on_cpu else {}),
        "gather, then SDPA a region" if on_cpu else "gather, then varlen attention": gather,
    }


def flex_attention_peers(
    regions: Regions, query: Tensor, key: Tensor, value: Tensor, coverage: bool = False
) -> dict[str, Callable]:
    """FlexAttention, which compiles for every shape, and the making of its mask, which returns None: of functions as
    region_attention_peers gives."""
    count, queries = len(regions.boxes), len(query)

    images = len(regions.grids) if regions.same_size else 1
    """Images of one size are a batch, others one long sequence."""
    rows, columns = count // images, len(key) // images
    owner, place = regions.layout.image_ids(), regions.layout.positions()
    y, x = place[:, 0].contiguous(), place[:, 1].contiguous()
    x1, y1, x2, y2 = (side.contiguous() for side in regions.boxes.T)

    def meets(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        r, t = batch * rows + row // queries, batch * columns + column
        inside = (x1[r] < x[t] + 1) & (x2[r] > x[t]) & (y1[r] < y[t] + 1) & (y2[r] > y[t])
        return inside & (owner[t] == regions.image_index[r])

    def covered(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        r, t = batch * rows + row // queries, batch * columns + column
        width = torch.minimum(x2[r], x[t] + 1.0) - torch.maximum(x1[r], x[t] + 0.0)
        height = torch.minimum(y2[r], y[t] + 1.0) - torch.maximum(y1[r], y[t] + 0.0)
        return score + (width * height).log()

    def block_mask():
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(meets, images, None, rows * queries, columns, device=str(key.device))

    def flex() -> Callable:
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.reset()  # a new shape is compiled for itself, not taken for one more of a dynamic size
        attend = torch.compile(flex_attention, dynamic=False) if key.device.type == "cuda" else flex_attention
        mask, score = block_mask(), covered if coverage else None

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q = query.transpose(0, 1)[None, :, None].expand(images, -1, count // images, -1, -1).flatten(2, 3)
            k, v = (t.unflatten(0, (images, -1)).transpose(1, 2) for t in (key, value))
            out = attend(q, k, v, score_mod=score, block_mask=mask)
            return out.unflatten(2, (-1, queries)).permute(0, 2, 3, 1, 4).flatten(0, 1)

        return run

    return {"FlexAttention": flex, "FlexAttention's block mask": lambda: lambda *_: block_mask() and None}


def region_prompt_peers(
    peers_of: Callable, regions: Regions, features: Tensor, query: Tensor, key: nn.Linear, value: nn.Linear
) -> dict[str, Callable]:
    """Region prompts that make keys and values of every token, and attend by our own region_attention or by those of
    peers_of, with coverage: of functions of nothing that give [R, K, C]. features [T, C], query [K, H, C / H]."""

    def own() -> Callable:
        return lambda *tensors: region_attention(
            *tensors, regions.layout, regions.boxes, regions.image_index, coverage=True
        )

    def prompt(make: Callable) -> Callable:
        attend = make()

        def run() -> Tensor | None:
            tensors = (layer(features).unflatten(1, query.shape[1:]) for layer in (key, value))
            output = attend(query, *tensors)
            return None if output is None else output.flatten(2)

        return run

    like = features.detach().unflatten(1, query.shape[1:])
    peers = {"region_attention, keys and values": own, **peers_of(regions, query, like, like, coverage=True)}
    return {name: partial(prompt, make) for name, make in peers.items()}
