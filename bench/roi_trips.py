"""How often the loops of roi_gather's Triton kernels run on a workload: trips.py's part about them, in their float32.

Boxes lie inside their images and have a positive extent, as the workloads' do.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from trips import TokenTiles, blocks
from workloads import Regions

AWAY = -1e9
"""Where a sample reads that doesn't count or isn't there."""


@dataclass(frozen=True)
class Axis:
    """All regions along one axis. offset [R, bins], step and samples [R]: the first position and the size of a bin, its
    samples. places [R, bins, most samples]: where they read. first and end [R, bins]: the cells a bin may touch."""

    offset: Tensor
    step: Tensor
    samples: Tensor
    places: Tensor
    first: Tensor
    end: Tensor

    def reads(self, region: Tensor, cell: Tensor) -> Tensor:
        """Whether bins of these regions [N] have a share of these cells [N]: [N, bins]."""
        return ((self.places[region] - cell[:, None, None]).abs() < 1).any(2)

    def touches(self, region: Tensor, first: Tensor, end: Tensor) -> Tensor:
        """Whether a region may touch a cell from `first` to `end`."""
        return (self.first.amin(1)[region] < end) & (first < self.end.amax(1)[region])

    def search(self, region: Tensor, bin: Tensor, cell: Tensor) -> Tensor:
        """Trips of the loops that search for the shares of cells [N, lanes] in bins [lanes], or one for all: up to the
        first sample that touches, up to the last, and over them: [N, 3], each as many as any lane takes."""
        offset, step, samples = self.offset[region[:, None], bin], self.step[region], self.samples[region]

        def position(sample: Tensor) -> Tensor:
            return offset + (sample + 0.5) * step / samples

        def bisect(passes) -> tuple[Tensor, Tensor]:
            low, high, trips = torch.zeros_like(cell), samples.expand(cell.shape).clone(), torch.zeros_like(cell)
            while (open := low < high).any():
                middle = low + (high - low) // 2
                found = passes(position(middle))
                low, high = torch.where(open & ~found, middle + 1, low), torch.where(open & found, middle, high)
                trips += open
            return low, trips

        begin, below = bisect(lambda at: at >= cell - 1.0)
        end, beyond = bisect(lambda at: at > cell + 1.0)
        return torch.stack([below, beyond, (end - begin).clamp(min=0)], -1).amax(1)


def axes(regions: Regions, bins: int, ratio: int) -> tuple[Axis, Axis]:
    """Along y, and along x. ratio: samples a bin, 0 for as many as it is long."""
    x1, y1, x2, y2 = regions.boxes.T
    height, width = regions.layout.grids[regions.image_index].T
    return _axis(y1, y2, height, bins, ratio), _axis(x1, x2, width, bins, ratio)


def _axis(low: Tensor, high: Tensor, size: Tensor, bins: int, ratio: int) -> Axis:
    start = low - 0.5
    step = ((high - 0.5) - start) / bins
    samples = torch.full_like(size, ratio).long() if ratio else step.ceil().long()
    offset = start[:, None] + torch.arange(bins) * step[:, None]
    number = torch.arange(int(samples.max()))
    at = offset[..., None] + ((number + 0.5) * step[:, None] / samples[:, None])[:, None]
    size = size[:, None, None]
    inside = at.clamp(min=0).minimum(size - 1.0)
    counts = (at >= -1) & (at <= size) & (number < samples[:, None, None])
    last = (samples - 1)[:, None, None].expand(-1, bins, 1)
    reads = (at.gather(2, last) >= -1) & (at[..., :1] <= size)
    first, end = inside[..., :1].long(), (inside.gather(2, last).long() + 2).minimum(size)
    return Axis(
        offset, step[:, None], samples[:, None], inside.where(counts, AWAY),
        first.where(reads, size)[..., 0], end.where(reads, 0)[..., 0],
    )  # fmt: skip


def forward(regions: Regions, bins: int, ratio: int) -> dict[str, int]:
    """Over all rows of bins, the samples along x that count: those that lie between columns which are "held", that want
    the "next" one or two "anew"; and "on" each, without a share of the right column. "cells": summed into columns."""
    y, x = axes(regions, bins, ratio)
    counts = Counter()
    columns = torch.zeros(len(regions.boxes), dtype=torch.int64)
    here = torch.full_like(columns, -2)
    for place in x.places.flatten(1).T:
        counted, column = place >= 0, place.long()
        kinds = {"held": column == here, "next": column == here + 1}
        kinds["anew"] = ~(kinds["held"] | kinds["next"])
        for kind, those in kinds.items():
            for name, side in ((kind, place > column), (f"{kind}, on", place == column)):
                counts[name] += bins * int((those & counted & side).sum())
        columns += (kinds["next"].long() + 2 * kinds["anew"]) * counted
        here = column.where(counted, here)
    every = torch.arange(len(columns))
    for cell in range(int(y.end.max())):
        counts["cells"] += int((columns[:, None] * y.reads(every, every * 0 + cell)).sum())
    return dict(counts)


def forward_any_ratio(regions: Regions, bins: int, ratio: int, lanes: int) -> dict[str, int | Tensor]:
    """Over all rows of bins: blocks of `lanes` columns of cells, and of rows for each; searches for rows' shares; trips
    of the searches' three loops, "row trips" and "column trips"; columns, each in a block of rows, and cells."""
    y, x = axes(regions, bins, ratio)
    counts: Counter = Counter()
    row_trips, column_trips = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    every, lane = torch.arange(len(regions.boxes)), torch.arange(lanes)
    high, wide = (y.end - y.first).clamp(min=0), (x.end - x.first).clamp(min=0)
    row_blocks, column_blocks = blocks(high, lanes), blocks(wide, lanes)
    # A row of bins whose rows are one block searches once, others for every block of columns anew.
    met = column_blocks.sum(1, keepdim=True)
    times = torch.where(row_blocks == 1, met.clamp(max=1), met)
    for axis, number, uses, trips in ((y, row_blocks, times, row_trips), (x, column_blocks, bins, column_trips)):
        for bin in range(bins):
            for block in range(int(number.max())):
                cell = axis.first[:, bin, None] + block * lanes + lane
                steps = axis.search(every, torch.tensor([bin]), cell)
                used = (uses[:, bin] if axis is y else uses) * (number[:, bin] > block)
                trips += (steps * used[:, None]).sum(0)
    counts["columns of cells"] = int((row_blocks[:, :, None] * wide[:, None]).sum())
    counts["cells"] = int((high[:, :, None] * wide[:, None]).sum())
    counts["row blocks"] = int((row_blocks[:, :, None] * column_blocks[:, None]).sum())
    counts["column blocks"] = bins * int(column_blocks.sum())
    counts["row searches"] = int((row_blocks * times).sum())
    return {**counts, "row trips": row_trips, "column trips": column_trips}


