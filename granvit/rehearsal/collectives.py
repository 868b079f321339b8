"""Which collectives a rank takes part in, in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch.distributed as dist
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from granvit.errors import byte_size

KINDS = {
    "_allgather_base_": "all_gather", "all_gather_into_tensor": "all_gather", "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter", "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce", "all_reduce": "all_reduce", "all_reduce_": "all_reduce", "broadcast_": "broadcast",
}  # fmt: skip
"""torch's names of operators, and what they do."""


@dataclass(frozen=True)
class Collective:
    """kind: what it does. size: bytes of the whole tensor, gathered or before it is scattered. axis: of the mesh, whose
    `ranks` take part; "host": the gloo group of all ranks."""

    kind: str
    size: int
    axis: str
    ranks: int

    @property
    def received(self) -> float:
        """Bytes that each rank receives, where ranks form a ring."""
        share = (self.ranks - 1) / self.ranks
        return self.size * {"all_reduce": 2 * share, "broadcast": 1.0}.get(self.kind, share)

    def __str__(self) -> str:
        return f"{self.kind} of {byte_size(self.size)} over {self.axis}"


class Recorder(TorchDispatchMode):
    """Writes the collectives on devices that happen inside to `collectives`, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, as operators on the pieces
        out = func(*args, **(kwargs or {}))
        if func in collective_ops and func not in sync_ops:
            group = CollectiveOp.get_process_group(func, args)
            size = CollectiveOp.get_comm_tensor_size(func, out, args, kwargs)
            name = func._schema.name.rpartition("::")[2]
            self.collectives.append(Collective(KINDS.get(name, name), size, axis_of(group), group.size()))
        return out


def axis_of(group: dist.ProcessGroup) -> str:
    """The mesh's axis that a group is made for: "shard", "replicate", or "all" ranks."""
    name = str(group.group_desc)
    return name.removeprefix("mesh_") if name.startswith("mesh_") else "all"


def merged(collectives: Sequence[Collective]) -> Iterator[tuple[int, tuple[Collective, ...]]]:
    """(times, collectives): what follows itself, alone or in pairs, only once."""
    rest = list(collectives)
    while rest:
        best = (1, 1)
        for period in (1, 2, 3):
            pattern, times = rest[:period], 1
            while rest[times * period : (times + 1) * period] == pattern:
                times += 1
            if times > 1 and times * period > best[0] * best[1]:
                best = (times, period)
        times, period = best
        yield times, tuple(rest[:period])
        rest = rest[times * period :]


def totals(collectives: Sequence[Collective]) -> Iterator[tuple[str, str, int, int, float]]:
    """(kind, axis, number, bytes, bytes received) of all collectives of each kind over each axis."""

    def key(collective: Collective) -> tuple[str, str]:
        return collective.axis, collective.kind

    for (axis, kind), group in groupby(sorted(collectives, key=key), key):
        alike = list(group)
        yield kind, axis, len(alike), sum(c.size for c in alike), sum(c.received for c in alike)


def difference(ours: Sequence[Collective], theirs: Sequence[Collective]) -> str | None:
    """Where two ranks' collectives part, which would hang them; None where they are the same."""
    for number, (mine, yours) in enumerate(zip(ours, theirs, strict=False), start=1):
        if mine != yours:
            return f"collective {number} is {mine} on the one and {yours} on the other"
    if len(ours) != len(theirs):
        return f"{len(ours)} collectives on the one and {len(theirs)} on the other"
    return None
