"""region_attention: the reference against torch's own attention, the C++ kernel against the reference."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import passes_with
from regions import DTYPES, EVERY_KIND, MEETS_NOTHING, check_error_rule, drawn_regions, meets, redrawn, same, shares
from torch import Tensor

from granvit_kernels import PackedLayout, native, region_attention
from granvit_kernels.ops.region_attention import cpu, reference
from granvit_kernels.ops.region_attention.op import operator
from granvit_kernels.regions import covered_cells

needs_native = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


class Problem(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    layout: PackedLayout
    boxes: Tensor
    image_index: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        return self._replace(query=self.query.to(dtype), key=self.key.to(dtype), value=self.value.to(dtype))

    def raw(self, coverage: bool, scale: float = 0.3) -> tuple:
        """Arguments of a backend's forward."""
        layout = self.layout
        return (*self[:3], layout.grids, layout.cu_seqlens, self.boxes, self.image_index, scale, coverage)


def problem(
    grids, boxes, image_index, queries=3, heads=2, size=8, shared=False, dtype=torch.float32, seed=0
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    layout = PackedLayout.from_grids(grids)
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    shape = (queries, heads, size) if shared else (len(boxes), queries, heads, size)
    tokens = (layout.num_tokens, heads, size)
    tensors = [torch.randn(s, generator=generator).to(dtype) for s in (shape, tokens, tokens)]
    return Problem(*tensors, layout, boxes, torch.tensor(image_index, dtype=torch.int64))


def every_kind(**options) -> Problem:
    return problem([(3, 4), (11, 9), (1, 1)], EVERY_KIND * 3, [0] * 9 + [1] * 9 + [2] * 9, **options)


def gradients(p: Problem, seed: int = 1, **options) -> list[Tensor]:
    """output, lse and the gradients of query, key and value, for fixed random gradients of both outputs."""
    p = p._replace(**{n: getattr(p, n).detach().clone().requires_grad_() for n in ("query", "key", "value")})
    output, lse = region_attention(*p, return_lse=True, **options)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (output, lse)]
    found = torch.autograd.grad((output, lse), p[:3], upstream)
    return [output.detach(), lse.detach(), *found]


