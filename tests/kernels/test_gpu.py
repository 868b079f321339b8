"""roi_gather, region_attention and region_pool on a CUDA device: against the float64 reference on the CPU, against what
we did not write, and what a device asks of an operator. pack_patches' own are in test_patch_packing.py.

GRANVIT_TEST_DEVICE=cpu runs what can run on the CPU, to see that the tests themselves are whole.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils import deterministic

from granvit_kernels import PackedLayout, region_attention, region_pool, roi_gather
from granvit_kernels.ops.region_attention import reference as attention_reference
from granvit_kernels.ops.region_pool import reference as pool_reference
from granvit_kernels.ops.roi_gather import reference as gather_reference

DEVICE = os.environ.get("GRANVIT_TEST_DEVICE", "cuda")
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
on_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="of CUDA's own")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory holds NaN, so that what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]


def regions(seed: int, images: int = 5, boxes: int = 24, side: int = 20) -> tuple:
    """Ragged grids and boxes of every sort, on the CPU: layout, boxes, image_index."""
    generator = torch.Generator().manual_seed(seed)
    layout = PackedLayout.from_grids(torch.randint(1, side, (images, 2), generator=generator))
    corners = torch.rand(boxes, 2, 2, generator=generator) * (side + 4) - 2
    found = torch.cat([corners.amin(1), corners.amax(1)], 1)
    found[0] = torch.tensor([-1e9, -3e38, 1e9, 3e38])
    found[1] = torch.tensor([5.0, 5.0, 2.0, 3.0])
    found[2] = torch.tensor([1.25, 0.5, 1.5, 0.75])
    found[3] = torch.tensor([2.0, 1.0, 2.0, 3.0])
    found[4] = found[4].round()
    return layout, found, torch.randint(images, (boxes,), generator=generator)


def moved(layout, boxes, image_index, device=None) -> tuple:
    device = device or DEVICE
    return layout.to(device), boxes.to(device), image_index.to(device)


def place(layout, boxes, image_index) -> tuple:
    return layout.grids, layout.cu_seqlens, boxes, image_index


def within_rule(found, plain, exact, dtype):
    """At most twice plain PyTorch's error and one eps(dtype) of the largest value, against float64 (design.md)."""
    found, plain = found.cpu().double(), plain.cpu().double()
    assert found.shape == exact.shape and torch.equal(found.isfinite(), exact.isfinite())
    found, plain, exact = (t.nan_to_num(posinf=0, neginf=0) for t in (found, plain, exact))
    if exact.numel():
        error, allowed = (found - exact).abs().max(), (plain - exact).abs().max()
        assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()


# ---- roi_gather ----
def gather_both_ways(tokens, where, size, ratio, grad):
    tokens = tokens.clone().requires_grad_()
    output = roi_gather(tokens, *where, size, ratio)
    output.backward(grad)
    return output.detach(), tokens.grad


@pytest.mark.parametrize("ratio", [1, 2, 3, 0])
@pytest.mark.parametrize("channels", [8, 37, 256, 768, 1152])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_roi_gather(dtype, channels, ratio):
    where, size = regions(channels + ratio), (7, 5)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(where[0].num_tokens, channels, generator=generator).to(dtype)
    grad = torch.randn(len(where[1]), *size, channels, generator=generator).to(dtype)
    there = moved(*where)
    output, gradient = gather_both_ways(tokens.to(DEVICE), there, size, ratio, grad.to(DEVICE))
    again = gather_both_ways(tokens.to(DEVICE), there, size, ratio, grad.to(DEVICE))
    assert torch.equal(again[0], output) and torch.equal(again[1], gradient)
    exact = gather_reference.forward(tokens.double(), *place(*where), *size, ratio)
    within_rule(output, gather_reference.forward(tokens, *place(*where), *size, ratio), exact, dtype)
    exact = gather_reference.backward(grad.double(), *place(*where), len(tokens), ratio)
    within_rule(gradient, gather_reference.backward(grad, *place(*where), len(tokens), ratio), exact, dtype)


def test_roi_gather_equals_torchvision():
    ops = pytest.importorskip("torchvision.ops")
    where = moved(*regions(3))
    layout, boxes, image_index = where
    tokens = torch.randn(layout.num_tokens, 64, device=DEVICE)
    found = roi_gather(tokens, *where)
    # Deterministic, torchvision takes code of another meaning: samples outside the image read its border.
    torch.use_deterministic_algorithms(False)
    for image, (start, grid) in enumerate(zip(layout.cu_seqlens.tolist(), layout.grids.tolist(), strict=False)):
        map = tokens[start : start + grid[0] * grid[1]].unflatten(0, grid).permute(2, 0, 1)[None].contiguous()
        rows = image_index == image
        theirs = ops.roi_align(map, [boxes[rows]], 7, 1.0, 2, aligned=True).permute(0, 2, 3, 1)
        torch.testing.assert_close(found[rows], theirs, rtol=0, atol=1e-4)


