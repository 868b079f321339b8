"""python bench/figures.py: draws docs/figures/OPERATOR.svg: what a program of an operator's kernels reads and writes.

What one program reads is blue, what it writes orange. Cells, samples and packs are worked out, not drawn by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from granvit_kernels import PackedLayout, plan_packing
from granvit_kernels.regions import covered_cells

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "figures"
READ, WRITTEN, OTHER, LINE, INK = "#8ab6e6", "#f2a65a", "#eeeeee", "#9a9a9a", "#222222"
IMAGES = ("#cfe3c8", "#e3d3ea", "#f6e3b4")
"""Of the tokens of one image each."""
SIZE = 9
"""Points of the text."""


# ---- what all draw with ----
def grid(axes: Axes, x: float, y: float, rows: int, columns: int, fill: Callable[[int, int], str | None]) -> None:
    """Unit squares; fill(row, column): their colour, None for OTHER."""
    for row in range(rows):
        for column in range(columns):
            colour = fill(row, column) or OTHER
            square(axes, x + column, y + row, 1, 1, colour)


def square(axes: Axes, x: float, y: float, width: float, height: float, colour: str, **style: object) -> None:
    axes.add_patch(Rectangle((x, y), width, height, **{"facecolor": colour, "edgecolor": LINE, "lw": 0.6, **style}))


def outline(axes: Axes, x1: float, y1: float, x2: float, y2: float, **style: object) -> None:
    square(axes, x1, y1, x2 - x1, y2 - y1, "none", **{"edgecolor": INK, "lw": 1.6, **style})


def write(axes: Axes, x: float, y: float, text: str, **style: object) -> None:
    axes.text(x, y, text, **{"size": SIZE, "color": INK, "va": "center", "ha": "left", **style})


def caption(axes: Axes, y: float, *lines: str) -> None:
    write(axes, 0, y, "\n".join(lines))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=INK, lw=1.2))


def panel(axes: Axes, title: str, width: float, height: float) -> None:
    """Room for width x height squares, y down."""
    axes.set_xlim(-0.3, width)
    axes.set_ylim(height, -0.3)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(title, size=SIZE + 1, loc="left", color=INK)


# ---- the operators ----
def packed_layout(figure: Figure) -> None:
    axes = figure.subplots()
    panel(axes, "PackedLayout.from_grids([(3, 4), (2, 3), (2, 2)])", 26, 7.6)
    grids = [(3, 4), (2, 3), (2, 2)]
    layout = PackedLayout.from_grids(grids)
    starts = layout.cu_seqlens.tolist()
    x = 0.0
    for (rows, columns), colour, start in zip(grids, IMAGES, starts, strict=False):
        grid(axes, x, 0, rows, columns, lambda row, column, colour=colour: colour)
        for token in range(rows * columns):
            write(axes, x + token % columns + 0.5, token // columns + 0.5, str(start + token), ha="center", size=8)
        x += columns + 2
    write(axes, x, 1, "each image's patches, row by row:\na token's number is its row in [T, C]")
    for token, image in enumerate(layout.image_ids().tolist()):
        square(axes, token, 4.6, 1, 1, IMAGES[image])
        write(axes, token + 0.5, 5.1, str(token), ha="center", size=8)
    write(axes, layout.num_tokens + 0.4, 5.1, "packed [T, C]")
    for start in starts:
        arrow(axes, (start, 7.0), (start, 5.7))
        write(axes, start, 7.3, str(start), ha="center")
    write(axes, layout.num_tokens + 0.4, 7.3, "cu_seqlens")


def samples(low: float, high: float, bins: int) -> list[list[float]]:
    """Two of each bin, in cell centres' coordinates, as roi_gather has them with sampling_ratio=2."""
    step = (high - low) / bins
    return [[low + (place + (half + 0.5) / 2) * step - 0.5 for half in (0, 1)] for place in range(bins)]


def touched(places: Iterable[float], size: int) -> set[int]:
    """The cells that samples are linear between."""
    clamped = [min(max(place, 0.0), size - 1.0) for place in places]
    return {min(int(place) + more, size - 1) for place in clamped for more in (0, 1)}