# ---- the reference, against what we did not write ----
@pytest.mark.parametrize("coverage", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_reference_equals_masked_attention_of_torch(shared, coverage):
    p = every_kind(shared=shared, dtype=torch.float64)
    mask, share = meets(*p[3:]), shares(*p[3:])
    rows = mask.any(1)
    assert rows.tolist() != [True] * len(rows)
    output, lse, *found = gradients(p, coverage=coverage)

    query, key, value = (t.detach().clone().requires_grad_() for t in p[:3])
    each = query.expand(len(p.boxes), *query.shape[-3:])[rows].transpose(1, 2)
    bias = (
        share[rows].log() if coverage else torch.zeros_like(share[rows]).masked_fill(~mask[rows], -torch.inf)
    )
    count = len(each)
    keys, values = (t.transpose(0, 1).expand(count, -1, -1, -1) for t in (key, value))
    expected = F.scaled_dot_product_attention(each, keys, values, attn_mask=bias[:, None, None]).transpose(
        1, 2
    )
    logits = each @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5 + bias[:, None, None]
    expected_lse = logits.logsumexp(-1).transpose(1, 2)
    torch.testing.assert_close(output[rows], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(lse[rows], expected_lse, rtol=1e-6, atol=1e-9)
    assert not output[~rows].any() and (lse[~rows] == -torch.inf).all()

    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator).to(t.dtype)[rows] for t in (output, lse)]
    wanted = torch.autograd.grad((expected, expected_lse), (query, key, value), upstream)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("coverage", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(shared, coverage):
    p = problem([(2, 3), (1, 2)], [EVERY_KIND[0], EVERY_KIND[3], EVERY_KIND[5]], [0, 1, 0], 2, 2, 3, shared)
    p = p.to(torch.float64)

    def both(query, key, value):
        output, lse = region_attention(query, key, value, *p[3:], coverage=coverage, return_lse=True)
        return output, lse[:2]  # the third region's is -inf

    assert torch.autograd.gradcheck(both, tuple(t.requires_grad_() for t in p[:3]))


@pytest.mark.parametrize("coverage", [False, True])
def test_backward_of_the_reference_equals_autograd(coverage):
    p = every_kind(dtype=torch.float64)
    inputs = [t.requires_grad_() for t in p[:3]]
    output, lse = reference.forward(*p.raw(coverage))
    upstream = torch.randn_like(output), torch.randn_like(lse)
    expected = torch.autograd.grad((output, lse), inputs, upstream)
    with torch.no_grad():
        query, key, value, *rest = p.raw(coverage)
        found = reference.backward(*upstream, query, key, value, output, lse, *rest)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_covered_cells_at_the_edges():
    assert covered_cells([0.0, 0.0, 1.0, 1.0], 5, 5) == (0, 1, 0, 1)
    assert covered_cells([0.999, 1.0, 1.001, 2.5], 5, 5) == (1, 3, 0, 2)
    assert covered_cells([-9.0, -9.0, 1e30, 9.0], 4, 5) == (0, 4, 0, 5)
    assert covered_cells([5.0, 0.0, 6.0, 1.0], 5, 5) == (0, 0, 0, 0)
    assert covered_cells([float("nan"), 0.0, 6.0, 1.0], 5, 5) == (0, 0, 0, 0)


def test_coverage_tells_boxes_within_a_cell_apart_from_their_place():
    left, right = [0.75, 0.0, 1.25, 1.0], [0.75, 0.0, 1.75, 1.0]
    p = problem([(1, 2)], [left, right], [0, 0], shared=True)
    plain, covered = region_attention(*p), region_attention(*p, coverage=True)
    assert torch.equal(plain[0], plain[1]) and not torch.allclose(covered[0], covered[1])
    # Two tiny shares, whose product is no float32 any more, still have a logarithm.
    tiny = p._replace(boxes=torch.tensor([[0.0, 0.0, 1e-30, 1e-30]]).expand(2, 4))
    assert torch.isfinite(region_attention(*tiny, coverage=True, return_lse=True)[1]).all()


# ---- the C++ kernel, against the reference ----
def within_the_rule(coverage: bool, *problems: Problem) -> None:
    """Error at most twice that of plain PyTorch in this dtype, and a little (check_error_rule), over all `problems`,
    which are alike but for their numbers."""
    dtype = problems[0].query.dtype
    names = ("output", "lse", "grad query", "grad key", "grad value")
    compared = [three_ways(p, coverage) for p in problems]
    lse = torch.stack([exact[1] for _, _, exact in compared])
    for i, name in enumerate(names):
        ours, plain, exact = (torch.stack([results[way][i] for results in compared]) for way in range(3))
        check_error_rule(name, ours, plain, exact, torch.float32 if name == "lse" else dtype, lse)


def three_ways(p: Problem, coverage: bool) -> list[tuple[Tensor, ...]]:
    """Outputs and gradients: ours, plain PyTorch's, float64's."""
    query, key, value, *rest = p.raw(coverage)
    wide = [t.double() for t in (query, key, value)]
    generator = torch.Generator().manual_seed(5)
    output, lse = cpu.forward(query, key, value, *rest)
    upstream = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (output, lse)]
    results = []
    for backend, q, k, v in ((cpu, *p[:3]), (reference, *p[:3]), (reference, *wide)):
        out, log = backend.forward(q, k, v, *rest)
        grads = backend.backward(upstream[0].to(q.dtype), upstream[1].to(log.dtype), q, k, v, out, log, *rest)
        results.append((out, log, *grads))
    return results


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 5, 16, 33, 64, 72, 128])
@pytest.mark.parametrize("queries", [1, 2, 4, 7, 64])
def test_kernel_keeps_the_error_rule(queries, size, dtype):
    within_the_rule(size % 2 == 0, every_kind(queries=queries, size=size, heads=3, dtype=dtype))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_kernel_keeps_the_error_rule_on_a_real_size(shared, dtype):
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(24, 2, 2, generator=generator).mul(40).sort(1).values
    boxes = corners.flatten(1).tolist()
    p = problem([(32, 32), (24, 40)], boxes, [i % 2 for i in range(24)], 4, 4, 64, shared, dtype)
    within_the_rule(True, p)


