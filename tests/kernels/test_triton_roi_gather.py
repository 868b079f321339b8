"""roi_gather's Triton kernels in Triton's interpreter, against the reference. What the compiler makes of them:
test_aot.py; on a GPU: test_gpu.py."""

import os

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import deterministic

from granvit_kernels import PackedLayout
from granvit_kernels.ops.roi_gather import reference, triton_launch

pytest.importorskip("triton")
from sanitizer import sanitized  # noqa: E402

interpreter.mend()
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not set"),
    # huge boxes: the interpreter's numpy tells of what they overflow
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]

BOXES = [
    [0.5, 0.5, 3.2, 2.0],
    [-1e9, -3e38, 1e9, 3e38],  # the distance of its ends overflows
    [-1e9, -7.0, 1e9, 3e4],
    [4.0, 5.0, 2.0, 3.0],  # inverted
    [2.0, 1.0, 2.0, 3.0],  # no width
    [1.25, 0.5, 1.5, 0.75],  # inside a cell
    [-3.0, -3.0, 0.4, 0.3],
    [50.0, 50.0, 60.0, 60.0],
    [-1.0, 0.0, 9.0, 6.0],
]
UNREADABLE = [[0.0, 0.0, float("nan"), 2.0], [0.0, float("-inf"), 2.0, 2.0]]


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory holds NaN, so that what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]


def both_ways(backend, tokens, grad, place, size, ratio):
    return backend.forward(tokens, *place, *size, ratio), backend.backward(grad, *place, len(tokens), ratio)


def check(layout, boxes, image_index, channels, size, ratio, dtype):
    """Error at most twice plain PyTorch's, and one eps of the largest value (design.md)."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    place = layout.grids, layout.cu_seqlens, boxes, torch.tensor(image_index, dtype=torch.int64)
    tokens = torch.randn(layout.num_tokens, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    grad = torch.randn(len(boxes), *size, channels, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = sanitized(both_ways, triton_launch, tokens, grad, place, size, ratio)
    plain = both_ways(reference, tokens, grad, place, size, ratio)
    exact = both_ways(reference, tokens.double(), grad.double(), place, size, ratio)
    for ours, theirs, right in zip(results, plain, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == right.shape
        if right.numel():
            error, allowed = (ours.double() - right).abs().max(), (theirs.double() - right).abs().max()
            assert error <= 2 * allowed + torch.finfo(dtype).eps * right.abs().max()
    return results


@pytest.mark.parametrize("ratio", [1, 2, 3, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_kind_of_box(dtype, ratio):
    layout = PackedLayout.from_grids([(1, 1), (4, 5), (6, 3)])
    boxes = BOXES[::3] if dtype == torch.float16 else BOXES
    for image in (1, 2) if dtype == torch.float32 and ratio == 2 else (1,):
        check(layout, boxes, [image] * len(boxes), 12, (2, 3), ratio, dtype)


def test_unreadable_boxes_and_indices_give_zeros():
    layout = PackedLayout.from_grids([(3, 4), (2, 2)])
    boxes = [BOXES[0], *UNREADABLE, BOXES[0], BOXES[0], BOXES[8]]
    output, gradient = check(layout, boxes, [0, 0, 0, 2, -1, 1], 8, (2, 2), 2, torch.float32)
    assert output[0].any() and output[5].any() and not output[1:5].any() and gradient.any()


@pytest.mark.parametrize("grids", [[], [(3, 4)], [(2, 2), (1, 5)]])
@pytest.mark.parametrize("channels", [0, 8])
def test_nothing_to_gather(grids, channels):
    layout = PackedLayout.from_grids(grids)
    output, gradient = check(layout, [], [], channels, (7, 7), 2, torch.float32)
    assert output.shape == (0, 7, 7, channels) and not gradient.any()


def test_images_without_regions_and_regions_out_of_order():
    layout = PackedLayout.from_grids([(2, 2), (5, 3), (1, 9), (3, 3)])
    check(layout, BOXES[:1] * 2 + BOXES[5:7] + BOXES[8:], [3, 1, 3, 1, 1], 8, (2, 2), 2, torch.float32)


def test_more_regions_and_images_than_a_block(monkeypatch):
    from granvit_kernels import tiles

    monkeypatch.setattr(tiles, "BLOCK", 4)
    layout = PackedLayout.from_grids([(1 + i % 3, 2) for i in range(9)])
    check(layout, [BOXES[i % 7] for i in range(18)], [(i * 5) % 9 for i in range(18)], 8, (1, 2), 2, torch.float32)


coordinate = st.one_of(
    st.floats(-3, 9, width=32),
    st.floats(-(2.0**-10), 2.0**-10, width=32),
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.integers(-2, 8).map(float),
)
PROBLEMS = dict(
    grids=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
    boxes=st.lists(st.one_of(st.tuples(*[coordinate] * 4), st.sampled_from(UNREADABLE)), max_size=3),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    ratio=st.integers(0, 4),
    channels=st.sampled_from([1, 7, 40]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)


def any_problem(grids, boxes, size, ratio, channels, dtype, data):
    image = st.integers(-1, len(grids))
    image_index = data.draw(st.lists(image, min_size=len(boxes), max_size=len(boxes)))
    check(PackedLayout.from_grids(grids), boxes, image_index, channels, size, ratio, dtype)


test_any_problem = settings(max_examples=15, deadline=None)(given(**PROBLEMS)(any_problem))
test_many_problems = pytest.mark.slow(settings(max_examples=40, deadline=None)(given(**PROBLEMS)(any_problem)))
