"""region_attention's Triton kernels in Triton's interpreter, against the reference. What the compiler makes of them:
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
from granvit_kernels.ops.region_attention import reference, triton_launch

pytest.importorskip("triton")
from sanitizer import sanitized  # noqa: E402

interpreter.mend()
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not set"),
    # numpy tells of what the interpreter computes where nothing is kept
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]

@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory holds NaN, so that what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]


def both_ways(backend, tensors, upstream, place, coverage):
    """output, lse and the gradients of query, key and value."""
    scale = 0.85 * tensors[0].shape[-1] ** -0.5
    output, lse = backend.forward(*tensors, *place, scale, coverage)
    # Each backend from its own output and lse, as training has it.
    grads = backend.backward(*upstream, *tensors, output, lse, *place, scale, coverage)
    return output, lse, *grads


def check(
    grids, boxes, image_index, queries=3, heads=2, size=8, shared=False, coverage=False, dtype=torch.float32,
    view=lambda x: x,
):  # fmt: skip
    """The error rule (check_gpu_kernel); nothing outside the tensors is touched, and no word by two programs."""
    layout = PackedLayout.from_grids(grids)
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    shape = (queries, heads, size) if shared else (len(boxes), queries, heads, size)
    tokens = (layout.num_tokens, heads, size)
    place = layout.grids, layout.cu_seqlens, boxes, torch.tensor(image_index, dtype=torch.int64)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        query, key, value = (torch.randn(s, generator=generator).to(dtype) for s in (shape, tokens, tokens))
        tensors = query, view(key), view(value)
        upstream = [
            torch.randn(len(boxes), queries, heads, size, generator=generator).to(dtype),
            torch.randn(len(boxes), queries, heads, generator=generator),
        ]
        results = sanitized(both_ways, triton_launch, tensors, upstream, place, coverage)
        assert results[1].dtype == torch.float32 and all(t.dtype == dtype for t in (results[0], *results[2:]))
        exact = both_ways(reference, [t.double() for t in tensors], [t.double() for t in upstream], place, coverage)
        return results, both_ways(reference, tensors, upstream, place, coverage), exact

    return check_gpu_kernel(draw, dtype)


@pytest.mark.parametrize("coverage", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_kind_of_box(dtype, shared, coverage):
    grids = [(3, 4), (7, 5), (1, 1)]
    output, lse, *_ = check(
        grids, BOXES * 3, [0] * 8 + [1] * 8 + [2] * 8, shared=shared, coverage=coverage, dtype=dtype
    )
    assert (lse[4:8] == -torch.inf).all() and not output[4:8].any() and output[:4].any(-1).all()


@pytest.mark.parametrize(("queries", "size"), [(1, 64), (4, 72), (17, 8), (3, 1), (70, 20), (3, 250)])
def test_queries_and_head_sizes(queries, size):
    check([(4, 5), (6, 3)], BOXES[:2] + BOXES[:2], [0, 0, 1, 1], queries, 2, size, coverage=True)


@pytest.mark.parametrize("coverage", [False, True])
def test_a_box_shared_by_several_programs(coverage, monkeypatch):
    monkeypatch.setattr(triton_launch, "_splits", lambda *_: 3)
    for shared in (False, True):
        check([(9, 12), (2, 3)], [BOXES[1], BOXES[0], BOXES[5], [1.5, 0.2, 11.0, 8.7]], [0, 1, 0, 0], shared=shared,
              coverage=coverage)  # fmt: skip


def test_few_regions_of_large_images_are_split_by_rule():
    assert triton_launch._splits(36864, 524288, 32, torch.device("cpu")) == 1
    assert triton_launch._splits(12, 4096, 32, torch.device("cpu")) > 1
    assert triton_launch._splits(1, 16, 32, torch.device("cpu")) == 1


def test_unreadable_boxes_and_indices_give_zeros():
    boxes = [BOXES[0], *UNREADABLE, BOXES[0], BOXES[0], BOXES[1]]
    output, lse, *_ = check([(3, 4), (2, 2)], boxes, [0, 0, 0, 2, -1, 1])
    assert output[0].any() and output[5].any() and not output[1:5].any() and (lse[1:5] == -torch.inf).all()


@pytest.mark.parametrize("grids", [[], [(3, 4)], [(2, 2), (1, 5)]])
def test_no_regions(grids):
    for shared in (False, True):
        check(grids, [], [], shared=shared)


def test_regions_without_tokens_give_nothing():
    """The raw operator's own: the public function refuses indices that name no image."""
    output, lse, *_ = check([], BOXES[:2], [0, 0])
    assert not output.any() and (lse == -torch.inf).all()