@st.composite
def problems(draw):
    p = problem(
        *draw(drawn_regions()),
        queries=draw(st.integers(1, 9)), heads=draw(st.integers(1, 3)), size=draw(st.integers(1, 40)),
        shared=draw(st.booleans()), dtype=draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    return p, draw(st.booleans())


@needs_native
@settings(max_examples=60, deadline=None)
@given(problems())
def test_kernel_keeps_the_error_rule_on_anything(drawn):
    p, coverage = drawn
    within_the_rule(coverage, *redrawn(p, "query", "key", "value"))


@needs_native
@settings(max_examples=40, deadline=None)
@given(problems())
def test_reads_only_what_boxes_meet(drawn):
    """NaN everywhere else changes nothing, and gradients there are zero."""
    p, coverage = drawn
    met = meets(*p[3:]).any(0)
    poisoned = p._replace(
        key=p.key.masked_fill(~met[:, None, None], torch.nan),
        value=p.value.masked_fill(~met[:, None, None], torch.nan),
    )
    clean, found = gradients(p, coverage=coverage), gradients(poisoned, coverage=coverage)
    assert same(clean, found)
    assert not found[3][~met].any() and not found[4][~met].any()


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_box_without_cells_gives_zeros_and_no_gradient(dtype, backend, monkeypatch):
    monkeypatch.setenv("GRANVIT_KERNELS_BACKEND", backend)
    p = every_kind(dtype=dtype)
    output, lse, grad_query, *_ = gradients(p)
    assert lse.dtype == torch.float32
    for first in (0, 9):
        nothing = slice(first + MEETS_NOTHING.start, first + MEETS_NOTHING.stop)
        assert not output[nothing].any() and not grad_query[nothing].any()
        assert (lse[nothing] == -torch.inf).all()
    assert torch.isfinite(lse[:5]).all()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_of_an_infinite_gradient_does_not_leak(dtype):
    """Rows of nan in one region's output stay in that region, and in the tokens that it meets."""
    p = problem([(4, 4)], [[0, 0, 1, 3], [2, 0, 4, 4]], [0, 0], queries=3, dtype=dtype)
    key = p.key.clone()
    key[0] = torch.nan
    output, lse, grad_query, grad_key, grad_value = gradients(p._replace(key=key))
    met = meets(*p[3:])
    assert output[0].isnan().all() and torch.isfinite(output[1]).all() and torch.isfinite(grad_query[1]).all()
    assert torch.isfinite(grad_key[~met[0]]).all() and torch.isfinite(grad_value[~met[0]]).all()


@needs_native
def test_large_logits_do_not_overflow():
    p = every_kind(queries=4)
    p = p._replace(query=p.query * 1e4, key=p.key * 1e3)
    found = gradients(p)
    assert all(torch.isfinite(t[:5]).all() for t in found)
    exact = gradients(p.to(torch.float64))
    for ours, theirs in zip(found, exact, strict=True):
        largest = theirs[torch.isfinite(theirs)].abs().max()
        assert largest > 0
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=float(1e-4 * largest))


