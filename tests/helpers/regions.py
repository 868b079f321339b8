"""Boxes of every kind, and which cells they meet by definition: for the tests of the operators on regions."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from granvit_kernels import PackedLayout

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERY_KIND = [
    [0.5, 0.5, 2.2, 2.0],  # parts of cells
    [-5.0, -1e30, 1e30, 9.0],  # far larger than its image
    [1.0, 1.0, 2.0, 2.0],  # exactly one cell
    [1.25, 0.5, 1.5, 0.75],  # inside one cell
    [0.0, 0.0, 3.0, 2.0],  # overlaps the first
    [2.0, 2.0, 1.0, 1.0],  # inverted
    [1.0, 0.0, 1.0, 3.0],  # no width
    [-3.0, -3.0, 0.0, 0.0],  # touches the image's corner from outside
    [50.0, 50.0, 60.0, 60.0],  # outside
]
MEETS_NOTHING = slice(5, 9)


def overlaps(layout: PackedLayout, boxes: Tensor, image_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three of [R, T]: how far each box overlaps each token's cell down and across, and whether it is of its image."""
    (y, x), (x1, y1, x2, y2) = layout.positions().to(boxes.dtype).T, boxes.T[:, :, None]
    down = torch.minimum(y2, y + 1) - torch.maximum(y1, y)
    across = torch.minimum(x2, x + 1) - torch.maximum(x1, x)
    return down, across, layout.image_ids() == image_index[:, None]


def meets(layout: PackedLayout, boxes: Tensor, image_index: Tensor) -> Tensor:
    """[R, T]: which tokens' cells each box meets with positive area, by its definition."""
    down, across, own = overlaps(layout, boxes, image_index)
    return (down > 0) & (across > 0) & own


def shares(layout: PackedLayout, boxes: Tensor, image_index: Tensor) -> Tensor:
    """float64 [R, T]: which share of a token's cell each box covers."""
    down, across, own = overlaps(layout, boxes.double(), image_index)
    return down.clamp(min=0) * across.clamp(min=0) * own


@st.composite
def drawn_regions(draw) -> tuple[list, list, list]:
    """(grids, boxes, image_index) of up to four images, and of boxes anywhere, mostly with an area."""
    images = draw(st.integers(0, 4))
    grids = [(draw(st.integers(1, 20)), draw(st.integers(1, 20))) for _ in range(images)]
    coordinate = st.one_of(
        st.floats(-3, 24, width=32),
        st.integers(-1, 21).map(float),
        st.sampled_from([0.0, -0.0, 1e-38, -1e38, 1e38, 1e-45]),
    )
    regions = draw(st.integers(0, 6)) if images else 0
    boxes = [[draw(coordinate) for _ in range(4)] for _ in range(regions)]
    if draw(st.booleans()):
        boxes = [[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in boxes]
    return grids, boxes, [draw(st.integers(0, images - 1)) for _ in boxes]


def redrawn(problem: NamedTuple, *names: str, times: int = 8) -> list[NamedTuple]:
    """The problem, with new random numbers in its tensors of these names each time.

    Of a handful of numbers plain PyTorch's may be right by luck, in sums that nearly cancel too: of many, they are not.
    """
    generator = torch.Generator().manual_seed(7)

    def again(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    return [problem._replace(**{name: again(getattr(problem, name)) for name in names}) for _ in range(times)]


def check_error_rule(name: str, ours: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype, lse: Tensor) -> None:
    """Error at most twice that of plain PyTorch, plus eps(dtype) of the largest exact value, plus what rounding `lse`
    (float64's) to float32 costs the weights that are made of it."""
    assert ours.dtype == plain.dtype and ours.shape == plain.shape, name
    assert torch.equal(ours == -torch.inf, exact == -torch.inf), name
    ours, plain, exact = (t.double().nan_to_num(neginf=0.0) for t in (ours, plain, exact))
    if exact.numel():
        largest = max((abs(x) for x in lse.flatten().tolist() if math.isfinite(x)), default=0.0)
        share = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * largest
        allowed = 2 * (plain - exact).abs().max() + share * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed, name


def check_gpu_kernel(draw: Callable[[int], tuple[Sequence[Tensor], ...]], dtype: torch.dtype) -> Sequence[Tensor]:
    """Error at most twice plain PyTorch's, and one eps of the largest exact value (design.md). draw(seed) gives (ours,
    plain PyTorch's, float64's): output, lse, then gradients. Returns ours of the first draw.

    In float32 the gradients may have twice as much, since the interpreter multiplies matrices by numpy, which adds up
    in another order than plain PyTorch, and in another one in backward than in forward. A draw that breaks the rule is
    held to it together with seven more: of a handful of numbers plain PyTorch's may be right by luck.
    """

    def drawn(seed: int) -> tuple[Sequence[Tensor], ...]:
        results = draw(seed)
        for ours, _, exact in zip(*results, strict=True):
            assert ours.shape == exact.shape and torch.equal(ours == -torch.inf, exact == -torch.inf)
            assert torch.equal(ours.isfinite(), exact.isfinite())
        return results

    first = drawn(0)
    if not _keeps_the_rule([first], dtype):
        assert _keeps_the_rule([first, *map(drawn, range(1, 8))], dtype)
    return first[0]


def _keeps_the_rule(draws: list[tuple[Sequence[Tensor], ...]], dtype: torch.dtype) -> bool:
    for n in range(len(draws[0][0])):
        rounding = torch.finfo(draws[0][0][n].dtype).eps
        ours, plain, exact = (
            torch.stack([drawn[way][n].double().nan_to_num(neginf=0.0) for drawn in draws]) for way in range(3)
        )
        if exact.numel():
            allowed = (plain - exact).abs().max() + rounding / 2 * exact.abs().max()
            times = 4 if dtype == torch.float32 and n >= 2 else 2
            if (ours - exact).abs().max() > times * allowed:
                return False
    return True


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Equal, bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