def backward(regions: Regions, tile: int, bins: int, ratio: int, lanes: int) -> dict[str, int | Tensor]:
    """Over all tiles: their rows; groups of `lanes` regions that are looked at, those "idle" where none touches; the
    regions that touch, those of them without a row of bins; and the others' columns of bins, and bins. Where the ratio
    is 0, the trips of the searches' three loops, too: "row trips" and "column trips". As the kernel tells all that."""
    y_axis, x_axis = axes(regions, bins, ratio)
    tiles = TokenTiles(regions, tile)
    high = tiles.bottom - tiles.top + 1
    row_tile = torch.arange(len(tiles)).repeat_interleave(high)
    y = tiles.top[row_tile] + torch.arange(len(row_tile)) - (high.cumsum(0) - high)[row_tile]
    x = tiles.low[row_tile] - y * regions.layout.grids[tiles.image[row_tile], 1]
    end = x + (tiles.high - tiles.low + 1)[row_tile]
    groups = blocks(regions.boxes_an_image, lanes)
    touched = torch.zeros(len(y), groups, dtype=torch.bool)
    counts = Counter({"tile rows": len(y), "groups": len(y) * groups})
    trips = {name: torch.zeros(3, dtype=torch.int64) for name in ("row trips", "column trips")}
    lane = torch.arange(bins)
    for n, region in enumerate(tiles.regions(regions)):
        region = region[row_tile]
        touches = y_axis.touches(region, y, y + 1) & x_axis.touches(region, x, end)
        touched[:, n // lanes] |= touches
        region, row, left = region[touches], y[touches], x[touches]
        reads = torch.stack([x_axis.reads(region, left + token) for token in range(tile)]).any(0)
        height, width = _extent(y_axis.reads(region, row)), _extent(reads)
        counts["touch"] += len(region)
        counts["rowless"] += int((height == 0).sum())
        counts["columns"] += int(width[height > 0].sum())
        counts["bins"] += int((height * width).sum())
        if ratio == 0 and len(region):
            trips["row trips"] += y_axis.search(region, lane, row[:, None].expand(-1, bins)).sum(0)
            those, first = region[height > 0], left[height > 0]
            cell = first[:, None] + torch.arange(tile).repeat(bins)
            trips["column trips"] += x_axis.search(those, lane.repeat_interleave(tile), cell).sum(0)
    return {**counts, "idle": int((~touched).sum()), **trips}


def _extent(bins: Tensor) -> Tensor:
    """From the first to the last that is true of [N, bins], 0 where none is."""
    number = torch.arange(bins.shape[1])
    first, last = number.where(bins, bins.shape[1]).amin(1), number.where(bins, -1).amax(1)
    return (last - first + 1).clamp(min=0)