BACKENDS = [pytest.param(cpu, marks=needs_native, id="cpu"), pytest.param(reference, id="reference")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [1, 4])
def test_logits_of_minus_infinity_weigh_nothing(queries, backend):
    """Also where all of the first tile's are: the running maximum is -inf then."""
    p = problem([(1, 16)], [[0, 0, 16, 1]], [0], queries, 1, 1)
    p.query.fill_(1.0), p.key.fill_(0.0)
    p.key[:8] = -torch.inf
    raw = p.raw(False, scale=1.0)
    output, lse = backend.forward(*raw)
    torch.testing.assert_close(output, p.value[8:].mean(0).expand_as(output))
    torch.testing.assert_close(lse, torch.full_like(lse, 8.0).log())
    _, grad_key, grad_value = backend.backward(
        torch.ones_like(output), torch.ones_like(lse), *raw[:3], output, lse, *raw[3:]
    )
    assert not grad_key[:8].any() and torch.isfinite(grad_key).all()
    expected = torch.tensor([0.0, queries / 8]).repeat_interleave(8)
    torch.testing.assert_close(grad_value.flatten(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_finite_logit_there_is_no_output(backend):
    """As torch's softmax has it; and a NaN stays one."""
    p = problem([(1, 16)], [[0, 0, 16, 1]], [0], 1, 1, 1)
    p.query.fill_(1.0), p.key.fill_(-torch.inf)
    output, lse = backend.forward(*p.raw(False, scale=1.0))
    assert output.isnan().all() and (lse == -torch.inf).all()
    p.key[3] = torch.nan
    output, lse = backend.forward(*p.raw(False, scale=1.0))
    assert output.isnan().all() and lse.isnan().all()


# ---- the same bits ----
@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "reference"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_bits_over_runs_and_threads(dtype, shared, backend, threads, monkeypatch):
    monkeypatch.setenv("GRANVIT_KERNELS_BACKEND", backend)
    p = problem(
        [(30, 20), (9, 31)], [[0.3, 1, 25, 22.5], [2, 2, 9, 9], [1, 0, 17, 31]] * 6, [0, 1, 0] * 6,
        queries=5, heads=6, size=40, shared=shared, dtype=dtype,
    )  # fmt: skip
    threads(1)
    first = gradients(p, coverage=True)
    for count in (1, 2, 3, 5):
        threads(count)
        assert same(first, gradients(p, coverage=True)), f"{count} threads"


@needs_native
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set(isa):
    error_rule = "error_rule_on_a_real_size or (error_rule and (1-33 or 4-64 or 7-72 or 12-1))"
    pool = str(Path(__file__).with_name("test_region_pool.py"))
    passes_with(isa, f"{error_rule} or equal_bits or does_not_leak", __file__, pool)


# ---- how it meets torch ----
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared, dtype):
    p = every_kind(shared=shared, dtype=dtype)
    inputs = [t.requires_grad_() for t in p[:3]]
    torch.library.opcheck(operator.registered, (*inputs, *p.raw(True)[3:]))
    empty = problem([], [], [], shared=shared, dtype=dtype)
    torch.library.opcheck(operator.registered, empty.raw(False))


def test_compile_fullgraph_with_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(region_attention, fullgraph=True, dynamic=True)
    for grids, count, shared in (([(3, 4)], 2, True), ([(5, 6), (2, 9)], 5, True), ([(7, 3)] * 3, 4, False)):
        p = problem(grids, (EVERY_KIND * 2)[:count], [i % len(grids) for i in range(count)], shared=shared)
        mine, theirs = (
            [t.clone().requires_grad_() for t in p[:3]] for _ in range(2)
        )  # the two calls' inputs
        eager = region_attention(*mine, *p[3:], coverage=True, return_lse=True)
        traced = compiled(*theirs, *p[3:], coverage=True, return_lse=True)
        assert same(list(eager), list(traced))
        upstream = [torch.randn_like(t) for t in eager]
        assert same(torch.autograd.grad(eager, mine, upstream), torch.autograd.grad(traced, theirs, upstream))


def test_compiled_call_still_checks_values():
    compiled = torch.compile(region_attention, fullgraph=True)
    p = problem([(3, 4)], [[0, 0, float("nan"), 1]], [0])
    with pytest.raises(ValueError, match="boxes"):
        compiled(*p)


@pytest.mark.parametrize("regions", [0, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_empty_inputs(shared, regions):
    if regions:  # tokens and images, but no region
        p = problem([(2, 3)] * regions, [], [], shared=shared)
    else:
        p = problem([], [], [], shared=shared)
    output, lse, *found = gradients(p)
    assert output.shape == (0, 3, 2, 8) and lse.shape == (0, 3, 2)
    assert [g.shape for g in found] == [t.shape for t in p[:3]] and not any(g.any() for g in found)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "reference"])
def test_no_region_of_an_expanded_query(backend, monkeypatch):
    """No region counts as contiguous with stride 0, which says "shared" to the kernel: it wrote past the end."""
    monkeypatch.setenv("GRANVIT_KERNELS_BACKEND", backend)
    p = problem([(2, 3)], [], [], shared=True)
    query = p.query.requires_grad_()
    output = region_attention(query.expand(0, -1, -1, -1), *p[1:])
    (gradient,) = torch.autograd.grad(output.sum(), query)
    assert output.shape == (0, 3, 2, 8) and not gradient.any()


def test_non_contiguous_inputs_and_index_types():
    p = every_kind(heads=4, size=16)
    expected = gradients(p)
    fused = torch.stack([p.key, p.value], 1)  # [T, 2, H, D], as one projection gives them
    key, value = fused.unbind(1)
    query = p.query.transpose(0, 2).contiguous().transpose(0, 2)
    turned = p.key.transpose(1, 2).contiguous().transpose(1, 2)  # last dimension not dense
    boxes = p.boxes.T.contiguous().T
    assert not any(t.is_contiguous() for t in (key, value, query, turned, boxes))
    index = p.image_index.int()
    for k in (key, turned):
        output, lse = region_attention(query, k, value, p.layout, boxes, index, return_lse=True)
        assert same([output, lse], expected[:2])
        inputs = [t.detach().requires_grad_() for t in (query, k, value)]
        outputs = region_attention(*inputs, p.layout, boxes, index, return_lse=True)
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(t.shape, generator=generator) for t in outputs]
        strided = [torch.repeat_interleave(u, 2, -1)[..., ::2] for u in upstream]
        assert not any(u.is_contiguous() for u in strided)
        assert same(list(torch.autograd.grad(outputs, inputs, strided)), expected[2:])


