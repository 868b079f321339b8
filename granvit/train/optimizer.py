"""What a stage trains, and its optimiser."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from granvit.train.stages import GROUPS, Stage


def freeze(groups: dict[str, list[nn.Parameter]], train: Iterable[str]) -> None:
    """Let the groups in `train` learn and no others."""
    for name in GROUPS:
        for parameter in groups[name]:
            parameter.requires_grad_(name in train)
            if name not in train:
                parameter.grad = None


def make_optimizer(groups: dict[str, list[nn.Parameter]], stage: Stage) -> torch.optim.AdamW:
    """AdamW over the stage's groups; vectors (norms, biases) are not decayed."""
    parameters = []
    for name in stage.train:
        rate = stage.learning_rate
        if name == "projector" and stage.projector_learning_rate is not None:
            rate = stage.projector_learning_rate
        for decay, members in (
            (stage.weight_decay, [p for p in groups[name] if p.ndim >= 2]),
            (0.0, [p for p in groups[name] if p.ndim < 2]),
        ):
            if members:
                parameters.append({"params": members, "lr": rate, "rate": rate, "weight_decay": decay})
    # fused: one pass over each tensor; a quarter of the time of the default on a CPU
    optimizer = torch.optim.AdamW(parameters, betas=stage.betas, fused=True)
    for group in parameters:
        for parameter in group["params"]:  # now, so that a checkpoint always has the same tensors
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer
