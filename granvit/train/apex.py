"""NVIDIA apex's FusedAdam as the AdamW of a stage, with torch's state: a run goes on with it or without it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def fused_adam(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """apex.optimizers.FusedAdam over parameter groups, which counts steps a parameter as torch's AdamW does.

    apex counts them a group. So parameters of a group that have had equally many gradients go together, and state has
    the tensors of torch's: step (on the CPU, where apex's kernel wants it), exp_avg and exp_avg_sq.
    Raises RuntimeError for FSDP's pieces, which apex's kernel does not take.
    """
    from apex.optimizers import FusedAdam

    if any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"]):
        raise RuntimeError("apex's FusedAdam does not take FSDP's pieces of parameters; train without it, or with ddp")

    class Fused(FusedAdam):
        def zero_grad(self, set_to_none: bool = True) -> None:  # apex's takes no argument
            torch.optim.Optimizer.zero_grad(self, set_to_none)

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            if bool(getattr(self, "found_inf", 0)):  # waits for the device, as the numbers of steps are on the host
                return
            every = self.param_groups
            learning = [p for group in every for p in group["params"] if p.grad is not None]
            try:
                self.param_groups = [part for group in every for part in _of_equal_steps(group, self.state)]
                super().step()
            finally:
                self.param_groups = every
            for parameter in learning:
                self.state[parameter]["step"] += 1

    return Fused(groups, betas=betas, adam_w_mode=True)


def _of_equal_steps(group: dict[str, Any], state: dict[nn.Parameter, dict[str, Tensor]]) -> Iterable[dict[str, Any]]:
    """The group's parameters that have a gradient, in groups of as many steps as they have taken."""
    alike = defaultdict(list)
    for parameter in group["params"]:
        if parameter.grad is not None:
            alike[int(state[parameter]["step"])].append(parameter)
    return [{**group, "params": members, "step": steps} for steps, members in alike.items()]
