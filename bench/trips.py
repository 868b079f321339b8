"""How often the loops of the GPU kernels run on a workload: counted from its boxes and images, as the launchers share
the work out among programs and the kernels among their loops. floors.py multiplies with what a loop issues.

tests/kernels/test_floors.py holds the Triton kernels' counts to what Triton's interpreter runs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from workloads import PATCH, Regions, cell_shares

CSRC = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
WARP = 32


def met_tokens(regions: Regions) -> int:
    """Tokens whose cells a box of their image meets."""
    boxes = regions.boxes.unflatten(0, (-1, regions.boxes_an_image))
    grids = zip(regions.grids, boxes, strict=True)
    return sum(int((cell_shares(those, height, width) > 0).any(0).sum()) for (height, width), those in grids)


def blocks(items: int | Tensor, size: int) -> int | Tensor:
    return -(-items // size)


# ---- a program a tile of tokens, which visits its image's regions (granvit_kernels/tiles.py) ----


class TokenTiles:
    """All images' tiles of `size` tokens: their image, first and last cell, and the cells' bounds, int64 [N]."""

    def __init__(self, regions: Regions, size: int) -> None:
        height, width = regions.layout.grids.long().T
        count = blocks(height * width, size)
        self.image = torch.arange(len(count)).repeat_interleave(count)
        before = count.cumsum(0) - count
        self.low = (torch.arange(len(self.image)) - before[self.image]) * size
        self.high = (self.low + size).minimum((height * width)[self.image]) - 1
        width = width[self.image]
        self.top, self.bottom = self.low // width, self.high // width
        self.left = torch.where(self.top == self.bottom, self.low % width, 0)
        self.right = torch.where(self.top == self.bottom, self.high % width, width - 1)

    def __len__(self) -> int:
        return len(self.image)

    def regions(self, regions: Regions) -> Iterator[Tensor]:
        """The number of each tile's image's first region [N], of its second, and so on: all images have as many."""
        for n in range(regions.boxes_an_image):
            yield self.image * regions.boxes_an_image + n


def tile_tokens(regions: Regions, size: int, block: int) -> list[int]:
    """Of the four loops: images before, tiles written, regions counted and regions written, `block` at a time."""
    count = TokenTiles(regions, size).image.bincount(minlength=len(regions.grids))
    written = count.clone()
    written[-1] += blocks(regions.layout.num_tokens, size) + len(count) - count.sum()  # to the end of the list
    images = torch.arange(len(count))
    all_regions = len(count) * blocks(len(regions.boxes), block)
    return [int(blocks(images, block).sum()), int(blocks(written, block).sum()), all_regions, all_regions]


# ---- region_attention and region_pool ----


def walked_blocks(regions: Regions, block: int) -> int:
    """Blocks of `block` cells that the walks of all regions' boxes take, for each head and block of queries. Splits of
    a walk take whole blocks: they don't change it."""
    return int(blocks(regions.met(), block).sum())


def attention_tokens(regions: Regions, tile: int, queries: int, block: int) -> dict[str, int]:
    """Over all tiles, for each head: blocks of `block` columns (queries of regions) that go by, and those of them that
    are computed, as one of their regions meets the tile."""
    columns = _meets(regions, TokenTiles(regions, tile)).repeat_interleave(queries, 1)
    columns = torch.nn.functional.pad(columns, (0, -columns.shape[1] % block)).unflatten(1, (-1, block))
    return {"blocks": columns.shape[0] * columns.shape[1], "computed": int(columns.any(2).sum())}


def pool_tokens(regions: Regions, tile: int, lanes: int) -> dict[str, int]:
    """Over all tiles: times that a tile looks at `lanes` regions of its image, and pairs of a tile and a region that
    meet."""
    meets = _meets(regions, TokenTiles(regions, tile))
    return {"looks": len(meets) * blocks(meets.shape[1], lanes), "met": int(meets.sum())}


def _meets(regions: Regions, tiles: TokenTiles) -> Tensor:
    """Which of its image's regions meet the rectangle around each tile, [tiles, boxes an image]."""
    x1, y1, x2, y2 = regions.boxes.T
    column0, row0, column1, row1 = x1.floor(), y1.floor(), x2.ceil(), y2.ceil()  # boxes lie inside their images
    return torch.stack(
        [
            (row0[n] <= tiles.bottom) & (row1[n] > tiles.top) & (column0[n] <= tiles.right) & (column1[n] > tiles.left)
            for n in tiles.regions(regions)
        ],
        1,
    )


# ---- pack_patches, in warps' trips: a block's threads share a loop's items out ----


@cache
def constants() -> dict[str, int]:
    """The numbers that csrc/cuda names: COPY_PIXELS, TILE_ROWS and so on; MOST (crops of a launch) as of CUDA 12.1."""
    text = "".join(path.read_text() for path in sorted(CSRC.glob("pack_patches.cu")) + sorted(CSRC.glob("*.h")))
    lines = re.findall(r"^constexpr int(?:64_t)? ([^;]+);", text, re.MULTILINE)
    return {name: int(value) for line in reversed(lines) for name, value in re.findall(r"(\w+) = (\d+)", line)}