# ---- region_attention ----
def attend_both_ways(tensors, where, upstream, **options):
    tensors = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    output, lse = region_attention(*tensors, *where, return_lse=True, **options)
    grads = torch.autograd.grad((output, lse), tensors, upstream)
    return output.detach(), lse.detach(), *grads


@pytest.mark.parametrize("coverage", [False, True])
@pytest.mark.parametrize(
    ("queries", "size", "shared"),
    [(1, 64, True), (4, 64, True), (4, 64, False), (3, 32, False), (16, 72, True), (17, 96, False), (64, 128, True),
     (80, 64, False), (4, 256, True), (2, 20, True)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_region_attention(dtype, queries, size, shared, coverage):
    where, heads = regions(queries + size), 2
    generator = torch.Generator().manual_seed(0)
    shape = (queries, heads, size) if shared else (len(where[1]), queries, heads, size)
    tokens = (where[0].num_tokens, heads, size)
    tensors = [torch.randn(s, generator=generator).to(dtype) for s in (shape, tokens, tokens)]
    upstream = [torch.randn(len(where[1]), queries, heads, size, generator=generator).to(dtype)]
    upstream.append(torch.randn(upstream[0].shape[:3], generator=generator))
    there = [t.to(DEVICE) for t in tensors], moved(*where), [t.to(DEVICE) for t in upstream]
    found = attend_both_ways(*there, coverage=coverage)
    for once, again in zip(found, attend_both_ways(*there, coverage=coverage), strict=True):
        assert torch.equal(once, again)
    rest = (*place(*where), size**-0.5, coverage)

    def reference(tensors, upstream):
        output, lse = attention_reference.forward(*tensors, *rest)
        return output, lse, *attention_reference.backward(*upstream, *tensors, output, lse, *rest)

    plain = reference(tensors, upstream)
    exact = reference([t.double() for t in tensors], [t.double() for t in upstream])
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        within_rule(ours, theirs, right, dtype)


@pytest.mark.parametrize("view", ["of more heads", "heads first", "every second value"])
def test_keys_of_any_strides(view):
    where = moved(*regions(1))
    key, value = torch.randn(2, where[0].num_tokens, 2, 32, device=DEVICE)
    views = {
        "of more heads": lambda t: torch.cat([t, t], 1)[:, :2],
        "heads first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "every second value": lambda t: t.repeat_interleave(2, 2)[..., ::2],
    }
    query = torch.randn(3, 2, 32, device=DEVICE)
    expected = region_attention(query, key, value, *where)
    assert torch.equal(region_attention(query, views[view](key), views[view](value), *where), expected)


def test_region_attention_equals_masked_attention_of_torch():
    """Large images and few boxes, so that a box is shared by several programs."""
    layout = PackedLayout.from_grids([(64, 48), (50, 64)])
    boxes = torch.tensor([[0.0, 0.0, 48.0, 64.0], [3.5, 2.0, 60.0, 49.0], [10.0, 10.0, 11.5, 12.0]])
    where = moved(layout, boxes, torch.tensor([0, 1, 1]))
    query, key, value = (torch.randn(n, 3, 64, device=DEVICE) for n in (5, layout.num_tokens, layout.num_tokens))
    (y, x), (x1, y1, x2, y2) = where[0].positions().T, where[1].T[:, :, None]
    mask = (x1 < x + 1) & (x2 > x) & (y1 < y + 1) & (y2 > y) & (where[0].image_ids() == where[2][:, None])
    each = query.transpose(0, 1).expand(3, -1, -1, -1)
    keys, values = (t.transpose(0, 1).expand(3, -1, -1, -1) for t in (key, value))
    expected = F.scaled_dot_product_attention(each, keys, values, mask[:, None, None]).transpose(1, 2)
    torch.testing.assert_close(region_attention(query, key, value, *where), expected, rtol=1e-4, atol=1e-5)


# ---- region_pool ----
def pool_both_ways(logits, value, where, upstream):
    leaves = [t.clone().requires_grad_() for t in (logits, value)]
    output, lse = region_pool(*leaves, *where, coverage=True, return_lse=True)
    return output.detach(), lse.detach(), *torch.autograd.grad((output, lse), leaves, upstream)


@pytest.mark.parametrize(
    ("queries", "heads", "values", "size"),
    [(1, 16, 1, 1152), (4, 12, 1, 768), (1, 6, 1, 384), (9, 16, 1, 72), (1, 16, 16, 72), (3, 2, 2, 20)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_region_pool(dtype, queries, heads, values, size):
    where = regions(queries + size)
    generator = torch.Generator().manual_seed(0)
    shapes = (queries, heads), (values, size)
    tensors = [torch.randn(where[0].num_tokens, *shape, generator=generator).to(dtype) for shape in shapes]
    upstream = [torch.randn(len(where[1]), queries, heads, size, generator=generator).to(dtype)]
    upstream.append(torch.randn(upstream[0].shape[:3], generator=generator))
    there = *(t.to(DEVICE) for t in tensors), moved(*where), [t.to(DEVICE) for t in upstream]
    found = pool_both_ways(*there)
    for once, again in zip(found, pool_both_ways(*there), strict=True):
        assert torch.equal(once, again)

    def reference(logits, value, upstream):
        if values == 1:  # as op.py hands it on
            logits, upstream = logits.flatten(1).unsqueeze(2), [t.flatten(1, 2).unsqueeze(2) for t in upstream]
        output, lse = pool_reference.forward(logits, value, *place(*where), True)
        return output, lse, *pool_reference.backward(*upstream, logits, value, output, lse, *place(*where), True)

    plain = reference(*tensors, upstream)
    exact = reference(*(t.double() for t in tensors), [t.double() for t in upstream])
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        within_rule(ours.view(right.shape), theirs, right, dtype)


# ---- all ----
def run_roi_gather(x, where):
    return roi_gather(x.flatten(1), *where)


def run_region_attention(x, where):
    return region_attention(x[:3], x, x, *where)


def run_region_pool(x, where):
    return region_pool(x[:, :, :3].transpose(1, 2), x, *where)


RUNS = pytest.mark.parametrize("run", [run_roi_gather, run_region_attention, run_region_pool])


@on_cuda
@RUNS
def test_unreadable_boxes_and_indices_read_nothing(run):
    layout, boxes, image_index = regions(2)
    boxes[5, 0], boxes[6, 1], boxes[7, 2] = torch.nan, torch.inf, -torch.inf
    image_index[8], image_index[9] = -1, 5
    where = moved(layout, boxes, image_index)
    x = torch.randn(layout.num_tokens, 2, 32, device=DEVICE, requires_grad=True)
    output = run(x, where)
    assert not output[5:10].any() and output[0].isfinite().all()
    (gradient,) = torch.autograd.grad(output.sum(), x)
    kept = [i for i in range(len(boxes)) if not 5 <= i < 10]
    fewer = (where[0], where[1][kept], where[2][kept])
    torch.testing.assert_close(gradient, torch.autograd.grad(run(x, fewer).sum(), x)[0])


@RUNS
@pytest.mark.parametrize("grids", [[(3, 4)], [(2, 2), (1, 5)]])
def test_no_regions(run, grids):
    layout = PackedLayout.from_grids(grids)
    where = moved(layout, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    x = torch.randn(layout.num_tokens, 2, 32, device=DEVICE, requires_grad=True)
    output = run(x, where)
    assert len(output) == 0
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], torch.zeros_like(x))


@RUNS
def test_compiles_whole(run):
    where = moved(*regions(4))
    x = torch.randn(where[0].num_tokens, 2, 32, device=DEVICE, requires_grad=True)
    output, found = run(x, where), torch.compile(run, fullgraph=True)(x, where)
    torch.testing.assert_close(found, output)
    grad = torch.randn_like(output)
    for got, wanted in zip(torch.autograd.grad(found, x, grad), torch.autograd.grad(output, x, grad), strict=True):
        torch.testing.assert_close(got, wanted)


@on_cuda
@RUNS
def test_never_waits_for_the_device(run):
    where = moved(*regions(5))
    x = torch.randn(where[0].num_tokens, 2, 32, device=DEVICE, requires_grad=True)
    run(x, where).sum().backward()  # compiled, and its memory asked for
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x, where).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_cuda
@RUNS
def test_side_stream(run):
    where = moved(*regions(6))
    x = torch.randn(where[0].num_tokens, 2, 32, device=DEVICE)
    expected, stream = run(x, where), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = x * 1
        output = run(late, where)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(output, expected)


@on_cuda
@RUNS
def test_cuda_graph(run):
    """Forward and backward, captured once; replays see new tokens and new boxes."""
    layout, boxes, image_index = regions(7)
    where = moved(layout, boxes, image_index)
    x = torch.randn(layout.num_tokens, 2, 32, device=DEVICE, requires_grad=True)

    def both_ways():
        output = run(x, where)
        return output.detach(), torch.autograd.grad(output.square().sum(), x)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both_ways()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        where[1].copy_(regions(8)[1].to(DEVICE))
    graph.replay()
    for found, expected in zip(captured, both_ways(), strict=True):
        assert torch.equal(found, expected)


@on_cuda
@pytest.mark.slow
@RUNS
def test_more_than_2_to_the_31_elements(run):
    side, images = 128, 140
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB")
    layout = PackedLayout.from_grids([(side, side)] * images)
    boxes = torch.tensor([[100.0, 100.0, 127.5, 126.0], [0.0, 0.0, 3.0, 3.0]])
    where = moved(layout, boxes, torch.tensor([images - 1, images - 1]))
    x = torch.zeros(layout.num_tokens, 32, 32, device=DEVICE, dtype=torch.bfloat16)
    last = torch.randn(side * side, 32, 32, device=DEVICE, dtype=torch.bfloat16)
    x[-side * side :] = last
    x[:3] = last[:3]
    assert x.numel() > 2**31
    alone = moved(PackedLayout.from_grids([(side, side)]), boxes, torch.tensor([0, 0]))
    assert torch.equal(run(x, where), run(last, alone))