def test_shared_query_equals_its_copies():
    p = every_kind(shared=True)
    copies = p._replace(query=p.query.expand(len(p.boxes), -1, -1, -1))
    shared, each = gradients(p), gradients(copies)
    assert same(shared[:2], each[:2]) and same(shared[3:], each[3:])
    torch.testing.assert_close(shared[2], each[2].sum(0))


@pytest.mark.parametrize("missing", ["output", "lse", "query", "key", "value"])
def test_gradient_of_a_part(missing):
    p = every_kind()
    full = gradients(p)
    inputs = [
        t.clone().requires_grad_(name != missing)
        for name, t in zip(("query", "key", "value"), p, strict=False)
    ]
    output, lse = region_attention(*inputs, *p[3:], return_lse=True)
    if missing in ("output", "lse"):
        finite = torch.isfinite(lse.detach())
        loss = lse[finite].sum() if missing == "output" else output.sum()
        loss.backward()
        assert inputs[0].grad.any() and inputs[1].grad.any()
        assert bool(inputs[2].grad.any()) == (missing == "lse")
        return
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator) for t in (output, lse)]
    wanted = [g for g, t in zip(full[2:], inputs, strict=True) if t.requires_grad]
    found = torch.autograd.grad((output, lse), [t for t in inputs if t.requires_grad], upstream)
    assert same(list(found), wanted)


def test_second_derivative_is_refused():
    p = every_kind()
    query = p.query.clone().requires_grad_()
    output = region_attention(query, *p[1:])
    (first,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_autocast_casts_to_its_dtype():
    p = every_kind()
    expected = gradients(p.to(torch.bfloat16))
    inputs = [p.query.clone().requires_grad_(), p.key.bfloat16(), p.value.clone().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        output, lse = region_attention(*inputs, *p[3:], return_lse=True)
    assert output.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert same([output, lse], expected[:2])
    output.float().sum().backward()
    assert inputs[0].grad.dtype == torch.float32 and inputs[0].grad.any()
    with torch.autocast("cpu", torch.bfloat16):
        assert region_attention(*p.to(torch.float64)).dtype == torch.float64


def test_scale():
    p = every_kind()
    assert torch.equal(region_attention(*p), region_attention(*p, scale=8**-0.5))
    torch.testing.assert_close(
        region_attention(*p, scale=0.7),
        region_attention(p.query * 7, *p[1:], scale=0.1),
        rtol=1e-4,
        atol=1e-5,
    )


# ---- faults ----
GOOD = dict(grids=[(3, 4), (2, 2)], boxes=[[0, 0, 2, 2], [0, 0, 1, 1]], image_index=[0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scale=torch.nan), "scale is nan; it takes a finite number or None"),
        (dict(scale=-torch.inf), "scale is -inf; it takes a finite number"),
        (dict(scale="a"), "scale is 'a'; it takes a finite number"),
        (dict(query=torch.zeros(3, 2, 8).to(torch.float8_e5m2)), "query is float8_e5m2 .*; it takes float32, bfloat16"),
        (dict(key=torch.zeros(16, 2, 8, dtype=torch.int64)), "key is int64 .*; it takes float32, bfloat16"),
        (dict(query=torch.zeros(3, 8)), r"query is float32 \[3, 8\]; it takes .*\[R, K, H, D\] or"),
        (dict(query=torch.zeros(3, 0, 8)), r"query is float32 \[3, 0, 8\]; .*at least 1"),
        (dict(query=torch.zeros(3, 2, 8, dtype=torch.int64)), r"query is int64 .*it takes float32, bfloat16"),
        (dict(query=torch.zeros(5, 3, 2, 8)), r"query is .*\[5, 3, 2, 8\]; .*R = 2, the number of boxes"),
        (dict(query=[0.5]), "query is a list; it takes a tensor"),
        (dict(key=torch.zeros(15, 2, 8)), r"key is float32 \[15, 2, 8\]; it takes .*T = 16"),
        (dict(key=torch.zeros(16, 16)), r"key is float32 \[16, 16\]; it takes .*\[T, H, D\]"),
        (dict(key=torch.zeros(16, 3, 8)), r"key is float32 \[16, 3, 8\]; it takes query's dtype, H and D"),
        (dict(value=torch.zeros(16, 2, 9)), r"value is float32 \[16, 2, 9\]; it takes query's dtype, H"),
        (dict(value=torch.zeros(16, 2, 8).half()), r"value is float16 .*query is float32"),
        (dict(boxes=torch.zeros(2, 5)), r"boxes is float32 \[2, 5\]; it takes float32 \[R, 4\]"),
        (dict(boxes=torch.zeros(2, 4).double()), r"boxes is float64 \[2, 4\]; it takes float32"),
        (dict(image_index=torch.zeros(3, dtype=torch.int64)), r"image_index is int64 \[3\]; .*\[2\]"),
        (dict(image_index=torch.zeros(2)), r"image_index is float32 \[2\]; it takes int32 or int64"),
        (dict(image_index=torch.tensor([0, 2])), r"image_index holds 2; it takes \[0, 2\)"),
        (dict(image_index=torch.tensor([-1, 0])), r"image_index holds -1; it takes \[0, 2\)"),
        (dict(boxes=torch.tensor([[0, 0, 1, 1], [0, 0, torch.inf, 1]])), r"boxes\[1\] is .*inf.*finite"),
        (dict(boxes=torch.tensor([[0, torch.nan, 1, 1], [0, 0, 1, 1]])), r"boxes\[0\] is .*nan.*finite"),
        (dict(key=torch.zeros(16, 2, 8, device="meta")), r"key is on meta; it takes cpu"),
    ],
)  # fmt: skip
def test_faults_name_what_they_got(change, message):
    arguments = {**problem(**GOOD, shared=True)._asdict(), **change}
    with pytest.raises(ValueError, match=message):
        region_attention(**arguments)


