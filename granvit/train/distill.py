"""Self-distillation (GranViT, section 3): the student's region features in the whole image against an EMA teacher's
features of the region's crop, and the measures that tell learning from shrinkage."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granvit.train.parallel.distributed import summed


class Teacher:
    """An exponential moving average of an encoder: always in eval mode, never with gradients."""

    def __init__(self, student: nn.Module, alpha: float) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"distill.alpha is {alpha}; it takes a number from 0 to 1")
        self.alpha = alpha
        self.encoder = copy.deepcopy(student).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """teacher <- alpha * teacher + (1 - alpha) * student, for every parameter."""
        ours, theirs = list(self.encoder.parameters()), list(student.parameters())
        torch._foreach_mul_(ours, self.alpha)
        torch._foreach_add_(ours, theirs, alpha=1 - self.alpha)


def distillation_loss(student: Tensor, teacher: Tensor, target: str, weight: float = 1.0, ranks: int = 1) -> Tensor:
    """Distance of region features [N, C] to the teacher's [N, C], each in float32, as a scalar.

    "mse" is the paper's. "cosine" and "layer_norm" compare each position's direction, "standardized" each channel's
    pattern over the N positions of the batch (mean 0, variance 1), so that neither scale nor a constant can lower it.
    ranks: processes that call this together, each with some of the positions; the sum of what they get is the loss of
    all. weight: 0 on a rank whose positions don't count. Raises ValueError for another target.
    """
    student, teacher = student.float(), teacher.float()
    positions = summed(student.new_full((), weight * len(student)), ranks).clamp_min(1)
    if target == "cosine":
        return weight * (1 - F.cosine_similarity(student, teacher, dim=-1)).sum() / positions
    if target == "layer_norm":
        width = (student.shape[-1],)
        student, teacher = F.layer_norm(student, width), F.layer_norm(teacher, width)
    elif target == "standardized":
        student, teacher = (_standardize(x, weight, positions, ranks) for x in (student, teacher))
    elif target != "mse":
        raise ValueError(f"distill.target is {target!r}; it takes standardized, layer_norm, cosine or mse")
    return weight * (student - teacher).square().sum() / (positions * student.shape[-1])


def _standardize(x: Tensor, weight: float, positions: Tensor, ranks: int) -> Tensor:
    """Mean 0 and variance 1 over all ranks' positions."""
    x = x - summed(weight * x.sum(0), ranks) / positions
    variance = summed(weight * x.square().sum(0), ranks) / positions
    return x / (variance + 1e-4).sqrt()


@torch.no_grad()
def feature_statistics(features: Tensor) -> dict[str, float]:
    """Effective rank and mean standard deviation of features [N, C].

    Effective rank = exp(entropy of the normalised singular values of the centred features) (Roy & Vetterli 2007).
    """
    x = features.double()
    x = x - x.mean(0)
    singular = torch.linalg.eigvalsh(x.T @ x).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-30)
    entropy = -(share * share.clamp_min(1e-30).log()).sum()
    return {"effective_rank": entropy.exp().item(), "std": x.std(0, unbiased=False).mean().item()}
