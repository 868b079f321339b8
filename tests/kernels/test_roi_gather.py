"""roi_gather: torchvision's numbers, the C++ kernel against the reference, what torch asks of an operator."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import passes_with
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.testing._internal.logging_tensor import LoggingTensorMode, capture_logs
from torch.utils import deterministic

from granvit_kernels import PackedLayout, native, region_attention, roi_gather
from granvit_kernels.ops.roi_gather import cpu, reference
from granvit_kernels.ops.roi_gather.op import operator

STORED = json.loads(Path(__file__).with_name("roi_gather_torchvision.json").read_text())
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

needs_library = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so that what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]


def wave(*shape: int) -> torch.Tensor:
    """The tokens and gradients behind roi_gather_torchvision.json; see make_roi_gather_torchvision.py."""
    count = torch.Size(shape).numel()
    return (1.5 * torch.sin(torch.arange(count, dtype=torch.float64) * 12.9898)).float().reshape(shape)


def problem(channels: int, boxes: int = 8, seed: int = 0):
    """Ragged grids and boxes of every sort: (tokens float64 [T, C], layout, boxes, image_index)."""
    generator = torch.Generator().manual_seed(seed)
    layout = PackedLayout.from_grids(torch.randint(1, 18, (5, 2), generator=generator))
    image_index = torch.randint(5, (boxes,), generator=generator)
    corners = torch.rand(boxes, 2, 2, generator=generator) * 20 - 2
    found = torch.cat([corners.amin(1), corners.amax(1)], 1)
    found[0] = torch.tensor([-1e9, -3e38, 1e9, 3e38])
    found[1] = torch.tensor([5.0, 5.0, 2.0, 3.0])
    tokens = torch.randn(layout.num_tokens, channels, dtype=torch.float64, generator=generator)
    return tokens, layout, found, image_index


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_library)])
@pytest.mark.parametrize("case", STORED["cases"], ids=lambda case: f"ratio{case['sampling_ratio']}")
def test_equals_torchvision(case, backend, monkeypatch):
    monkeypatch.setenv("GRANVIT_KERNELS_BACKEND", backend)
    layout = PackedLayout.from_grids(case["grids"])
    tokens = wave(layout.num_tokens, 3).requires_grad_(True)
    output = roi_gather(
        tokens,
        layout,
        torch.tensor(case["boxes"]),
        torch.tensor(case["image_index"]),
        tuple(case["output_size"]),
        case["sampling_ratio"],
    )
    assert output.shape == (len(case["boxes"]), *case["output_size"], 3)
    output.backward(wave(*output.shape))
    torch.testing.assert_close(output.detach().flatten(), torch.tensor(case["output"]), rtol=0, atol=1e-4)
    torch.testing.assert_close(tokens.grad.flatten(), torch.tensor(case["gradient"]), rtol=0, atol=1e-4)


@needs_library
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("sampling_ratio", [2, 0])
@pytest.mark.parametrize("channels", [37, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_error_at_most_twice_plain_torchs(dtype, channels, sampling_ratio):
    tokens, layout, boxes, image_index = problem(channels)
    tokens = tokens.to(dtype)
    place = (layout.grids, layout.cu_seqlens, boxes, image_index)

    def within_rule(found, plain, exact):
        error, allowed = (found.double() - exact).abs().max(), (plain.double() - exact).abs().max()
        assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()

    size = (3, 5, sampling_ratio)
    exact = reference.forward(tokens.double(), *place, *size)
    within_rule(cpu.forward(tokens, *place, *size), reference.forward(tokens, *place, *size), exact)
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    size = (layout.num_tokens, sampling_ratio)
    exact = reference.backward(grad.double(), *place, *size)
    found = cpu.backward(grad, *place, *size)
    assert found.dtype == dtype
    within_rule(found, reference.backward(grad, *place, *size), exact)


@needs_library
@pytest.mark.parametrize("seed", range(4))
def test_hundreds_of_boxes_at_one_token_add_up_as_closely_as_plain_torchs(seed):
    """Added tap after tap in float32, they were off by up to half more than the rule allows."""
    generator = torch.Generator().manual_seed(seed)
    layout, boxes = PackedLayout.from_grids([(1, 1)]), 300
    corners = torch.rand(boxes, 2, 2, generator=generator)
    place = layout.grids, layout.cu_seqlens, torch.cat([corners.amin(1), corners.amax(1)], 1), torch.zeros(boxes).long()
    grad = torch.randn(boxes, 7, 7, 256, generator=generator) + seed % 2
    exact = reference.backward(grad.double(), *place, 1, 2)
    plain, ours = (kernel.backward(grad, *place, 1, 2) for kernel in (reference, cpu))
    error, allowed = (ours - exact).abs().max(), (plain - exact).abs().max()
    assert error <= 2 * allowed + torch.finfo(torch.float32).eps * exact.abs().max()


@needs_library
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set(isa):
    passes_with(isa, "test_equals_torchvision or test_kernel_error", __file__)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_run_or_threads(dtype):
    tokens, layout, boxes, image_index = problem(200, boxes=40)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 3, 7):
            torch.set_num_threads(threads)
            leaf = tokens.to(dtype).requires_grad_(True)
            output = roi_gather(leaf, layout, boxes, image_index)
            output.backward(wave(*output.shape).to(dtype))
            results.append((output.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    for output, gradient in results[1:]:
        assert torch.equal(output, results[0][0]) and torch.equal(gradient, results[0][1])


def test_reference_gradcheck():
    tokens, layout, boxes, image_index = problem(2, boxes=6)
    tokens.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda t: roi_gather(t, layout, boxes, image_index, (2, 3)), (tokens,), fast_mode=True
    )
    assert torch.autograd.gradcheck(
        lambda t: reference.forward(t, layout.grids, layout.cu_seqlens, boxes, image_index, 2, 3, 0),
        (tokens,),
        fast_mode=True,
    )


coordinate = st.one_of(
    st.floats(-3, 15, width=32),
    st.floats(-(2.0**-10), 2.0**-10, width=32),
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.integers(-2, 14).map(float),
)
side = st.integers(1, 12)


@needs_library
@settings(max_examples=40, deadline=None)
@given(
    grids=st.lists(st.tuples(side, side), min_size=1, max_size=4),
    boxes=st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), max_size=6),
    output_size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    sampling_ratio=st.integers(-1, 4),
    channels=st.integers(0, 40),
    contiguous=st.booleans(),
    data=st.data(),
)
def test_kernel_equals_reference(grids, boxes, output_size, sampling_ratio, channels, contiguous, data):
    layout = PackedLayout.from_grids(grids)
    index = st.integers(0, len(grids) - 1)
    images = data.draw(st.lists(index, min_size=len(boxes), max_size=len(boxes)))
    image_index = torch.tensor(images, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    tokens = wave(layout.num_tokens, channels)
    if not contiguous:
        tokens = tokens.t().contiguous().t()
        boxes = boxes.t().contiguous().t()
        image_index = image_index.repeat_interleave(2)[::2]
    tokens = tokens.clone(memory_format=torch.preserve_format).requires_grad_(True)
    output = roi_gather(tokens, layout, boxes, image_index, output_size, sampling_ratio)
    place = (layout.grids, layout.cu_seqlens, boxes, image_index)
    expected = reference.forward(tokens.detach(), *place, *output_size, sampling_ratio)
    torch.testing.assert_close(output.detach(), expected, rtol=0, atol=2e-5)
    grad = wave(*output.shape)
    if not contiguous:
        grad = grad.transpose(0, 3).contiguous().transpose(0, 3)
    (gradient,) = torch.autograd.grad(output, tokens, grad)
    expected = reference.backward(grad, *place, layout.num_tokens, sampling_ratio)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("grids", [[], [(3, 4)]])
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_library)])
def test_nothing_to_gather(grids, backend, monkeypatch):
    monkeypatch.setenv("GRANVIT_KERNELS_BACKEND", backend)
    layout = PackedLayout.from_grids(grids)
    tokens = torch.ones(layout.num_tokens, 8, requires_grad=True)
    output = roi_gather(tokens, layout, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert output.shape == (0, 7, 7, 8)
    output.sum().backward()
    assert torch.equal(tokens.grad, torch.zeros_like(tokens))


def test_unreadable_boxes_give_zeros_where_the_host_does_not_look():
    layout = PackedLayout.from_grids([(3, 4)])
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, float("nan"), 2.0], [0.0, 0.0, 2.0, float("inf")]])
    boxes = torch.cat([boxes, boxes[:1], boxes[:1]])
    image_index = torch.tensor([0, 0, 0, 1, -1])
    output = reference.forward(
        torch.ones(12, 2), layout.grids, layout.cu_seqlens, boxes, image_index, 2, 2, 2
    )
    assert output[0].min() == 1 and output[1:].abs().max() == 0


BACKENDS = [pytest.param(cpu, marks=needs_library, id="cpu"), pytest.param(reference, id="reference")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_readable_box_gives_a_gradient_of_zeros(backend):
    layout = PackedLayout.from_grids([(3, 4)])
    place = layout.grids, layout.cu_seqlens
    if backend is reference:  # the C++ kernel takes boxes and indices that were checked
        boxes, image_index = torch.tensor([[0.0, 0.0, torch.inf, 1.0], [0.0, 0.0, 1.0, 1.0]]), torch.tensor([0, 1])
    else:
        boxes, image_index = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    grad = torch.ones(len(boxes), 2, 2, 5)
    assert torch.equal(backend.backward(grad, *place, boxes, image_index, 12, 2), torch.zeros(12, 5))


@needs_library
def test_kernel_takes_a_layout_of_any_strides():
    tokens, layout, boxes, image_index = problem(3)
    expected = cpu.forward(tokens.float(), layout.grids, layout.cu_seqlens, boxes, image_index, 2, 2, 2)
    grids, cu_seqlens = layout.grids.t().contiguous().t(), layout.cu_seqlens.repeat_interleave(2)[::2]
    assert not grids.is_contiguous() and not cu_seqlens.is_contiguous()
    assert torch.equal(cpu.forward(tokens.float(), grids, cu_seqlens, boxes, image_index, 2, 2, 2), expected)


@needs_library
@pytest.mark.parametrize("sampling_ratio", [100, 1024])
def test_many_samples_add_up_without_rounding(sampling_ratio):
    """Shares added in float32 were off by some 10 eps of the sum."""
    layout = PackedLayout.from_grids([(1, 2)])
    boxes, image_index = torch.tensor([[0.53, 0.5, 1.47, 0.5], [0.6, 0.0, 1.1, 1.0]]), torch.zeros(2, dtype=torch.int64)
    place = (layout.grids, layout.cu_seqlens, boxes, image_index, 1, 1, sampling_ratio)
    tokens = torch.eye(2)
    exact = reference.forward(tokens.double(), *place)
    assert (cpu.forward(tokens, *place) - exact).abs().max() <= torch.finfo(torch.float32).eps


@needs_library
def test_the_raw_operator_refuses_tokens_of_another_layout():
    tokens, layout, boxes, image_index = problem(3)
    rows = len(tokens)
    with pytest.raises(ValueError, match=f"tokens has {rows - 1} rows; it takes {rows}, the layout's tokens"):
        operator.registered(
            tokens[1:].float(), layout.grids, layout.cu_seqlens, boxes, image_index, 2, 2, 2
        )  # fmt: skip


@needs_library
@pytest.mark.parametrize(
    ("grids", "cu_seqlens", "image"),
    [
        ([(30, 4), (2, 2)], (0, 12, 16), "0 has a grid of 30 x 4 and the tokens from 0 to 12"),
        ([(3, 4), (2, 2)], (0, 999, 16), "0 has a grid of 3 x 4 and the tokens from 0 to 999"),
        ([(3, 4), (2, 2)], (1, 13, 17), "0 has a grid of 3 x 4 and the tokens from 1 to 13"),
        ([(3, 4), (-2, -2)], (0, 12, 16), "1 has a grid of -2 x -2 and the tokens from 12 to 16"),
    ],
)
def test_a_layout_whose_fields_disagree_is_refused(grids, cu_seqlens, image):
    """Its kernels would read, and the backward write, where no tensor is."""
    fields = (torch.tensor(numbers, dtype=torch.int32) for numbers in (grids, cu_seqlens))
    layout, tokens = PackedLayout(*fields, 16, 12), torch.zeros(16, 1, 3)
    place = layout, torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"the layout's image {image}; it takes height"):
        roi_gather(tokens[:, 0], *place)
    with pytest.raises(ValueError, match=f"the layout's image {image}; it takes height"):
        region_attention(tokens[:1], tokens, tokens, *place)


def test_integers_of_any_kind():
    tokens, layout, boxes, image_index = problem(3)
    expected = roi_gather(tokens, layout, boxes, image_index, (3, 3), 2)
    for size, ratio in ((np.int64(3), np.int32(2)), ([3, np.int64(3)], torch.tensor(2)), (3, 2)):
        assert torch.equal(roi_gather(tokens, layout, boxes, image_index, size, ratio), expected)
    adaptive = roi_gather(tokens, layout, boxes, image_index, (3, 3), 0)
    assert torch.equal(roi_gather(tokens, layout, boxes, image_index, (3, 3), -(2**70)), adaptive)


def test_fake_and_meta_tensors_modes_and_transforms():
    tokens, layout, boxes, image_index = problem(4)
    tokens = tokens.float()

    def run(x):
        return roi_gather(x, layout, boxes, image_index)

    expected = run(tokens)
    assert roi_gather(*(x.to("meta") for x in (tokens, layout, boxes, image_index))).shape == expected.shape
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = mode.from_tensor(tokens).requires_grad_()
    output = run(fake)
    with mode:
        output.sum().backward()
    assert output.shape == expected.shape and fake.grad.shape == tokens.shape
    with LoggingTensorMode(), capture_logs() as seen:
        run(tokens)
    assert any("granvit.roi_gather" in line for line in seen)
    leaf = tokens.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(run(leaf), leaf, expected)
    assert torch.equal(torch.func.vjp(run, tokens)[1](expected)[0], gradient)
    assert torch.equal(torch.func.vmap(run)(torch.stack([tokens, tokens]))[1], expected)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused(requires_grad):
    tokens, layout, boxes, image_index = problem(4)
    tokens.requires_grad_(requires_grad)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="roi_gather has no forward-mode"):
        roi_gather(forward_ad.make_dual(tokens, torch.ones_like(tokens)), layout, boxes, image_index)
    with forward_ad.dual_level():  # without a tangent, nothing is lost
        roi_gather(tokens, layout, boxes, image_index)


def test_opcheck():
    tokens, layout, boxes, image_index = problem(6)
    place = (layout.grids, layout.cu_seqlens, boxes, image_index)
    torch.library.opcheck(operator.registered, (tokens.float().requires_grad_(True), *place, 3, 4, 2))
    backward = torch.ops.granvit.roi_gather_backward.default
    torch.library.opcheck(backward, (torch.ones(8, 3, 4, 6), *place, layout.num_tokens, 2))


def squared(tokens, layout, boxes, image_index):
    return (roi_gather(tokens * 2, layout, boxes, image_index, (3, 3)) ** 2).sum()


def equals_eager(compiled, channels, boxes, seed):
    tokens, layout, boxes, image_index = problem(channels, boxes, seed)
    tokens = tokens.float().requires_grad_(True)
    results = []
    for function in (compiled, squared):
        value = function(tokens, layout, boxes, image_index)
        results.append((value.detach(), *torch.autograd.grad(value, tokens)))
    torch.testing.assert_close(results[0], results[1])


def test_traced_forward_and_backward_with_dynamic_shapes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(squared, fullgraph=True, dynamic=True, backend=counter)
    for seed, boxes in ((0, 5), (1, 9), (2, 3)):
        equals_eager(compiled, 8, boxes, seed)
    assert counter.frame_count <= 2  # not a graph of its own for every batch


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_compiled_forward_and_backward():
    torch._dynamo.reset()
    equals_eager(torch.compile(squared, fullgraph=True, dynamic=True), 8, 5, 0)


def test_autocast_keeps_the_tokens_dtype():
    tokens, layout, boxes, image_index = problem(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert roi_gather(tokens.float(), layout, boxes, image_index).dtype == torch.float32
        assert roi_gather(tokens.half(), layout, boxes, image_index).dtype == torch.float16


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_values(backend):
    tokens, layout, boxes, image_index = problem(4)
    place = (layout.grids, layout.cu_seqlens, boxes, image_index)
    forward = tokens.float(), *place, 3, 3, 2
    expected = backend.forward(*forward)
    backward = expected, *place, layout.num_tokens, 2
    gradient = backend.backward(*backward)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(backend.forward(*forward), expected)
        assert torch.equal(backend.backward(*backward), gradient)


def test_only_once_differentiable():
    tokens, layout, boxes, image_index = problem(4)
    tokens = tokens.float().requires_grad_(True)
    output = roi_gather(tokens, layout, boxes, image_index)
    weights = torch.ones_like(output, requires_grad=True)
    (gradient,) = torch.autograd.grad(output, tokens, weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


LAYOUT = PackedLayout.from_grids([(2, 3)])
GOOD = {
    "tokens": torch.zeros(6, 4),
    "layout": LAYOUT,
    "boxes": torch.zeros(2, 4),
    "image_index": torch.zeros(2, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokens": torch.zeros(5, 4)},
            r"tokens is float32 \[5, 4\]; it takes floating-point \[T, C\] with T = 6",
        ),
        ({"tokens": torch.zeros(6)}, r"tokens is float32 \[6\]; it takes floating-point \[T, C\]"),
        ({"tokens": torch.zeros(6, 4).int()}, r"tokens is int32 \[6, 4\]; it takes float32, bfloat16, float16"),
        ({"tokens": torch.zeros(6, 4).to(torch.float8_e5m2)}, r"tokens is float8_e5m2 \[6, 4\]; it takes float32"),
        ({"boxes": torch.zeros(2, 5)}, r"boxes is float32 \[2, 5\]; it takes float32 \[R, 4\]"),
        ({"boxes": torch.zeros(4)}, r"boxes is float32 \[4\]; it takes float32 \[R, 4\]"),
        ({"boxes": torch.zeros(2, 4).double()}, r"boxes is float64 \[2, 4\]; it takes float32 \[R, 4\]"),
        (
            {"image_index": torch.zeros(3).long()},
            r"image_index is int64 \[3\]; it takes int32 or int64 \[2\]",
        ),
        ({"image_index": torch.zeros(2)}, r"image_index is float32 \[2\]; it takes int32 or int64 \[2\]"),
        (
            {"image_index": torch.tensor([0, 1])},
            r"image_index holds 1; it takes \[0, 1\), the layout's images",
        ),
        ({"image_index": torch.tensor([0, -1])}, r"image_index holds -1; it takes \[0, 1\)"),
        ({"boxes": torch.tensor([[0.0] * 4, [0, 0, float("inf"), 0]])}, r"boxes\[1\] is .*; it takes finite"),
        (
            {"boxes": torch.tensor([[float("nan")] * 4] * 2)},
            r"boxes\[0\] is \[nan.*; it takes finite numbers",
        ),
        (
            {"boxes": torch.zeros(2, 4, device="meta")},
            r"boxes is on meta; it takes cpu, where the tokens are",
        ),
        ({"layout": LAYOUT.to("meta")}, r"layout is on meta; it takes cpu"),
        ({"output_size": (0, 7)}, r"output_size is \(0, 7\); it takes \(height, width\), both at least 1"),
        ({"image_index": [0, 0]}, "image_index is a list; it takes a tensor"),
        ({"output_size": 2**31}, r"output_size is 2147483648; it takes .* below 2\*\*31"),
        ({"output_size": 0}, r"output_size is 0; it takes"),
        ({"output_size": (7,)}, r"output_size is \(7,\); it takes \(height, width\)"),
        ({"output_size": (7, 7, 7)}, r"output_size is \(7, 7, 7\); it takes"),
        ({"output_size": 7.0}, r"output_size is 7.0; it takes"),
        ({"output_size": None}, r"output_size is None; it takes"),
        ({"output_size": (7.0, 7.0)}, r"output_size is \(7.0, 7.0\); it takes"),
        ({"sampling_ratio": 2.5}, "sampling_ratio is 2.5; it takes a whole number <= 1024"),
        ({"sampling_ratio": None}, "sampling_ratio is None; it takes a whole number"),
        ({"sampling_ratio": 1025}, "sampling_ratio is 1025; it takes a whole number <= 1024"),
        ({"sampling_ratio": 2**63}, "sampling_ratio is 9223372036854775808; it takes a whole number <= 1024"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        roi_gather(**{**GOOD, **change})