def searched(tiles: list[int]) -> int:
    """Steps of all blocks' searches for their crops. tiles: blocks of each crop."""
    most = constants()["MOST"]
    launches = [tiles[i : i + most] for i in range(0, len(tiles), most)]
    return sum(sum(launch) * int(math.log2(len(launch))) for launch in launches)


def copied(grids: list[tuple[int, int]], values: int) -> dict[str, int]:
    """Blocks of threads, steps of their searches, and trips through their three loops: source rows in, values made,
    values out. values: of 16 bytes. Rows start at multiples of 16 bytes, as images of whole patches of 16 have them."""
    patches = constants()["COPY_PIXELS"] // PATCH**2
    tiles = [height * blocks(width, patches) for height, width in grids]
    counts = Counter(blocks=sum(tiles), searched=searched(tiles))
    kinds = Counter()  # blocks by patches
    for height, width in grids:
        kinds[patches] += height * (width // patches)
        kinds[width % patches] += height if width % patches else 0
    for side, count in kinds.items():
        row = 3 * PATCH * side  # bytes, and values
        items = {
            "rows": PATCH * ((15 + row + 4 + 15) // 16),
            "values": PATCH * side * PATCH // 4,
            "slots": (row * PATCH + 2 * values - 2) // values,
        }
        counts.update({name: count * blocks(number, WARP) for name, number in items.items()})
    return dict(counts)


def resampled(sizes: list[tuple[int, int]], grids: list[tuple[int, int]], values: int) -> dict[str, Any]:
    """Strips, bands and chunks of source rows that blocks make, steps of their searches, and trips through the loops:
    16 bytes in, source rows ("walked", by whether the crop shrinks or grows downwards and by groups of four pixels),
    output rows ("shrunk", "grown"), runs' places, values out; and of the weights' kernel {(axis, taps): outputs}.

    sizes: of the images in pixels; all are resampled, bilinear. values: of 16 bytes. The arithmetic is
    csrc/common/resample.h's and csrc/cuda/pack_strip.h's.
    """
    named = constants()
    across, lines = named["TILE_COLUMNS"] // PATCH, named["TILE_ROWS"] // PATCH
    columns = across * PATCH
    shapes = list(zip(sizes, grids, strict=True))
    bands = sum(blocks(h, lines) * blocks(w, across) for _, (h, w) in shapes)
    bands_a_strip = min(max(bands // named["ENOUGH_BLOCKS"], 1), named["MOST_BANDS"])
    counts = Counter(bands=bands, runs=bands * blocks(lines * across, WARP))
    strips, weights, walked = [], Counter(), Counter()
    for (source_height, source_width), (height, width) in shapes:
        out_height, out_width = height * PATCH, width * PATCH
        rows, grows = bands_a_strip * lines * PATCH, out_height > source_height
        groups = blocks(_taps(source_width, out_width), 4)
        tops = range(0, out_height, rows)
        strips.append(len(tops) * blocks(width, across))
        for axis, source, outputs in (("row", source_height, out_height), ("column", source_width, out_width)):
            weights[axis, _taps(source, outputs)] += blocks(outputs, WARP)
        for left in range(0, out_width, columns):
            wide = min(columns, out_width - left)
            begin = _first_tap(source_width, out_width, left)
            read = 3 * (_first_tap(source_width, out_width, left + wide - 1) + _taps(source_width, out_width) - begin)
            pitch = (15 + read + 4 + 15) // 16 * 16
            warps = blocks(wide, WARP)
            for top in tops:
                done = _first_tap(source_height, out_height, top)
                for band in range(top, min(top + rows, out_height), lines * PATCH):
                    high = min(lines * PATCH, out_height - band)
                    last = _last_tap(source_height, out_height, band + high - 1)
                    while done <= last:
                        taken = min(last + 1 - done, named["RAW_BYTES"] // pitch)
                        counts["chunks"] += 1
                        counts["loads"] += blocks(taken * (pitch // 16), WARP)
                        walked["grow" if grows else "shrink", groups] += taken * warps
                        done += taken
                    counts["grown" if grows else "shrunk"] += high * warps
                    slots = (3 * PATCH**2 + 2 * values - 2) // values
                    counts["slots"] += blocks(high // PATCH * (wide // PATCH) * slots, WARP)
    counts["strips"], counts["searched"] = sum(strips), searched(strips)
    return {**counts, "weights": weights, "walked": walked}


def _taps(source: int, outputs: int) -> int:
    return min(math.ceil(2 * max(source / outputs, 1.0)), source)


def _first_tap(source: int, outputs: int, i: int) -> int:
    step = source / outputs
    first = math.floor((i + 0.5) * step - max(step, 1.0) - 0.5) + 1
    return min(max(first, 0), source - _taps(source, outputs))


def _last_tap(source: int, outputs: int, i: int) -> int:
    step = source / outputs
    return min(math.ceil((i + 0.5) * step + max(step, 1.0) - 0.5) - 1, source - 1)
