"""The processes of a run: one, or as many as torchrun started, and how they share a model and a batch.

Ranks have copies of the model (DDP) or pieces of it (FSDP2). What they must agree about on the host, counts and
decisions, goes over gloo, so that no GPU is waited for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from granvit.model import GranViT
from granvit.model.adapter import AdaptedEncoder
from granvit.train.guard import Failed
from granvit.train.parallel.compiling import blocks

PATIENCE = timedelta(hours=24)  # of a rank that waits for the others on the host: they may evaluate, or build data

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the processes of the run. control: their gloo group; None where there is only one."""

    rank: int = 0
    ranks: int = 1
    control: Any = None

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes down what all have found."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """A tensor, summed over the ranks in float64."""
        if self.ranks == 1:
            return tensor
        sums = tensor.double().cpu()
        dist.all_reduce(sums, group=self.control)
        return sums.to(tensor)

    def total(self, *numbers: float) -> list[float]:
        """Each number, summed over the ranks."""
        return list(numbers) if self.ranks == 1 else self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=self.control)
        return values

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank, which alone does it, while the others wait. Where it raises, every
        rank raises: Failed on the others."""
        outcome: list[Any] = [None, None]
        fault = None
        if self.leads:
            try:
                outcome = [work(), None]
            except BaseException as error:
                fault = error
                outcome = [None, f"{type(error).__name__}: {error}"]
        if self.ranks > 1:
            dist.broadcast_object_list(outcome, src=0, group=self.control)
        if fault is not None:
            raise fault
        if outcome[1] is not None:
            raise Failed(f"the first rank failed ({outcome[1]})")
        return outcome[0]


def start(device: str) -> tuple[World, torch.device]:
    """The world that torchrun's environment describes, and this process's device: for "auto" a GPU of its own if there
    is one, else the CPU. Raises ValueError for a device that can't be used."""
    ranks, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and ranks > 1:
        device = f"cuda:{local}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device!r} can't be used here ({str(error).splitlines()[0]})") from error
    chosen = torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if ranks == 1:
        return World(), chosen
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return World(dist.get_rank(), ranks, dist.new_group(backend="gloo", timeout=PATIENCE)), chosen


def stop() -> None:
    """Leave the processes' group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
    those of a step but the last, where it has several batches."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = wanted
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)
