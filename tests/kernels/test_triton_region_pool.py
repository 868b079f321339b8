"""region_pool's Triton kernels in Triton's interpreter, against the reference. What the compiler makes of them:
test_aot.py; on a GPU: test_gpu.py."""

import os

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_boxes import BOXES, UNREADABLE, VIEWS, far_apart
from regions import check_gpu_kernel
from torch.utils import deterministic

from granvit_kernels import PackedLayout
from granvit_kernels.ops.region_pool import reference, triton_launch

pytest.importorskip("triton")
from sanitizer import sanitized  # noqa: E402

interpreter.mend()
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not set"),
    # numpy tells of what the interpreter computes where nothing is kept
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory holds NaN, so that what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]


def both_ways(backend, logits, value, upstream, place, coverage):
    """output, lse and the gradients of logits and value."""
    output, lse = backend.forward(logits, value, *place, coverage)
    # Each backend from its own output and lse, as training has it.
    return output, lse, *backend.backward(*upstream, logits, value, output, lse, *place, coverage)


def check(
    grids, boxes, image_index, queries=2, heads=3, shared=False, size=8, coverage=False, dtype=torch.float32,
    logits_dtype=None, view=lambda x: x,
):  # fmt: skip
    """The error rule (check_gpu_kernel); nothing outside the tensors is touched, and no word by two programs."""
    layout = PackedLayout.from_grids(grids)
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    if shared:  # as op.py hands it on
        queries, heads = queries * heads, 1
    shape = len(boxes), queries, heads
    place = layout.grids, layout.cu_seqlens, boxes, torch.tensor(image_index, dtype=torch.int64)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, dtype=dtype):
            return torch.randn(*shape, generator=generator).to(dtype)

        logits = 2 * normal(layout.num_tokens, queries, heads, dtype=logits_dtype or dtype)
        value = view(normal(layout.num_tokens, heads, size))
        upstream = [normal(*shape, size), normal(*shape, dtype=torch.float32)]
        results = sanitized(both_ways, triton_launch, logits, value, upstream, place, coverage)
        assert [t.dtype for t in results] == [dtype, torch.float32, logits.dtype, dtype]
        assert all(t.is_contiguous() for t in results)
        exact = both_ways(reference, logits.double(), value.double(), [t.double() for t in upstream], place, coverage)
        return results, both_ways(reference, logits, value, upstream, place, coverage), exact

    return check_gpu_kernel(draw, dtype)


@pytest.mark.parametrize("shared", [False, True])
@DTYPES
def test_every_kind_of_box(dtype, shared):
    """Odd dtypes without coverage: each combination somewhere."""
    grids = [(3, 4), (7, 5), (1, 1)]
    coverage = (dtype == torch.bfloat16) == shared
    output, lse, *_ = check(
        grids, BOXES * 3, [0] * 8 + [1] * 8 + [2] * 8, shared=shared, coverage=coverage, dtype=dtype
    )
    assert (lse[4:8] == -torch.inf).all() and not output[4:8].any() and output[:4].any(-1).all()


@pytest.mark.parametrize(
    ("queries", "heads", "shared", "size"),
    [(1, 16, True, 72), (4, 12, True, 20), (1, 1, True, 300), (70, 1, True, 8), (7, 10, False, 5), (1, 2, False, 33)],
)  # fmt: skip
def test_rows_and_channels(queries, heads, shared, size):
    check([(4, 5), (6, 3)], BOXES[:1] + BOXES[:2], [0, 0, 1], queries, heads, shared, size, True, torch.bfloat16)


@DTYPES
def test_logits_of_another_dtype(dtype):
    check([(4, 5)], BOXES[:3], [0, 0, 0], shared=True, coverage=True, dtype=dtype, logits_dtype=torch.float32)


def test_unreadable_boxes_and_indices_give_zeros():
    boxes = [BOXES[0], *UNREADABLE, BOXES[0], BOXES[0], BOXES[1]]
    output, lse, *_ = check([(3, 4), (2, 2)], boxes, [0, 0, 0, 2, -1, 1], coverage=True)
    assert output[0].any() and output[5].any() and not output[1:5].any() and (lse[1:5] == -torch.inf).all()


