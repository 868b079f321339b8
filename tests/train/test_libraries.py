"""Libraries that no machine of ours has, by stand-ins that keep to their contracts, and why they are not used."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from granvit.model import packed_attention
from granvit.train.optimizer import make_optimizer
from granvit.train.stages import Stage
from granvit_kernels import PackedLayout, libraries

STAGE = Stage("pretrain", train=("encoder", "projector"), tasks=("bbox2caption",), learning_rate=1e-2)


class FusedAdam(torch.optim.Optimizer):
    """In plain PyTorch what apex's does on a GPU: one step count a group, no argument of zero_grad."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        assert adam_w_mode is True

    def zero_grad(self):
        raise AssertionError("apex's takes no set_to_none")

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert isinstance(group["step"], int)
            (b1, b2), rate = group["betas"], group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean, square = (self.state[parameter][name] for name in ("exp_avg", "exp_avg_sq"))
                mean.lerp_(parameter.grad, 1 - b1)
                square.lerp_(parameter.grad.square(), 1 - b2)
                parameter.mul_(1 - rate * group["weight_decay"])
                root = (square / (1 - b2 ** group["step"])).sqrt() + group["eps"]
                parameter.sub_(rate / (1 - b1 ** group["step"]) * mean / root)


@pytest.fixture
def apex(monkeypatch):
    """A function that turns apex on and off."""
    module = ModuleType("apex.optimizers")
    module.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    monkeypatch.setattr(libraries, "why_not", lambda name: None)
    return lambda on: monkeypatch.setenv(libraries.VARIABLE, "apex" if on else "")


@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_with_apex_and_without(apex, first):
    """Switched after three of six steps, in either direction, as torch's AdamW alone; parameters have gradients in some
    steps only, so that their numbers of steps differ."""

    def run(uses: list[bool]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (4,), (2, 2), (5,), (3, 3))]
        groups = {"encoder": parameters[:3], "projector": parameters[3:], "llm": []}
        state = None
        for number, on in enumerate(uses):
            if number in (0, 3):
                apex(on)
                optimizer = make_optimizer(groups, STAGE)
                assert isinstance(optimizer, FusedAdam) is on
                for parameter in parameters if state else ():  # as a checkpoint is loaded
                    for name, value in state[parameter].items():
                        optimizer.state[parameter][name].copy_(value)
            optimizer.zero_grad(set_to_none=True)
            for i, parameter in enumerate(parameters):
                if i < 4 and (i + number) % 3:
                    parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            state = {p: {name: value.clone() for name, value in optimizer.state[p].items()} for p in parameters}
        counts = [int(state[parameter]["step"]) for parameter in parameters]
        assert counts == [4, 4, 4, 4, 0] and all(len(values) == 3 for values in state.values())
        return [parameter.detach() for parameter in parameters]

    for got, expected in zip(run([first] * 3 + [not first] * 3), run([False] * 6), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def varlen(log_sum_exp: bool):
    """flash-attn's varlen function, in plain PyTorch and only for what it accepts."""

    def function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        for tensor in (q, k, v):
            assert tensor.dtype in (torch.float16, torch.bfloat16) and tensor.dim() == 3 and tensor.stride(-1) == 1
            assert tensor.shape[-1] % 8 == 0 and tensor.shape == q.shape
        for cu, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
            assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[0] == 0 and cu[-1] == len(q)
            assert type(longest) is int and longest == int(cu.diff().max())
        owner = torch.arange(len(cu_seqlens_q) - 1).repeat_interleave(cu_seqlens_q.diff())
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(owner[:, None] != owner, -torch.inf)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.float()).to(q.dtype)
        return (out, scores.logsumexp(-1)) if log_sum_exp else out

    return function


@pytest.mark.parametrize("log_sum_exp", [False, True])
def test_attention_by_flash(log_sum_exp):
    layout = PackedLayout.from_grids([(2, 3), (3, 2), (1, 4), (2, 3)])
    qkv = torch.randn(3, layout.num_tokens, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    got = packed_attention.by_flash(varlen(log_sum_exp), *qkv, layout)
    expected = packed_attention.sdpa_by_image(*qkv, layout)
    direction = torch.randn_like(got)
    gradients = [torch.autograd.grad((out * direction).sum(), qkv)[0] for out in (got, expected)]
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02)
    torch.testing.assert_close(*gradients, rtol=0, atol=0.05)


def test_which_flash_attention(monkeypatch):
    monkeypatch.setattr(packed_attention, "varlen_attn", object())
    monkeypatch.setattr(packed_attention, "flash_attn_2", object())
    monkeypatch.setattr(libraries, "why_not", lambda name: None)
    chosen = packed_attention.flash_attention
    assert chosen() == "torch"
    monkeypatch.setenv(libraries.VARIABLE, "apex, flash-attn-3")
    assert chosen() == "flash-attn-3"
    monkeypatch.setenv(libraries.VARIABLE, "")
    monkeypatch.setattr(packed_attention, "varlen_attn", None)
    assert chosen() == "flash-attn-2"
    monkeypatch.setattr(packed_attention, "flash_attn_2", None)
    assert chosen() is None


def test_what_is_named_and_can_not_run(monkeypatch):
    for value, message in (
        ("flash-attn-3", "names flash-attn-3, which can't run: flash_attn_interface can't be imported"),
        ("flash-attn-2,flash-attn-3", "names flash-attn-2 and flash-attn-3 for the encoder's attention"),
        ("flash", "names 'flash'; it takes flash-attn-3, flash-attn-2, apex"),
    ):
        monkeypatch.setenv(libraries.VARIABLE, value)
        with pytest.raises(RuntimeError, match=message):
            libraries.named("encoder's attention")
    assert all(reason for *_, reason in libraries.survey())


def test_why_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace())
    assert libraries.why_not("apex").startswith("apex.optimizers can't be imported (ModuleNotFoundError")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert libraries.why_not("flash-attn-3") == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert libraries.why_not("flash-attn-3") == "it is not for GPUs of compute capability 10.x"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert libraries.why_not("flash-attn-3") is None
    assert "never measured to be faster" in dict(row[1:] for row in libraries.survey())["flash-attn-3"]
