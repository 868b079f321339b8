"""For the token-major backward kernels: tiles of tokens, and which regions each image has. One launch, no atomics.

A backward kernel gives each program a tile of one image's tokens and lets it visit that image's regions in their order:
so every sum has one order, and equal inputs give equal bits. The host knows neither the images' lengths nor their
numbers of regions without asking the device; a bound on the number of tiles is enough for it.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .triton_common import INDICES

BLOCK = 1024


class Tiles(NamedTuple):
    """image int32 [N]: the image of each tile, -1 for those past the last · token int32 [N]: its first token ·
    first int32 [B + 1], regions int32 [R]: image b has the regions regions[first[b]:first[b + 1]], rising. Regions
    whose index names no image stand nowhere."""

    image: Tensor
    token: Tensor
    first: Tensor
    regions: Tensor


def tile_tokens(cu_seqlens: Tensor, image_index: Tensor, num_tokens: int, tile: int) -> Tiles:
    """Tiles of at most `tile` tokens, aligned to each image's first: N is ceil(num_tokens / tile) + B at most.

    cu_seqlens int32 [B + 1], B >= 1; image_index int32 or int64 [R], contiguous.
    """
    images, count = cu_seqlens.shape[0] - 1, triton.cdiv(num_tokens, tile) + cu_seqlens.shape[0] - 1
    image, token = cu_seqlens.new_empty(count), cu_seqlens.new_empty(count)  # each begins at a multiple of 16 bytes
    first, regions = cu_seqlens.new_empty(images + 1), cu_seqlens.new_empty(image_index.shape[0])
    _tile_tokens[(images,)](
        cu_seqlens=cu_seqlens, image_index=image_index, tile_image=image, tile_token=token, region_first=first,
        regions=regions, images=images, num_regions=image_index.shape[0], num_tiles=count, TILE=tile, BLOCK=BLOCK,
    )  # fmt: skip
    return Tiles(image, token, first, regions)


@triton.jit(
    do_not_specialize=["images", "num_regions", "num_tiles"],  # they change from batch to batch
    do_not_specialize_on_alignment=INDICES,
)
def _tile_tokens(
    cu_seqlens, image_index, tile_image, tile_token, region_first, regions, images, num_regions, num_tiles,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b writes image b's part of everything; it counts what lies before it by itself."""
    image = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = image * 0
    for start in range(0, image, BLOCK):
        earlier = start + lane < image
        begin = tl.load(cu_seqlens + start + lane, mask=earlier, other=0)
        end = tl.load(cu_seqlens + start + lane + 1, mask=earlier, other=0)
        before += tl.sum((end - begin + TILE - 1) // TILE)
    begin = tl.load(cu_seqlens + image)
    count = (tl.load(cu_seqlens + image + 1) - begin + TILE - 1) // TILE
    stop = tl.where(image == images - 1, num_tiles - before, count)  # the last image ends the list
    for start in range(0, stop, BLOCK):
        i = start + lane
        tl.store(tile_image + before + i, tl.where(i < count, image, -1), mask=i < stop)
        tl.store(tile_token + before + i, begin + i * TILE, mask=i < stop)

    at = image * 0
    for start in range(0, num_regions, BLOCK):
        owner = tl.load(image_index + start + lane, mask=start + lane < num_regions, other=-1)
        at += tl.sum(((owner >= 0) & (owner < image)).to(tl.int32))
    tl.store(region_first + image, at)
    for start in range(0, num_regions, BLOCK):
        owner = tl.load(image_index + start + lane, mask=start + lane < num_regions, other=-1)
        mine = (owner == image).to(tl.int32)
        tl.store(regions + at + tl.cumsum(mine) - mine, start + lane, mask=mine != 0)
        at += tl.sum(mine)
    if image == images - 1:
        tl.store(region_first + images, at)
