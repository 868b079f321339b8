"""The processes that share a piece of work: one, or as many as torchrun started, and what they tell each other.

What they must agree about on the host, counts and decisions, goes over gloo, so that no GPU is waited for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from granvit.errors import Failed
from granvit.machine import default_device

PATIENCE = timedelta(hours=24)  # of a rank that waits for the others on the host: they may evaluate, or build data

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those that work together. control: their gloo group; None where there is only one."""

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

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on every rank, in the order of the ranks. Where it raises on some, every rank raises: the
        first of those what was raised there, the others Failed."""
        value, fault = None, None
        try:
            value = work()
        except Exception as error:
            fault = error
        outcomes = self.gather((value, None if fault is None else f"{type(fault).__name__}: {fault}"))
        for rank, (_, said) in enumerate(outcomes):
            if said is not None:
                raise fault if rank == self.rank else Failed(f"rank {rank} failed ({said})")
        return [value for value, _ in outcomes]


def start(device: str) -> tuple[World, torch.device]:
    """The world that torchrun's environment describes, and this process's device: for "auto" a GPU of its own if there
    is one, else the CPU. Raises ValueError for a device that can't be used."""
    ranks, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = default_device()
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
