"""Self-distillation (GranViT, section 3): the student's region features in the whole image against an EMA teacher's
features of the region's crop, and the measures that tell learning from shrinkage."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEMORY = 0.9
"""So much less than a step's region features do those of the step before count in `Statistics`: ten steps' together."""


class Teacher:
    """An exponential moving average of an encoder: always in eval mode, never with gradients. statistics: of what it
    and the student see in regions."""

    def __init__(self, student: nn.Module, alpha: float, device: torch.device | None = None) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"distill.alpha is {alpha}; it takes a number from 0 to 1")
        self.alpha = alpha
        self.encoder = copy.deepcopy(student).eval().requires_grad_(False)
        self.statistics = Statistics(student.config.hidden_size, device or next(student.parameters()).device)

    @torch.no_grad()
    def update(self, student: nn.Module, taken: Tensor | None = None) -> None:
        """teacher <- alpha * teacher + (1 - alpha) * student, for every parameter; not where `taken`, bool [] on their
        device, is False."""
        ours, theirs = ([_local(parameter) for parameter in part.parameters()] for part in (self.encoder, student))
        share = torch.full((), 1 - self.alpha, device=ours[0].device)
        share = share if taken is None else share * taken
        torch._foreach_lerp_(ours, theirs, [share.to(parameter.dtype) for parameter in ours])

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds of it, by name."""
        return self.encoder.state_dict() | {f"statistics.{k}": v for k, v in vars(self.statistics).items()}


def _local(tensor: Tensor) -> Tensor:
    """Of a parameter in pieces (FSDP) this rank's."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Statistics:
    """Running statistics of region features by channel: count [], mean [2, C] of the student's and the teacher's, and
    covariance [3, C], both variances and what the two have in common.

    In a step's loss they are constants, known from the steps before: so it is a sum over positions, whatever batches
    and ranks these are cut into. They take in a step's features when it is over.
    """

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self.count = torch.zeros((), device=device)
        self.mean = torch.zeros(2, channels, device=device)
        self.covariance = torch.zeros(3, channels, device=device)

    @torch.no_grad()
    def moments(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of features [N, C]: their number, and the sums of what differs from the running means and of its products,
        [6, C]. A step's are the sum of its parts'."""
        x, y = student.float() - self.mean[0], teacher.float() - self.mean[1]
        sums = [part.sum(0) for part in (x, y, x * x, y * y, x * y)]
        return torch.stack([torch.full_like(sums[0], len(x)), *sums])

    @torch.no_grad()
    def update(self, moments: Tensor, taken: Tensor | None = None) -> None:
        """Take in a step's moments, of at least one position; not where `taken`, bool [] on their device, is False."""
        number, first, second = moments[0, 0], moments[1:3] / moments[0], moments[3:] / moments[0]
        count = self.count * MEMORY + number
        share = number / count
        x, y = shift = share * first
        covariance = self.covariance.lerp(second, share).sub_(torch.stack([x * x, y * y, x * y]))
        covariance[:2].clamp_(min=0)  # of a constant far from 0, rounding may leave less
        for old, new in ((self.count, count), (self.mean, self.mean + shift), (self.covariance, covariance)):
            old.copy_(new if taken is None else torch.where(taken, new, old))


def distillation_loss(student: Tensor, teacher: Tensor, target: str, statistics: Statistics | None = None) -> Tensor:
    """Distance of region features [N, C] to the teacher's [N, C], of each position, float32 [N].

    "mse" is the paper's. "cosine" and "layer_norm" compare each position's direction. "standardized" compares each
    channel's pattern over positions, so that neither scale nor a constant can lower it: its mean is 2 - 2 r where r is
    the channels' mean correlation. It takes `statistics`, and is 0 before these have seen any position; None: those of
    the features given. Raises ValueError for another target.
    """
    student, teacher = student.float(), teacher.float()
    if target == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    if target == "standardized":
        if statistics is None:
            statistics = Statistics(student.shape[-1], student.device)
            statistics.update(statistics.moments(student, teacher))
        return _standardized(student, teacher, statistics)
    if target == "layer_norm":
        width = (student.shape[-1],)
        student, teacher = F.layer_norm(student, width), F.layer_norm(teacher, width)
    elif target != "mse":
        raise ValueError(f"distill.target is {target!r}; it takes standardized, layer_norm, cosine or mse")
    return (student - teacher).square().mean(-1)


def _standardized(student: Tensor, teacher: Tensor, statistics: Statistics) -> Tensor:
    """(x - y)^2 of standardised features x, y would fall where the student shrinks towards its mean, as the constant
    statistics do not shrink with it. So each channel takes 2 (1 - x y) + r (x^2 - 1): that has the same mean, and the
    gradient that (x - y)^2 has where the statistics are functions of the features. r: the channel's correlation."""
    variance_x, variance_y, common = statistics.covariance
    scale_x, scale_y = (variance_x + 1e-4).rsqrt(), (variance_y + 1e-4).rsqrt()
    x, y = (student - statistics.mean[0]) * scale_x, (teacher - statistics.mean[1]) * scale_y
    correlation = (common * scale_x * scale_y).clamp(-1, 1)
    distance = 2 * (1 - x * y) + correlation * (x.square() - 1)
    return distance.mean(-1) * (statistics.count > 0)


@torch.no_grad()
def feature_moments(features: Tensor) -> Tensor:
    """What `feature_statistics` takes of features [N, C], float64 [C + 1, C + 1]: the sum of their outer products, each
    with a one behind it. That of all is the sum of its parts'."""
    x = F.pad(features.double(), (0, 1), value=1.0)
    return x.T @ x


def feature_statistics(moments: Tensor) -> dict[str, Tensor]:
    """Effective rank and mean standard deviation, [] each, of features of which `feature_moments` tells; any number
    where those are not finite.

    Effective rank = exp(entropy of the normalised singular values of the centred features) (Roy & Vetterli 2007).
    """
    sums, number = moments[-1, :-1], moments[-1, -1]
    scatter = (moments[:-1, :-1] - torch.outer(sums, sums) / number).nan_to_num(0, 0, 0)  # eigvalsh raises for NaN
    singular = torch.linalg.eigvalsh(scatter).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-30)
    entropy = -(share * share.clamp_min(1e-30).log()).sum()
    deviations = (scatter.diagonal() / number).clamp_min(0).sqrt()
    return {"effective_rank": entropy.exp(), "std": deviations.mean()}
