"""region_pool: the reference against torch's own softmax, the C++ kernel against the reference. Instruction sets are in
test_region_attention.py, values that are not finite in test_non_finite.py, torch.jit in test_registration.py."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from regions import DTYPES, EVERY_KIND, MEETS_NOTHING, check_error_rule, drawn_regions, meets, redrawn, same, shares
from torch import Tensor

from granvit_kernels import PackedLayout, native, region_attention, region_pool
from granvit_kernels.ops.region_pool import cpu, reference
from granvit_kernels.ops.region_pool.op import CANDIDATES, operator

needs_native = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
BACKENDS = [pytest.param("cpu", marks=needs_native), "reference"]


class Problem(NamedTuple):
    logits: Tensor
    value: Tensor
    layout: PackedLayout
    boxes: Tensor
    image_index: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        return self._replace(logits=self.logits.to(dtype), value=self.value.to(dtype))

    def raw(self, coverage: bool) -> tuple:
        """Arguments of the registered operator."""
        return (*self[:2], self.layout.grids, self.layout.cu_seqlens, *self[3:], coverage)


def problem(
    grids, boxes, image_index, queries=3, heads=2, size=8, shared=False, dtype=torch.float32, seed=0
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    layout = PackedLayout.from_grids(grids)
    logits = torch.randn(layout.num_tokens, queries, heads, generator=generator).mul(2).to(dtype)
    value = torch.randn(layout.num_tokens, 1 if shared else heads, size, generator=generator).to(dtype)
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Problem(logits, value, layout, boxes, torch.tensor(image_index, dtype=torch.int64))


def every_kind(**options) -> Problem:
    return problem([(3, 4), (11, 9), (1, 1)], EVERY_KIND * 3, [0] * 9 + [1] * 9 + [2] * 9, **options)


def gradients(p: Problem, function=region_pool, **options) -> list[Tensor]:
    """output, lse and the gradients of logits and value, for fixed random gradients of both outputs."""
    p = p._replace(logits=p.logits.detach().requires_grad_(), value=p.value.detach().requires_grad_())
    output, lse = function(*p, return_lse=True, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (output, lse)]
    return [output.detach(), lse.detach(), *torch.autograd.grad((output, lse), p[:2], upstream)]


def by_torch(logits, value, layout, boxes, image_index, coverage=False, return_lse=True):
    """The definition over all tokens, [R, T]."""
    place = layout, boxes, image_index
    weights = (shares(*place) if coverage else meets(*place)).to(logits.dtype)
    biased = logits.permute(1, 2, 0) + weights.log()[:, None, None]
    nothing = ~meets(*place).any(1)[:, None, None]
    output = torch.einsum("rkht,thd->rkhd", biased.softmax(-1).masked_fill(nothing[..., None], 0), value)
    return output, biased.logsumexp(-1)


# ---- the reference ----
@pytest.mark.parametrize("coverage", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_reference_equals_torchs_softmax(shared, coverage):
    p = every_kind(shared=shared, dtype=torch.float64)
    p = p._replace(boxes=p.boxes.clamp(-30, 60))  # [R, T] in float64 holds no box of 1e30
    whole = p._replace(value=p.value.expand(-1, 2, -1))
    found, wanted = gradients(p, coverage=coverage), gradients(whole, by_torch, coverage=coverage)
    wanted[3] = wanted[3].sum(1, keepdim=True) if shared else wanted[3]
    met = meets(*p[2:]).any(1)
    for ours, theirs in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert not found[0][~met].any() and (found[1][~met] == -torch.inf).all() and 0 < met.sum() < len(met)
    finite = gradients(p._replace(boxes=p.boxes[met], image_index=p.image_index[met]), coverage=coverage)
    exact = whole._replace(boxes=p.boxes[met], image_index=p.image_index[met])
    exact = gradients(exact, by_torch, coverage=coverage)  # where nothing is met, its gradients are NaN
    exact[3] = exact[3].sum(1, keepdim=True) if shared else exact[3]
    for ours, theirs in zip(finite, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(shared):
    p = problem([(2, 3), (1, 2)], [EVERY_KIND[0], EVERY_KIND[3], EVERY_KIND[5]], [0, 1, 0], 2, 2, 3, shared)
    p = p.to(torch.float64)

    def both(logits, value):
        output, lse = region_pool(logits, value, *p[2:], coverage=True, return_lse=True)
        return output, lse[:2]  # the third region's is -inf

    assert torch.autograd.gradcheck(both, tuple(t.requires_grad_() for t in p[:2]))


@pytest.mark.parametrize("coverage", [False, True])
def test_is_region_attention_of_shared_queries(coverage):
    p = every_kind(dtype=torch.float64)
    query, key = (torch.randn(n, 2, 8, dtype=torch.float64) for n in (3, p.layout.num_tokens))
    logits = torch.einsum("khd,thd->tkh", query, key) * 0.3
    attended = region_attention(query, key, *p[1:], scale=0.3, coverage=coverage, return_lse=True)
    pooled = region_pool(logits, *p[1:], coverage=coverage, return_lse=True)
    for ours, theirs in zip(pooled, attended, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- the C++ kernel, against the reference ----
def within_the_rule(coverage: bool, *problems: Problem) -> None:
    """Over all `problems`, which are alike but for their numbers."""
    p = problems[0]
    dtypes = p.value.dtype, torch.float32, p.logits.dtype, p.value.dtype
    compared = [three_ways(p, coverage) for p in problems]
    lse = torch.stack([exact[1] for _, _, exact in compared])
    for i, (name, dtype) in enumerate(zip(("output", "lse", "grad logits", "grad value"), dtypes, strict=True)):
        ours, plain, exact = (torch.stack([results[way][i] for results in compared]) for way in range(3))
        check_error_rule(name, ours, plain, exact, dtype, lse)


def three_ways(p: Problem, coverage: bool) -> list[tuple[Tensor, ...]]:
    """Outputs and gradients: ours, plain PyTorch's, float64's."""
    rest = p.raw(coverage)[2:]
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in cpu.forward(*p.raw(coverage))]
    results = []
    for backend, logits, value in ((cpu, *p[:2]), (reference, *p[:2]), (reference, *p.to(torch.float64)[:2])):
        out, lse = backend.forward(logits, value, *rest)
        grads = upstream[0].to(out.dtype), upstream[1].to(lse.dtype)
        results.append((out, lse, *backend.backward(*grads, logits, value, out, lse, *rest)))
    return results


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries, heads, size", [(1, 3, 1), (2, 1, 33), (12, 1, 96), (7, 2, 72), (64, 1, 16)])
def test_kernel_keeps_the_error_rule(queries, heads, size, dtype):
    within_the_rule(size % 2 == 0, every_kind(queries=queries, heads=heads, size=size, dtype=dtype))


@needs_native
@pytest.mark.parametrize("backend", [cpu, reference])
def test_gradients_of_large_logits_lose_nothing(backend):
    """Near 1e5 an lse is rounded to 0.008, and so is the sum of a logit and a log share in the reference."""
    p = every_kind()
    p, rest = p._replace(logits=p.logits + 1e5), p.raw(coverage=backend is cpu)[2:]
    results = []
    for module, q in ((backend, p), (reference, p.to(torch.float64))):
        out, lse = module.forward(*q[:2], *rest)
        results.append(module.backward(out, lse.isfinite().to(lse.dtype), *q[:2], out, lse, *rest))
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


@st.composite
def problems(draw):
    p = problem(
        *draw(drawn_regions()), queries=draw(st.integers(1, 9)), heads=draw(st.integers(1, 3)),
        size=draw(st.integers(1, 40)), dtype=draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    return p._replace(logits=p.logits.float()) if draw(st.booleans()) else p, draw(st.booleans())


@needs_native
@settings(max_examples=60, deadline=None)
@given(problems())
def test_kernel_keeps_the_error_rule_on_anything(drawn):
    p, coverage = drawn
    within_the_rule(coverage, *redrawn(p, "logits", "value"))


@needs_native
@settings(max_examples=20, deadline=None)
@given(problems())
def test_reads_only_what_boxes_meet(drawn):
    """NaN everywhere else changes nothing, and gradients there are zero."""
    p, coverage = drawn
    met = meets(*p[2:]).any(0)
    poisoned = [t.masked_fill(~met[:, None, None], torch.nan) for t in p[:2]]
    clean, found = gradients(p, coverage=coverage), gradients(Problem(*poisoned, *p[2:]), coverage=coverage)
    assert same(clean, found) and not found[2][~met].any() and not found[3][~met].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_box_without_cells_gives_zeros_and_no_gradient(backend, monkeypatch):
    monkeypatch.setenv("GRANVIT_KERNELS_BACKEND", backend)
    p = every_kind(dtype=torch.bfloat16, shared=True)
    nothing = p._replace(boxes=p.boxes[MEETS_NOTHING], image_index=p.image_index[MEETS_NOTHING])
    output, lse, *grads = gradients(nothing)
    assert lse.dtype == torch.float32 and (lse == -torch.inf).all()
    assert output.shape == (4, 3, 2, 8) and not output.any() and not any(g.any() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_boxes_and_large_logits(backend, monkeypatch):
    """The product of two tiny shares is no float32 any more."""
    p = problem([(2, 2)], [[0, 0, 1e-30, 1e-30], [1 - 2**-24, 1 - 2**-24, 1 + 2**-23, 1 + 2**-23]], [0, 0])
    for scale in (1, 1000):
        p = p._replace(logits=p.logits * scale)
        exact = gradients(p.to(torch.float64), coverage=True)
        with monkeypatch.context() as forced:
            forced.setenv("GRANVIT_KERNELS_BACKEND", backend)
            found = gradients(p, coverage=True)
        for ours, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=float(1e-3 * theirs.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_minus_infinity_weigh_nothing(backend):
    """Also where all of the first 64 are: the running maximum is -inf then. Without a finite one there is no output."""
    p = problem([(1, 80)], [[0, 0, 80, 1]], [0], 1, 1, 1)
    p.logits[:72], p.logits[72:] = -torch.inf, 0
    kernel = CANDIDATES["region_pool"][backend]
    output, lse = kernel.forward(*p.raw(False))
    torch.testing.assert_close(output, p.value[72:].mean(0).expand_as(output))
    torch.testing.assert_close(lse, torch.full_like(lse, 8.0).log())
    grads = torch.ones_like(output), torch.ones_like(lse)
    grad_logits, grad_value = kernel.backward(*grads, *p[:2], output, lse, *p.raw(False)[2:])
    assert not grad_logits[:72].any() and torch.isfinite(grad_logits).all()
    torch.testing.assert_close(grad_value.flatten(), torch.tensor([0.0] * 72 + [0.125] * 8))
    p.logits.fill_(-torch.inf)
    output, lse = kernel.forward(*p.raw(False))
    assert output.isnan().all() and (lse == -torch.inf).all()


@needs_native
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_bits_over_runs_and_threads(dtype, shared):
    boxes = [[0.3, 1, 25, 22.5], [2, 2, 9, 9], [1, 0, 17, 31]] * 6
    p = problem([(30, 20), (9, 31)], boxes, [0, 1, 0] * 6, queries=2, heads=3, size=40, shared=shared, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(gradients(p, coverage=True))
    finally:
        torch.set_num_threads(before)
    assert all(same(results[0], other) for other in results[1:])


# ---- how it meets torch ----
def test_opcheck():
    p = problem([(3, 4), (1, 2)], EVERY_KIND[:6], [0, 0, 0, 1, 1, 1], shared=True)
    torch.library.opcheck(operator.registered, (*(t.requires_grad_() for t in p[:2]), *p.raw(True)[2:]))
    torch.library.opcheck(operator.registered, problem([], [], [], dtype=torch.float64).raw(False))


def test_compile_fullgraph_with_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(region_pool, fullgraph=True, dynamic=True)
    for grids, count in (([(3, 4)], 2), ([(5, 6), (2, 9)], 5)):
        p = problem(grids, EVERY_KIND[:count], [i % len(grids) for i in range(count)], shared=True)
        assert same(gradients(p, coverage=True), gradients(p, compiled, coverage=True))


@pytest.mark.parametrize("grids", [[], [(2, 3)]], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_empty_inputs(shared, grids):
    p = problem(grids, [], [], shared=shared)
    output, lse, *grads = gradients(p)
    assert output.shape == (0, 3, 2, 8) and lse.shape == (0, 3, 2)
    assert [g.shape for g in grads] == [t.shape for t in p[:2]] and not any(g.any() for g in grads)


@needs_native  # the reference's products may add in another order
def test_strided_inputs_and_index_types():
    p = every_kind(heads=4, size=16)
    expected = gradients(p)
    logits, boxes = p.logits.permute(2, 0, 1).contiguous().permute(1, 2, 0), p.boxes.T.contiguous().T
    for value in (p.value.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([p.value, p.value], 1)[:, 0]):
        assert not any(t.is_contiguous() for t in (logits, boxes, value))
        assert same(gradients(Problem(logits, value, p.layout, boxes, p.image_index.int())), expected)


def test_autocast_casts_values_and_leaves_float32_logits():
    p = every_kind(shared=True)
    for logits in (p.logits, p.logits.half(), p.logits.bfloat16()):
        kept = logits if logits.dtype == torch.float32 else logits.bfloat16()
        expected = gradients(p._replace(logits=kept, value=p.value.bfloat16()))
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(p._replace(logits=logits))
        assert same(found[:2], expected[:2]) and found[2].dtype == logits.dtype and found[3].dtype == torch.float32


def test_meta_tensors_and_transforms():
    p = every_kind(shared=True)
    assert region_pool(*(t.to("meta") for t in p)).shape == (27, 3, 2, 8)
    mapped = torch.func.vmap(lambda logits: region_pool(logits, *p[1:]))(torch.stack([p.logits, p.logits]))
    assert torch.equal(mapped[1], region_pool(*p))
    given = torch.func.grad(lambda value: region_pool(p.logits, value, *p[2:]).square().sum())(p.value)
    value = p.value.clone().requires_grad_()
    assert same([given], torch.autograd.grad(region_pool(p.logits, value, *p[2:]).square().sum(), value))
    with pytest.raises(NotImplementedError, match="region_pool has no forward-mode derivative"):
        torch.func.jvp(lambda value: region_pool(p.logits, value, *p[2:]), (p.value,), (p.value,))
    (first,) = torch.autograd.grad(region_pool(p.logits, value, *p[2:]).square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# ---- faults ----
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=None), "logits is a NoneType; it takes a tensor"),
        (dict(boxes=[[0, 0, 1, 1]]), "boxes is a list; it takes a tensor"),
        (dict(layout=[(3, 4), (2, 2)]), "layout is a list; it takes a PackedLayout"),
        (dict(logits=torch.zeros(15, 3, 2)), r"logits is float32 \[15, 3, 2\]; it takes .*\[T, K, H\] with T = 16"),
        (dict(logits=torch.zeros(16, 6)), r"logits is float32 \[16, 6\]; it takes .*\[T, K, H\]"),
        (dict(logits=torch.zeros(16, 0, 2)), r"logits is float32 \[16, 0, 2\]; it takes K and H of at least 1"),
        (dict(logits=torch.zeros(16, 3, 2).double()), "logits is float64 .*; it takes float32 or value's dtype"),
        (dict(logits=torch.zeros(16, 3, 2).long()), "logits is int64 .*; it takes float32, bfloat16"),
        (dict(value=torch.zeros(16, 3, 8)), r"value is float32 \[16, 3, 8\]; it takes H = 2 heads as logits has, or 1"),
        (dict(value=torch.zeros(16, 2, 0)), r"value is float32 \[16, 2, 0\]; it takes H and D of at least 1"),
        (dict(value=torch.zeros(16, 8)), r"value is float32 \[16, 8\]; it takes .*\[T, H, D\] or \[T, 1, D\]"),
        (dict(value=torch.zeros(16, 2, 8, device="meta")), "value is on meta; it takes cpu"),
        (dict(boxes=torch.zeros(2, 5)), r"boxes is float32 \[2, 5\]; it takes float32 \[R, 4\]"),
        (dict(image_index=torch.tensor([0, 2])), r"image_index holds 2; it takes \[0, 2\)"),
        (dict(boxes=torch.tensor([[0, 0, 1, 1], [0, 0, torch.inf, 1]])), r"boxes\[1\] is .*inf.*finite"),
    ],
)  # fmt: skip
def test_faults_name_what_they_got(change, message):
    good = problem([(3, 4), (2, 2)], [[0, 0, 2, 2], [0, 0, 1, 1]], [0, 1])._asdict()
    with pytest.raises(ValueError, match=message):
        region_pool(**{**good, **change})


@pytest.mark.parametrize("backend", BACKENDS)
def test_faults_that_the_host_can_not_see_read_nothing(backend):
    """On a device neither indices nor boxes are checked; the region then meets nothing."""
    p = problem([(3, 4)], [[0, 0, 2, 2]] * 4, [0, -1, 2**40, 0])
    p.boxes[3, 2] = torch.inf
    output, lse = CANDIDATES["region_pool"][backend].forward(*p.raw(True))
    assert output[0].all() and not output[1:].any() and (lse[1:] == -torch.inf).all()


@needs_native
def test_the_raw_operator_refuses_tokens_of_another_layout():
    logits, value, *rest = problem([(3, 4)], [[0, 0, 4, 3]], [0]).raw(False)
    with pytest.raises(ValueError, match="value has 11 rows; it takes 12, the layout's tokens"):
        operator.registered(logits[1:], value[1:], *rest)