def test_the_kernel_says_why_it_can_not_run(monkeypatch):
    monkeypatch.setenv("GRANVIT_KERNELS_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="forces cpu for region_attention.*not torch.float64"):
        region_attention(*problem(**GOOD, dtype=torch.float64))


def test_an_index_without_an_image_reads_nothing_where_the_host_can_not_look():
    """On a device indices are not checked; every backend then treats the region as one that meets nothing."""
    p = every_kind()._replace(image_index=torch.tensor([-1, 3, 2**40] * 9))
    for backend in (reference, cpu) if native.why_not() is None else (reference,):
        output, lse = backend.forward(*p.raw(False))
        assert not output.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("coverage", [False, True])
def test_a_box_that_is_not_finite_reads_nothing_where_the_host_can_not_look(coverage, backend):
    boxes = [[0.0, 0.0, 2.0, 2.0] for _ in range(8)]
    for i, box in enumerate(boxes):
        box[i % 4] = [-torch.inf, torch.nan][i // 4] if i % 4 < 2 else [torch.inf, torch.nan][i // 4]
    p = problem([(3, 4)], [*boxes, [0, 0, 2, 2]], [0] * 9)
    output, lse = backend.forward(*p.raw(coverage))
    assert not output[:8].any() and (lse[:8] == -torch.inf).all() and torch.isfinite(lse[8]).all()


@needs_native
def test_the_raw_operator_refuses_tokens_of_another_layout():
    p = problem([(3, 4)], [[0, 0, 4, 3]], [0])
    query, key, value, *rest = p.raw(False)
    with pytest.raises(ValueError, match="key has 11 rows; it takes 12, the layout's tokens"):
        operator.registered(query, key[1:], value[1:], *rest)


# ---- who may see the call ----
def test_meta_tensors_and_transforms():
    p = every_kind()
    meta = [t.to("meta") for t in p]
    assert region_attention(*meta).shape == p.query.shape
    expected = gradients(p)[0]
    mapped = torch.func.vmap(lambda query: region_attention(query, *p[1:]))(torch.stack([p.query, p.query]))
    assert torch.equal(mapped[1], expected)
    found = torch.func.grad(lambda key: region_attention(p.query, key, *p[2:]).square().sum())(p.key)
    key = p.key.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(region_attention(p.query, key, *p[2:]).square().sum(), key)
    assert torch.equal(found, wanted)


def test_forward_mode_is_refused():
    p = every_kind()
    with pytest.raises(NotImplementedError, match="region_attention has no forward-mode derivative"):
        torch.func.jvp(lambda value: region_attention(p.query, p.key, value, *p[3:]), (p.value,), (p.value,))