def test_images_without_regions_and_regions_out_of_order():
    check([(2, 2), (5, 3), (1, 9), (3, 3)], BOXES[:4] + BOXES[:1], [3, 1, 3, 1, 1])


@pytest.mark.parametrize("view", VIEWS)
def test_keys_and_values_of_any_strides(view):
    check([(3, 4), (2, 5)], BOXES[:3], [0, 1, 1], view=VIEWS[view])


def test_heads_farther_apart_than_32_bits_count():
    check([(3, 4)], BOXES[:1], [0], dtype=torch.float16, view=lambda x: far_apart(x, 1))


def test_more_regions_than_a_block_of_columns():
    grids = [(6, 6), (3, 3)]
    check(grids, [BOXES[i % 5] for i in range(40)], [i % 2 for i in range(40)], queries=5, heads=1, coverage=True)


def test_logits_of_any_size():
    """Large ones differ by more than float32's exponent holds; weights must still sum to 1."""
    layout = PackedLayout.from_grids([(4, 4)])
    key = torch.linspace(-200, 200, 16)[:, None, None].expand(16, 1, 8).contiguous()
    query, value = torch.full((1, 1, 1, 8), 9.0), torch.ones(16, 1, 8)
    place = layout.grids, layout.cu_seqlens, torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([0])
    output, lse = triton_launch.forward(query, key, value, *place, 1.0, False)
    assert torch.equal(output, torch.ones_like(output)) and lse.item() == pytest.approx(200 * 72, rel=1e-6)


def test_the_interpreter_alone_takes_no_bfloat16(monkeypatch):
    """A user who debugs with TRITON_INTERPRET on a GPU has an interpreter that nobody mended."""
    monkeypatch.setattr(triton_launch.launch, "why_not", lambda device, dtype: None)
    cuda = torch.device("cuda")
    assert "bfloat16" in triton_launch.why_not(cuda, torch.bfloat16)
    assert triton_launch.why_not(cuda, torch.float16) is None
    monkeypatch.setattr(triton_launch.launch, "_interpreted", lambda: False)
    assert triton_launch.why_not(cuda, torch.bfloat16) is None


coordinate = st.one_of(
    st.floats(-3, 9, width=32), st.floats(-(2.0**100), 2.0**100, width=32), st.integers(-2, 8).map(float)
)
PROBLEMS = dict(
    grids=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3),
    boxes=st.lists(st.one_of(st.tuples(*[coordinate] * 4), st.sampled_from(UNREADABLE)), max_size=4),
    queries=st.integers(1, 5),
    size=st.integers(1, 20),
    shared=st.booleans(),
    coverage=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    view=st.sampled_from([lambda x: x, *VIEWS.values()]),
    splits=st.integers(1, 3),
    data=st.data(),
)


def any_problem(grids, boxes, queries, size, shared, coverage, dtype, view, splits, data):
    image = st.integers(-1, len(grids))
    image_index = data.draw(st.lists(image, min_size=len(boxes), max_size=len(boxes)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_launch, "_splits", lambda *_: splits)
        check(grids, boxes, image_index, queries, 2, size, shared, coverage, dtype, view)


test_any_problem = settings(max_examples=12, deadline=None)(given(**PROBLEMS)(any_problem))
test_many_problems = pytest.mark.slow(settings(max_examples=40, deadline=None)(given(**PROBLEMS)(any_problem)))
