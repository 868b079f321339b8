"""What a stage trains, and its optimiser: AdamW, or Muon for the weights of linear layers and AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from granvit.train.apex import fused_adam
from granvit.train.stages import GROUPS, Stage
from granvit_kernels import libraries

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan's quintic iteration; five of them bring singular values near 1."""


def freeze(groups: dict[str, list[nn.Parameter]], train: Iterable[str]) -> None:
    """Let the groups in `train` learn and no others; nor parameters without elements, as those of no location tokens,
    for which DDP would wait."""
    for name in GROUPS:
        for parameter in groups[name]:
            parameter.requires_grad_(name in train and parameter.numel() > 0)
            if name not in train:
                parameter.grad = None


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The weights of linear layers that are no table of embeddings too (a tied output layer is one)."""
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return {module.weight for module in model.modules() if isinstance(module, nn.Linear)} - tables


def make_optimizer(
    groups: dict[str, list[nn.Parameter]], stage: Stage, matrices: Collection[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The stage's optimiser over its groups; vectors (norms, biases) are not decayed. matrices: what Muon takes where
    it is chosen, of `hidden_matrices`."""
    matrices = matrices if stage.optimizer == "muon" else ()
    parameters = []
    for name in stage.train:
        rate = stage.learning_rate
        if name == "projector" and stage.projector_learning_rate is not None:
            rate = stage.projector_learning_rate
        for decay, muon, members in (
            (stage.weight_decay, True, [p for p in groups[name] if p in matrices]),
            (stage.weight_decay, False, [p for p in groups[name] if p.ndim >= 2 and p not in matrices]),
            (0.0, False, [p for p in groups[name] if p.ndim < 2]),
        ):
            if members:
                parameters.append({"params": members, "lr": rate, "rate": rate, "weight_decay": decay, "muon": muon})
    apex = not matrices and libraries.named("AdamW") is not None
    if apex:
        optimizer = fused_adam(parameters, stage.betas)
    elif matrices:
        optimizer = Muon(parameters, stage.betas)
    else:  # fused: one pass over each tensor; a quarter of the time of the default on a CPU
        optimizer = torch.optim.AdamW(parameters, betas=stage.betas, fused=True)
    for group in parameters:
        for parameter in group["params"]:  # now, so that a checkpoint always has the same tensors
            if group["muon"]:
                optimizer.state[parameter] = {"momentum": torch.zeros_like(parameter)}
                continue
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros((), device="cpu" if apex else parameter.device)
            optimizer.state[parameter] = {"step": step, **moments}
    return optimizer


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the groups with `muon`, fused AdamW for the others.

    Muon steps along a matrix's momentum with all of its singular values brought near 1. As Liu et al. (2025) have it,
    a step's RMS is then scaled to AdamW's usual 0.2, so that one learning rate serves both. torch.optim.Muon is the
    same, but orthogonalises one matrix after the other in bfloat16, which takes a CPU five times as long as a whole
    training step; here matrices of one shape go together, in float32 on a CPU.
    """

    momentum = 0.95

    def __init__(self, params: Iterable[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(params, betas=betas, fused=True)
        # torch's name for what tells a fused step, on the device, that it is to change nothing.
        self.found_inf = torch.zeros((), device=self.param_groups[0]["params"][0].device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        every = self.param_groups
        try:
            self.param_groups = [group for group in every if not group["muon"]]
            super().step()
        finally:
            self.param_groups = every
        for group in every:
            if group["muon"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        taken = 1 - self.found_inf
        for parameter in group["params"]:
            if parameter.grad is not None:
                shapes[parameter.shape].append(parameter)
        for shape, alike in shapes.items():
            momenta = [self.state[parameter]["momentum"] for parameter in alike]
            gradients, past = torch.stack([parameter.grad for parameter in alike]), torch.stack(momenta)
            # A mean of a momentum and itself is that momentum.
            gradients = torch.where(self.found_inf > 0, past, gradients)
            torch._foreach_lerp_(momenta, list(gradients), 1 - self.momentum)
            ahead = gradients.lerp_(torch.stack(momenta), self.momentum)  # Nesterov's
            updates = orthogonalized(ahead) * (taken * (-0.2 * group["lr"] * max(shape) ** 0.5))
            torch._foreach_mul_(alike, 1 - taken * (group["lr"] * group["weight_decay"]))
            torch._foreach_add_(alike, list(updates))


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices [N, A, B] with their singular values brought to between 0.7 and 1.2, by five steps of Newton and Schulz.
    In bfloat16 on a GPU, which is exact enough and there much faster."""
    x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
