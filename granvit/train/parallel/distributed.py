"""How the processes of a run share a model: ranks have copies of it (DDP) or pieces of it (FSDP2)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from granvit.model import GranViT
from granvit.model.adapter import AdaptedEncoder
from granvit.train.parallel.compiling import blocks
from granvit.world import World


def distribute(
    losses: nn.Module,
    model: GranViT,
    teacher: nn.Module | None,
    world: World,
    parallel: Literal["ddp", "fsdp"],
    precision: torch.dtype,
) -> nn.Module:
    """What is called in place of `losses` (a module around `model`), so that its gradients become the ranks' mean.

    "ddp": copies; "fsdp": the parameters of model and teacher (an encoder outside of it) become pieces, in place, and
    so do the gradients and what an optimiser makes of them. precision: in which FSDP gathers weights.
    """
    if world.ranks == 1:
        return losses
    if parallel == "ddp":
        # Not every stage uses every module: the warm-up has no features to project.
        return DistributedDataParallel(losses, find_unused_parameters=True, gradient_as_bucket_view=True)
    mesh = dist.init_device_mesh(next(model.parameters()).device.type, (world.ranks,))
    # Autocast casts what layers take. FSDP would cast whatever is given to a module, the boxes of a batch too.
    policy = MixedPrecisionPolicy(precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (model, teacher):
        for unit in units(module) if module is not None else ():
            if unit is not teacher:
                fully_shard(unit, mesh=mesh, mp_policy=policy)
    if teacher is not None:  # no backward puts it back into pieces
        fully_shard(teacher, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(losses, mesh=mesh, mp_policy=policy)
    return losses


def units(model: nn.Module) -> list[nn.Module]:
    """What FSDP gathers at once: transformer blocks, and an adapted encoder as a whole. Its blocks run once for each
    grid of a rank's images, of which ranks have different numbers, and each would wait for the others."""
    whole = [module for module in model.modules() if isinstance(module, AdaptedEncoder)]
    within = {block for encoder in whole for block in blocks(encoder)}
    return whole + [block for block in blocks(model) if block not in within]


def synchronise(module: nn.Module, wanted: bool) -> None:
    """Whether the next backward of a module out of `distribute` adds its gradients up over the ranks: not wanted in
    those of a step but the last, where it has several batches. FSDP always does: it would keep whole gradients."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = wanted
