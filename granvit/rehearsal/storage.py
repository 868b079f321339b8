"""What each rank writes of a checkpoint, as torch.distributed.checkpoint (DCP) plans it; no tensor is looked at."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from unittest import mock

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.tensor import DTensor

from granvit.train.checkpoint import share
from granvit.world import World


def bytes_written(tensors: Mapping[str, Tensor], ranks: int) -> list[int]:
    """Bytes of the file of each of the ranks that a checkpoint of these tensors (one rank's) is written by. Raises
    ValueError where their pieces leave holes or overlap."""
    # A model has hundreds of pieces of a few kinds: one of each kind is planned.
    kinds = {name: _kind(name, tensor) for name, tensor in tensors.items()}
    examples = {kind: name for name, kind in kinds.items()}
    alike = Counter(kinds.values())
    planned = {name: tensors[name] for name in examples.values()}
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner({}, is_coordinator=True)
    try:
        plans, _ = planner.create_global_plan([_local_plan(planned, rank, ranks) for rank in range(ranks)])
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(f"the ranks' pieces make no checkpoint: {error}") from error
    return [sum(alike[kinds[item.index.fqn]] * _size(item) for item in plan.items) for plan in plans]


def _kind(name: str, tensor: Tensor) -> tuple:
    """Equal for tensors of which all ranks have pieces alike; a whole tensor is one rank's, and of its own kind."""
    if isinstance(tensor, DTensor):
        return tensor.shape, tensor.dtype, tensor.device_mesh, tensor.placements
    return (name,)


def _local_plan(tensors: Mapping[str, Tensor], rank: int, ranks: int) -> dcp.SavePlan:
    """What this rank would write, whichever rank the tensors are of."""
    # By their ids: DTensor keeps results of an equal mesh, and may give a tensor that older one.
    meshes = {id(tensor.device_mesh): tensor.device_mesh for tensor in tensors.values() if isinstance(tensor, DTensor)}
    with ExitStack() as stack:
        for mesh in meshes.values():
            place = tuple((mesh.mesh == rank).nonzero()[0].tolist())
            stack.enter_context(mock.patch.object(mesh, "_coordinate_on_dim", place))
        return create_default_local_save_plan(share(tensors, World(rank, ranks)), is_coordinator=rank == 0)


def _size(item: dcp.planner.WriteItem) -> int:
    data = item.tensor_data
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
