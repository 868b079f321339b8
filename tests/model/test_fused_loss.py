"""The answers' losses: those of their logits, and Liger's where it applies."""

import pytest
import torch
import torch.nn.functional as F

from granvit.model import fused_loss, granvit
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


def test_the_losses_are_those_of_the_logits(scored):
    model, batch, image, region = scored
    losses = model.answer_losses(batch, image, region)
    logits, targets = model.answer_logits(batch, image, region)
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-5)


def test_under_autocast_it_is_still_float32(scored):
    model, batch, image, region = scored
    with torch.autocast("cpu", torch.bfloat16):
        assert model.answer_losses(batch, image, region).dtype == torch.float32


def plain(hidden, weight, targets, bias=None, reduction="mean"):
    """Liger's signature, as far as it is used."""
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction=reduction)


def test_the_fused_loss_is_taken_where_there_are_no_location_rows(scored, monkeypatch):
    model, batch, image, region = scored
    expected = model.answer_losses(batch, image, region)
    grads = gradients(model, expected)
    calls = []

    def fused(*args, **options):
        calls.append(options)
        return plain(*args, **options)

    monkeypatch.setattr(granvit, "can_fuse", lambda *_: True)
    monkeypatch.setattr(fused_loss, "liger_fused_linear_cross_entropy", fused)
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
    assert not fused_loss.can_fuse(torch.zeros(2, 48), table)
    on_gpu = type("OnGPU", (), {"is_cuda": True, "__len__": lambda self: 2})()
    monkeypatch.setattr(fused_loss, "liger_fused_linear_cross_entropy", plain)
    assert fused_loss.can_fuse(on_gpu, table)
    assert not fused_loss.can_fuse(on_gpu, torch.nn.Sequential(table))  # something was put around it
    monkeypatch.setattr(fused_loss, "liger_fused_linear_cross_entropy", None)
    assert not fused_loss.can_fuse(on_gpu, table)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_liger_s_own(trained, bias):
    """In Triton's interpreter where there is no GPU."""
    pytest.importorskip("liger_kernel", reason="the extra granvit[liger] is not installed")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = torch.nn.Linear(16, 60, bias=bias, device=device).requires_grad_(trained)
    hidden = torch.randn(7, 16, device=device, requires_grad=True)
    targets = torch.randint(0, 50, (7,), device=device)
    losses = fused_loss.fused_cross_entropy(hidden, table, 50, targets)
    leaves = [hidden, *(table.parameters() if trained else ())]
    expected = F.cross_entropy(table(hidden)[:, :50], targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    weights = torch.linspace(0, 1, 7, device=device)
    gradients = (torch.autograd.grad(one, leaves, weights) for one in (losses, expected))
    for gradient, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-5)
