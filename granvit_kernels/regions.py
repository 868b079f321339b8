"""Which cells a box meets, and how much of each it covers, in plain PyTorch: what the region operators' references
share."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def covered_cells(box: list[float], height: int, width: int) -> tuple[int, int, int, int]:
    """Cells (row0, row1, column0, column1), ends excluded, that a box x1 y1 x2 y2 meets with positive area.

    Cell (y, x) is the square [x, x+1] x [y, y+1]. A box without area, or that is not finite, meets nothing.
    """
    x1, y1, x2, y2 = box
    if not (all(map(math.isfinite, box)) and x1 < x2 and y1 < y2 and x1 < width and y1 < height and x2 > 0 and y2 > 0):
        return 0, 0, 0, 0
    # Clip before rounding: a box may be far larger than any integer type.
    return int(max(y1, 0.0)), -int(-min(y2, height) // 1), int(max(x1, 0.0)), -int(-min(x2, width) // 1)


def log_share(low: Tensor, high: Tensor, first: int, last: int) -> Tensor:
    """Log of the share of each cell [i, i+1], first <= i < last, that [low, high] covers: [last - first].

    low and high are float32 scalars; so is the share. Logs of the two axes are added, not the shares
    multiplied: the product of two tiny shares would be 0.
    """
    cell = torch.arange(first, last, device=low.device, dtype=torch.float32)
    return (torch.minimum(high, cell + 1) - torch.maximum(low, cell)).log()


def met_tokens(
    grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor, coverage: bool, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor, Tensor | float]]:
    """(region, token indices int64 [n], log coverage `dtype` [n], or 0.0 without) of every region that meets a cell.

    A region whose index names no image meets nothing.
    """
    sizes, starts = grids.tolist(), cu_seqlens.tolist()
    for region, (box, image) in enumerate(zip(boxes.tolist(), image_index.tolist(), strict=True)):
        if not 0 <= image < len(sizes):
            continue
        height, width = sizes[image]
        row0, row1, column0, column1 = covered_cells(box, height, width)
        if row0 == row1:
            continue
        rows = torch.arange(row0, row1, device=boxes.device)
        columns = torch.arange(column0, column1, device=boxes.device)
        tokens = (starts[image] + rows[:, None] * width + columns).flatten()
        bias: Tensor | float = 0.0
        if coverage:
            x1, y1, x2, y2 = boxes[region].unbind()
            bias = log_share(y1, y2, row0, row1)[:, None] + log_share(x1, x2, column0, column1)
            bias = bias.flatten().to(dtype)
        yield region, tokens, bias


def wide(tensor: Tensor) -> Tensor:
    """In the type that references calculate in: float64 for float64, else float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
