"""The processes that share a piece of work: one, or as many as torchrun started, and what they tell each other.

What they must agree about on the host, counts and decisions, goes over gloo, so that no GPU is waited for.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from granvit.errors import Failed
from granvit.machine import default_device

PATIENCE = timedelta(hours=24)  # of a rank that waits for the others on the host: they may evaluate, or build data
SECONDS_UNTIL_NAMED = 300

log = logging.getLogger(__name__)
T = TypeVar("T")


class RollCall:
    """Names the ranks that others wait for. A rank that hangs can't say so, and those that wait for it would look the
    same: so each rank counts the agreements that it has come to, and tells its count by a thread of its own.

    store: of the ranks. seconds: how long a rank waits before it asks who is missing.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, seconds: float = SECONDS_UNTIL_NAMED) -> None:
        self.store = dist.PrefixStore("granvit/roll call", store)
        self.rank, self.ranks, self.seconds = rank, ranks, seconds
        self.count, self.since = 0, None
        self.store.set(str(rank), "0")
        threading.Thread(target=self._tell, name="roll call", daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While this rank waits for the others."""
        self.count += 1
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.since = None

    def _tell(self) -> None:
        told, named = 0, 0
        while True:
            time.sleep(self.seconds / 5)
            count, since = self.count, self.since
            try:
                if count != told:
                    self.store.set(str(self.rank), str(count))
                    told = count
                if since is None or time.monotonic() - since < self.seconds or named == count:
                    continue
                counts = [int(self.store.get(str(rank))) for rank in range(self.ranks)]
            except RuntimeError:  # the ranks part
                return
            missing = [rank for rank, theirs in enumerate(counts) if theirs < count]
            # Of those that wait the first one speaks. A rank may have come since it told its count last: then none is
            # missing soon.
            if missing and self.rank == min(rank for rank, theirs in enumerate(counts) if theirs >= count):
                named = count
                log.warning(
                    "%s: waited for by %d others for %.0f minutes; a rank that hangs shows where by `py-spy dump`",
                    "rank " + str(missing[0]) if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}",
                    self.ranks - len(missing), (time.monotonic() - since) / 60,
                )  # fmt: skip


@dataclass(frozen=True)
class World:
    """This process among those that work together. local: how many of them are on this machine. control: their gloo
    group; None where there is only one. roll_call: says which rank the others wait for. finish: what a rank does that
    is at the end of its work in `each`, before it says so."""

    rank: int = 0
    ranks: int = 1
    local: int = 1
    control: Any = None
    roll_call: RollCall | None = None
    finish: Callable[[], None] | None = None

    def _waiting(self) -> AbstractContextManager[None]:
        return nullcontext() if self.roll_call is None else self.roll_call.waiting()

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes down what all have found."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """A tensor, summed over the ranks in float64."""
        if self.ranks == 1:
            return tensor
        sums = tensor.double().cpu()
        with self._waiting():
            dist.all_reduce(sums, group=self.control)
        return sums.to(tensor)

    def sum_on_device(self, tensor: Tensor) -> Tensor:
        """A tensor on the ranks' devices, summed over the ranks there in float64: the host does not wait for it."""
        if self.ranks == 1:
            return tensor
        sums = tensor.double()
        dist.all_reduce(sums)
        return sums.to(tensor)

    def total(self, *numbers: float) -> list[float]:
        """Each number, summed over the ranks."""
        return list(numbers) if self.ranks == 1 else self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        with self._waiting():
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
            with self._waiting():
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
        if self.finish is not None:
            self.finish()
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
    _record_collectives()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    rank, control = dist.get_rank(), dist.new_group(backend="gloo", timeout=PATIENCE)
    roll_call = RollCall(dist.distributed_c10d._get_default_store(), rank, ranks)
    return World(rank, ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks)), control, roll_call), chosen


def _record_collectives() -> None:
    """Let NCCL keep its last collectives and write them down where one of them hangs. It reads this when its group is
    made; what is set already stays."""
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # the older name of the same
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")


def stop() -> None:
    """Leave the processes' group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