def roi_gather(figure: Figure) -> None:
    forward, backward = figure.subplots(1, 2)
    rows, columns, bins, x1, y1, x2, y2 = 8, 11, 3, 1.3, 0.9, 9.4, 7.2
    down, across = samples(y1, y2, bins), samples(x1, x2, bins)
    flat = [place for pair in across for place in pair]

    def bin_lines(axes: Axes) -> None:
        outline(axes, x1, y1, x2, y2)
        for place in range(1, bins):
            x, y = x1 + place * (x2 - x1) / bins, y1 + place * (y2 - y1) / bins
            axes.plot([x, x], [y1, y2], color=INK, lw=0.8)
            axes.plot([x1, x2], [y, y], color=INK, lw=0.8)

    panel(forward, "forward: a program is a row of a box's bins", 18, 10)
    read_rows, read_columns = touched(down[1], rows), touched(flat, columns)
    grid(forward, 0, 0, rows, columns, lambda r, c: READ if r in read_rows and c in read_columns else None)
    bin_lines(forward)
    for y in down[1]:
        forward.plot([x + 0.5 for x in flat], [y + 0.5] * len(flat), ".", color=INK, ms=4)
    grid(forward, 13.5, 2.5, bins, bins, lambda r, c: WRITTEN if r == 1 else None)
    arrow(forward, (11.2, 4), (13.3, 4))
    write(forward, 15, 6.2, "output\n[R, 3, 3, C]", ha="center", va="top")
    caption(
        forward, 9,
        "The cells of a column are summed by their rows' shares once;",
        "bins take that sum by the column's share.",
    )  # fmt: skip

    panel(backward, "backward: a program is a tile of tokens", 18, 10)
    tile_row, tile = 5, range(3, 9)
    grid(backward, 0, 0, rows, columns, lambda r, c: WRITTEN if r == tile_row and c in tile else None)
    bin_lines(backward)
    hits_row = [tile_row in touched(pair, rows) for pair in down]
    hits_column = [bool(touched(pair, columns) & set(tile)) for pair in across]
    grid(backward, 13.5, 2.5, bins, bins, lambda r, c: READ if hits_row[r] and hits_column[c] else None)
    arrow(backward, (13.3, 4), (11.2, 4))
    write(backward, 15, 6.2, "gradient\n[R, 3, 3, C]", ha="center", va="top")
    caption(
        backward, 9,
        "Of every box of the image in turn: the bins whose samples touch",
        "the tile. One order of sums, no atomics.",
    )  # fmt: skip


def box_and_tile(figure: Figure, forward_title: str, backward_title: str) -> tuple[Axes, Axes]:
    """The cells under a box, shaded by the share that it covers, and a tile of tokens with the boxes that meet it."""
    forward, backward = figure.subplots(1, 2)
    rows, columns, box = 7, 9, (1.88, 0.15, 6.15, 4.85)
    row0, row1, column0, column1 = covered_cells(list(box), rows, columns)
    panel(forward, forward_title, 18, 9.4)
    grid(
        forward, 0, 0, rows, columns,
        lambda r, c: READ if row0 <= r < row1 and column0 <= c < column1 else None,
    )  # fmt: skip
    outline(forward, *box)
    for row in range(row0, row1):
        for column in range(column0, column1):
            across = min(box[2], column + 1) - max(box[0], column)
            down = min(box[3], row + 1) - max(box[1], row)
            if across * down < 0.999:
                text = f".{round(100 * across * down):02}"
                write(forward, column + 0.5, row + 0.5, text, ha="center", size=7)

    panel(backward, backward_title, 18, 9.4)
    grid(backward, 0, 0, rows, columns, lambda r, c: WRITTEN if 25 <= r * columns + c < 33 else None)
    for met, other in ((box, True), ((4.5, 3.2, 8.3, 6.4), True), ((0.3, 4.4, 1.1, 6.8), False)):
        outline(backward, *met, linestyle="-" if other else ":", edgecolor="#2f6db3" if other else LINE)
    return forward, backward


def region_attention(figure: Figure) -> None:
    forward, backward = box_and_tile(
        figure, "forward: a program is a region and a head",
        "backward: a program is a tile of tokens and a head",
    )  # fmt: skip
    arrow(forward, (9.2, 3), (11.3, 3))
    grid(forward, 11.5, 2, 2, 4, lambda r, c: WRITTEN)
    write(forward, 11.5, 4.6, "K queries' outputs\n[K, H, D] and lse", va="top")
    caption(
        forward, 8.3,
        "It reads key and value of the cells under the box, block by block.",
        "Numbers: the share covered, which coverage=True weighs by.",
    )  # fmt: skip
    arrow(backward, (11.3, 3), (9.2, 3))
    write(backward, 11.5, 3, "query, output's\ngradient and lse\nof each box that\nmeets the tile")
    caption(
        backward, 8.3,
        "A tile's programs write the gradients of its keys and values, boxes in",
        "their order. A query's gradient is a walk over its box, as forward.",
    )  # fmt: skip


