"""One rank of many, without the others: torch's fake process group, and a model on meta in pieces or copies as on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import distributed as ddp

from granvit.rehearsal.collectives import Collective, Recorder
from granvit.train.parallel.meta import as_device, fake_group
from granvit.world import World

T = TypeVar("T")


@dataclass(frozen=True)
class LoneRank(World):
    """A rank to whom the others seem to be there. Of what they add up on the host, each of them gives as much as
    another rank once `said`, in the same order, or as this one.

    recorder: gets the exchanges on the host, too. heard: what another rank `said` to the sums.
    """

    recorder: Recorder = field(default_factory=Recorder)
    heard: tuple[Tensor, ...] = ()
    said: list[Tensor] = field(default_factory=list)

    def _note(self, kind: str, size: int = 0) -> None:
        self.recorder.collectives.append(Collective(kind, size, "host", self.ranks))

    def sum(self, tensor: Tensor) -> Tensor:
        self._note("all_reduce", 8 * tensor.numel())
        theirs = self.heard[len(self.said)] if len(self.said) < len(self.heard) else tensor
        self.said.append(tensor)
        return tensor + (self.ranks - 1) * theirs

    def gather(self, value: T) -> list[T]:
        self._note("all_gather")
        return [value] * self.ranks

    def first(self, work: Callable[[], T]) -> T:
        self._note("broadcast")
        return work()


@contextmanager
def lone_rank(rank: int, ranks: int, local: int, heard: tuple[Tensor, ...] = ()) -> Iterator[LoneRank]:
    """Inside, this process is rank `rank` of `ranks`, `local` of them on a machine; collectives of tensors on meta end
    at once. heard: see `LoneRank`."""
    with fake_group(rank, ranks), as_device():
        yield LoneRank(rank, ranks, local, heard=heard)


def end_reductions(module: nn.Module) -> None:
    """Let a DistributedDataParallel on meta take gradients from where they are. By default it takes them from what its
    all-reduce hands out, which on meta is nothing."""
    if isinstance(module, ddp.DistributedDataParallel):
        module.register_comm_hook(None, _reduce)


def _reduce(_, bucket):  # torch takes annotations for types, which in this file are strings
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
