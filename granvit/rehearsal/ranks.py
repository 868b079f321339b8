"""One rank of many, without the others: torch's fake process group, and a model on meta in pieces or copies as on GPUs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.nn.parallel import distributed as ddp
from torch.testing._internal.distributed.fake_pg import FakeStore

from granvit.rehearsal.collectives import Collective, Recorder
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
    hook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        with _meta_as_device():
            yield LoneRank(rank, ranks, heard=heard)
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook  # torch would name the rank before each line of a traceback from now on


class _Stream:
    """A stream or an event, on which everything has happened already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _Stream:
        return self

    def _nothing(self, *_: Any) -> None:
        pass

    record = wait = wait_event = wait_stream = synchronize = _nothing


_DEVICE = SimpleNamespace(
    Stream=_Stream, Event=_Stream, current_stream=_Stream, current_device=lambda: 0, device_count=lambda: 1,
    stream=nullcontext,
)  # fmt: skip
"""What torch.cuda is for a GPU, as far as meshes and FSDP ask for it."""


@contextmanager
def _meta_as_device() -> Iterator[None]:
    """Inside, torch treats meta as a device that can be trained on: FSDP2 and DDP take its tensors, and so do fused
    optimisers."""
    optimizer = sys.modules["torch.optim.optimizer"]
    with ExitStack() as stack:
        torch._register_device_module("meta", _DEVICE)
        stack.callback(sys.modules.pop, "torch.meta")
        stack.callback(delattr, torch, "meta")
        for owner, name, ours in (
            (FSDPParamGroup, "_validate_no_meta_params", lambda _: None),
            (torch.accelerator, "current_stream", _Stream),
            (ddp, "_verify_param_shape_across_processes", lambda *_, **__: None),
            (optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"]),
        ):
            stack.enter_context(mock.patch.object(owner, name, ours))
        yield


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