def region_pool(figure: Figure) -> None:
    forward, backward = box_and_tile(
        figure, "forward: a program is a region (some of its channels)", "backward: a program is a tile of tokens"
    )
    arrow(forward, (9.2, 3), (10.4, 3))
    grid(forward, 10.6, 0.5, 2, 3, lambda r, c: READ)
    write(forward, 13.9, 1.5, "weights\n[K·H, cells]")
    grid(forward, 10.6, 3, 3, 3, lambda r, c: READ)
    write(forward, 13.9, 4.5, "values as they are\n[cells, D]")
    grid(forward, 10.6, 6.5, 2, 3, lambda r, c: WRITTEN)
    write(forward, 13.9, 7.5, "product\n[K·H, D]")
    caption(
        forward, 8.3,
        "Logits are given: no key, and no",
        "projected value, of any token is made.",
    )  # fmt: skip
    arrow(backward, (11.3, 3), (9.2, 3))
    write(backward, 11.5, 3, "output's gradient,\nweights' sum of\neach box that\nmeets the tile")
    caption(
        backward, 8.3,
        "It writes the gradients of the tile's logits and values, boxes in their",
        "order: one order of sums, no atomics.",
    )  # fmt: skip


def pack_patches(figure: Figure) -> None:
    axes = figure.subplots()
    panel(axes, "a program is a strip of a crop that is resampled, or a few patches of one that is not", 34, 12)
    square(axes, 0, 0, 14, 10, OTHER)
    crop, grid_size = (1.5, 1.2, 12.6, 8.9), (3, 4)
    width, height = (crop[2] - crop[0]) / grid_size[1], (crop[3] - crop[1]) / grid_size[0]
    left = crop[0] + width
    square(axes, left - 0.6, crop[1], 2 * width + 1.2, crop[3] - crop[1], READ)
    for column in range(grid_size[1] + 1):
        axes.plot([crop[0] + column * width] * 2, [crop[1], crop[3]], color=INK, lw=0.6)
    for row in range(grid_size[0] + 1):
        axes.plot([crop[0], crop[2]], [crop[1] + row * height] * 2, color=INK, lw=0.6)
    outline(axes, *crop)
    caption(
        axes, 11,
        "uint8 [H, W, 3]: the source pixels under the strip, and as",
        "far to its sides as resampling reads, from the top down",
    )  # fmt: skip
    arrow(axes, (14.4, 5), (17.2, 5))
    for token in range(grid_size[0] * grid_size[1]):
        mine = token % grid_size[1] in (1, 2)
        square(axes, 18 + token, 4.5, 1, 1, WRITTEN if mine else OTHER)
        write(axes, 18.5 + token, 5, str(token), ha="center", size=8)
    square(axes, 30, 4.5, 3, 1, OTHER)
    write(axes, 31.5, 5, "next crop", ha="center", size=8)
    write(axes, 18, 6.6, "packed [T, p·p·3], resized, normalised, in the order of patches")


def plan(figure: Figure) -> None:
    axes = figure.subplots()
    generator = torch.Generator().manual_seed(3)
    lengths, capacity = torch.randint(2, 10, (14,), generator=generator).tolist(), 16
    panel(axes, f"plan_packing(lengths, capacity={capacity})", 34, 9.4)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    packs = plan_packing(lengths, capacity)
    for place, index in enumerate(order):
        square(axes, 0.8 * place, 8 - 0.75 * lengths[index], 0.7, 0.75 * lengths[index], READ)
        write(axes, 0.8 * place + 0.35, 8.4, str(lengths[index]), ha="center", size=8)
    write(axes, 0, 9.1, "from the longest to the shortest", va="bottom", size=8)
    arrow(axes, (12.2, 5), (14.4, 5))
    for row, pack in enumerate(packs):
        x, y = 15.0, 1 + 1.2 * row
        for index in pack:
            square(axes, x, y, lengths[index], 0.9, WRITTEN)
            write(axes, x + lengths[index] / 2, y + 0.45, str(lengths[index]), ha="center", size=8)
            x += lengths[index]
        square(axes, x, y, 15 + capacity - x, 0.9, OTHER)
    write(axes, 15, 1 + 1.2 * len(packs) + 0.4, "each into the pack with the least room that still holds it", va="top")


FIGURES: dict[str, tuple[Callable[[Figure], None], float]] = {
    "PackedLayout": (packed_layout, 2.9),
    "roi_gather": (roi_gather, 3.3),
    "region_attention": (region_attention, 3.1),
    "region_pool": (region_pool, 3.1),
    "pack_patches": (pack_patches, 3.6),
    "plan_packing": (plan, 2.9),
}
"""{operator: (what draws it, height in inches)}."""


def draw(folder: Path, kind: str = "svg") -> None:
    """Every figure into a folder; equal versions of matplotlib give equal files."""
    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "granvit", "font.family": "sans-serif"})
    folder.mkdir(parents=True, exist_ok=True)
    for name, (make, height) in FIGURES.items():
        figure = Figure(figsize=(10, height), layout="constrained", facecolor="white")
        make(figure)
        metadata = {"Date": None, "Creator": None} if kind == "svg" else None
        figure.savefig(folder / f"{name}.{kind}", metadata=metadata)


if __name__ == "__main__":
    draw(FOLDER)
