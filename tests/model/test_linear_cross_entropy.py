"""The answers' losses: those of their logits, in slices of the vocabulary too, and Liger's where it applies."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from granvit.model import linear_cross_entropy as lce
from granvit.questions.packing import pack_questions
from granvit.questions.prompts import questions

TASKS = ("global_caption", "bbox2caption", "caption2bbox")


@pytest.fixture(params=["text", "bins"])
def scored(request, tiny, samples):
    """A model, with location rows or without, and what its loss takes."""
    model, processor = tiny(box_format=request.param)
    asked = [questions(sample, TASKS, "text", request.param) for sample in samples]
    batch = pack_questions(samples, asked, processor, 1024)
    features, layout = model.encode(batch.images)
    regions = model.region_embeds(features, layout, batch.boxes, batch.box_image_index)
    return model, batch, model.image_embeds(features, layout).detach(), regions.detach()


def gradients(model, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a weighted sum."""
    model.zero_grad()
    (losses * torch.linspace(0, 1, len(losses))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sliced", [False, True])
def test_the_losses_are_those_of_the_logits(scored, monkeypatch, sliced):
    model, batch, image, region = scored
    if sliced:
        monkeypatch.setattr(lce, "CHUNK", 4 * 100 * len(batch.targets))
        monkeypatch.setattr(lce, "logits_of", None)
    losses = model.answer_losses(batch, image, region)
    grads = gradients(model, losses)
    monkeypatch.undo()
    logits, targets = model.answer_logits(batch, image, region)
    expected = F.cross_entropy(logits, targets, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    exact = gradients(model, expected)
    assert grads.keys() == exact.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, exact[name], msg=name)


def test_under_autocast_it_is_still_float32(scored):
    model, batch, image, region = scored
    with torch.autocast("cpu", torch.bfloat16):
        assert model.answer_losses(batch, image, region).dtype == torch.float32


def problem(dtype=torch.float64, bias=True, trained=True, more=11):
    """What linear_cross_entropy takes, with a table of more rows than are used, and the tensors that learn."""
    torch.manual_seed(0)
    hidden = torch.randn(23, 16, dtype=dtype, requires_grad=True)
    table = nn.Linear(16, 60, bias=bias, dtype=dtype).requires_grad_(trained)
    own = torch.randn(more, 16, dtype=dtype, requires_grad=True)
    leaves = [hidden, *([own] if more else ()), *(table.parameters() if trained else ())]
    return (hidden, table, 50, own, torch.randint(0, 50 + more, (23,))), leaves


def graded(losses: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Losses, their gradients where each is weighed by another number, and the gradients of those weights."""
    weights = torch.linspace(0, 1, len(losses), dtype=losses.dtype, requires_grad=True)
    return [losses, *torch.autograd.grad((weights * losses).sum(), [*leaves, weights])]


@pytest.mark.parametrize("wrong", [-100, -1, 61])
def test_in_slices_a_target_that_is_no_row_is_never_a_finite_loss(monkeypatch, wrong):
    (*arguments, targets), _ = problem()
    targets[3] = wrong
    monkeypatch.setattr(lce, "CHUNK", 8 * 7 * len(targets))
    losses = lce.linear_cross_entropy(*arguments, targets)
    assert losses[3].isnan() and losses.isfinite().sum() == len(targets) - 1


@pytest.mark.parametrize("step", [1, 7, 49])
@pytest.mark.parametrize(("bias", "trained", "more"), [(True, True, 11), (False, False, 11), (False, True, 0)])
def test_slices_of_any_size_are_exact(monkeypatch, step, bias, trained, more):
    arguments, leaves = problem(bias=bias, trained=trained, more=more)
    expected = graded(lce.linear_cross_entropy(*arguments), leaves)
    monkeypatch.setattr(lce, "CHUNK", 8 * step * 23)
    monkeypatch.setattr(lce, "logits_of", None)  # it is not called
    for value, exact in zip(graded(lce.linear_cross_entropy(*arguments), leaves), expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("autocast", [True, False])
def test_slices_in_bfloat16_err_no_more_than_whole_logits(monkeypatch, autocast):
    """autocast: of float32 weights; otherwise all is bfloat16, as FSDP gathers it."""
    dtype = torch.float32 if autocast else torch.bfloat16
    (hidden, table, rows, own, targets), leaves = problem(dtype)

    def run() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = lce.linear_cross_entropy(hidden, table, rows, own, targets)
        assert losses.dtype == torch.float32
        return graded(losses, leaves)

    whole = run()
    monkeypatch.setattr(lce, "CHUNK", 4 * 7 * 23)
    sliced = run()
    with torch.no_grad():
        rounded = [leaf.bfloat16().double().requires_grad_() for leaf in leaves]
    hidden, own, weight, bias = rounded
    logits = torch.cat([F.linear(hidden, weight, bias)[:, :rows], hidden @ own.T], 1)
    exact = graded(F.cross_entropy(logits, targets, reduction="none"), rounded)
    for ours, plain, right in zip(sliced, whole, exact, strict=True):
        assert ours.dtype == plain.dtype
        off, allowed = ((value.double() - right).norm() for value in (ours, plain))
        assert off <= 2 * allowed


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("trained", [True, False])
def test_large_logits_never_exist_whole(trained):
    """Of 3,000 tokens and 152,000 rows they are 1.8 GB; a trained table's gradient is as large as the table."""
    with torch.device("meta"):
        hidden = torch.empty(3000, 32, dtype=torch.bfloat16, requires_grad=True)
        table = nn.Linear(32, 152_000, bias=False, dtype=torch.bfloat16).requires_grad_(trained)
        own, targets = nn.Parameter(torch.empty(1000, 32)), torch.empty(3000, dtype=torch.long)
        with Largest() as largest:
            lce.linear_cross_entropy(hidden, table, 151_000, own, targets).sum().backward()
    assert 0.9 * lce.CHUNK < largest.bytes <= lce.CHUNK
    assert hidden.grad.shape == hidden.shape and own.grad.dtype == torch.float32
    assert (table.weight.grad is not None) == trained


def plain(hidden, weight, targets, bias=None, reduction="mean"):
    """Liger's signature, as far as it is used."""
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction=reduction)


def test_the_lce_is_taken_where_there_are_no_location_rows(scored, monkeypatch):
    model, batch, image, region = scored
    expected = model.answer_losses(batch, image, region)
    grads = gradients(model, expected)
    calls = []

    def fused(*args, **options):
        calls.append(options)
        return plain(*args, **options)

    monkeypatch.setattr(lce, "can_fuse", lambda *_: True)
    monkeypatch.setattr(lce, "liger_fused_linear_cross_entropy", fused)
    loss = model.answer_losses(batch, image, region)
    torch.testing.assert_close(loss, expected)
    ours = gradients(model, loss)
    assert ours.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(ours[name], grad, msg=name)
    assert len(calls) == (0 if len(model.locations.output) else 1)


def test_nothing_is_fused_without_liger_or_without_a_gpu(scored, monkeypatch):
    model, *_ = scored
    table = model.llm.get_output_embeddings()
    assert not lce.can_fuse(torch.zeros(2, 48), table)
    on_gpu = type("OnGPU", (), {"is_cuda": True, "__len__": lambda self: 2})()
    monkeypatch.setattr(lce, "liger_fused_linear_cross_entropy", plain)
    assert lce.can_fuse(on_gpu, table)
    assert not lce.can_fuse(on_gpu, nn.Sequential(table))  # something was put around it
    monkeypatch.setattr(lce, "liger_fused_linear_cross_entropy", None)
    assert not lce.can_fuse(on_gpu, table)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_liger_s_own(trained, bias):
    """In Triton's interpreter where there is no GPU."""
    pytest.importorskip("liger_kernel", reason="the extra granvit[liger] is not installed")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = nn.Linear(16, 60, bias=bias, device=device).requires_grad_(trained)
    hidden = torch.randn(7, 16, device=device, requires_grad=True)
    targets = torch.randint(0, 50, (7,), device=device)
    losses = lce._liger(hidden, table, 50, targets)
    leaves = [hidden, *(table.parameters() if trained else ())]
    expected = F.cross_entropy(table(hidden)[:, :50], targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    weights = torch.linspace(0, 1, 7, device=device)
    gradients = (torch.autograd.grad(one, leaves, weights) for one in (losses, expected))
    for gradient, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-5)