@pytest.mark.parametrize("grids", [[], [(3, 4)]])
def test_no_regions(grids):
    check(grids, [], [], shared=True)


def test_regions_without_tokens_give_nothing():
    """The raw operator's own: the public function refuses indices that name no image."""
    output, lse, *_ = check([], BOXES[:2], [0, 0])
    assert not output.any() and (lse == -torch.inf).all()


def test_more_regions_than_a_tile_looks_at_at_once():
    """On images with and without regions, in any order."""
    images = [0 if i % 5 else 1 + i % 2 for i in range(50)]  # the fourth has none
    check([(3, 5), (3, 3), (1, 9), (2, 2)], [BOXES[i % 7] for i in range(50)], images, 1, 1, coverage=True)


@pytest.mark.parametrize("view", VIEWS)
def test_values_of_any_strides(view):
    check([(3, 4), (2, 5)], BOXES[:3], [0, 1, 1], view=VIEWS[view])


def test_tokens_farther_apart_than_32_bits_count():
    check([(1, 2)], BOXES[1:2], [0], dtype=torch.float16, view=lambda x: far_apart(x, 0))


def test_chunks_shared_by_several_programs_and_by_one(monkeypatch):
    for slices in (1, 2):
        monkeypatch.setattr(triton_launch, "_slices", lambda *_, slices=slices: slices)
        check([(3, 4)], BOXES[:2], [0, 0], shared=True, size=300, dtype=torch.bfloat16)


def test_few_tiles_share_their_chunks_by_rule():
    assert triton_launch._slices(8192, 9, torch.device("cpu")) == 1
    assert triton_launch._slices(64, 9, torch.device("cpu")) == 9


@pytest.mark.parametrize(("channels", "block"), [(1152, 256), (768, 256), (72, 32), (64, 64), (80, 32), (5, 16)])
def test_blocks_of_channels_idle_at_most_a_quarter_where_they_can(channels, block):
    assert triton_launch._fitting(channels, 256) == block


def test_logits_of_any_size():
    """Large ones differ by more than float32's exponent holds; weights must still sum to 1."""
    layout = PackedLayout.from_grids([(4, 4)])
    logits, value = torch.linspace(-14400, 14400, 16)[:, None, None], torch.ones(16, 1, 8)
    place = layout.grids, layout.cu_seqlens, torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([0])
    output, lse = triton_launch.forward(logits, value, *place, False)
    assert torch.equal(output, torch.ones_like(output)) and lse.item() == pytest.approx(14400, rel=1e-6)


def test_tiny_boxes():
    """Their shares are beyond float32, alone or multiplied; what they cover still adds up to 1."""
    boxes = [[0.0, 0.0, 1e-40, 1e-40], [0.0, 0.3, 1e-30, 2.1], [0.9999999, 1.9999998, 1.0000001, 2.0000002]]
    output, lse, *_ = check([(3, 4)], boxes, [0, 0, 0], coverage=True)
    assert (lse[0] < -150).all() and output.any(-1).all()


coordinate = st.one_of(
    st.floats(-3, 9, width=32), st.floats(-(2.0**100), 2.0**100, width=32), st.integers(-2, 8).map(float)
)
PROBLEMS = dict(
    grids=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3),
    boxes=st.lists(st.one_of(st.tuples(*[coordinate] * 4), st.sampled_from(UNREADABLE)), max_size=3),
    queries=st.integers(1, 4),
    heads=st.integers(1, 3),
    shared=st.booleans(),
    size=st.integers(1, 20),
    coverage=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    view=st.sampled_from([lambda x: x, *VIEWS.values()]),
    data=st.data(),
)


def any_problem(grids, boxes, queries, heads, shared, size, coverage, dtype, view, data):
    image = st.integers(-1, len(grids))
    image_index = data.draw(st.lists(image, min_size=len(boxes), max_size=len(boxes)))
    check(grids, boxes, image_index, queries, heads, shared, size, coverage, dtype, None, view)


test_any_problem = settings(max_examples=8, deadline=None)(given(**PROBLEMS)(any_problem))
test_many_problems = pytest.mark.slow(settings(max_examples=40, deadline=None)(given(**PROBLEMS)(any_problem)))
