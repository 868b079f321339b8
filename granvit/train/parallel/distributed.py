"""How the processes of a run share a model: ranks have copies of it (DDP) or pieces of it (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from granvit.lora import adapters
from granvit.model import GranViT
from granvit.model.adapter import AdaptedEncoder
from granvit.train.parallel.compiling import blocks
from granvit.train.parallel.sharing import Sharing
from granvit.world import World

T = TypeVar("T")


class Root(nn.Module):
    """A model as what DDP and FSDP2 wrap: root(work, ...) is work(...). A model in pieces computes inside such a call,
    and nowhere else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[..., T], *arguments: object) -> T:
        return work(*arguments)


def distribute(
    model: GranViT,
    teacher: nn.Module | None,
    world: World,
    sharing: Sharing,
    precision: torch.dtype,
    device: torch.device,
    unused: bool = False,
    weights: GranViT | None = None,
) -> nn.Module:
    """The model's `Root`, in whose calls gradients become the ranks' mean.

    With copies the model is as it was. In pieces its parameters and those of the teacher (an encoder outside of it)
    are DTensors, put in their place, and so are the gradients and what an optimiser makes of them; which of them learn
    is settled before. precision: in which FSDP gathers weights. unused: whether there are steps that leave out some of
    what learns. weights: of a model on meta that comes to lie in pieces, whole or in pieces itself; it is filled a unit
    at a time, so that no more than one is ever whole. None: it stays on meta, or is none.
    """
    root = Root(model)
    if world.ranks == 1:
        return root
    if not sharing.pieces:
        return DistributedDataParallel(root, find_unused_parameters=unused, gradient_as_bucket_view=True)
    # Autocast casts what layers take. FSDP would cast whatever is given to a module, the boxes of a batch too.
    policy = MixedPrecisionPolicy(precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    filling = Filling(model, teacher, weights, device)
    shard = partial(fully_shard, mesh=mesh_of(world, sharing, device), mp_policy=policy)

    def cut(unit: nn.Module, **options: bool) -> FSDPModule:
        filling.fill(unit)
        return shard(unit, **options)

    kept: list[FSDPModule] = []
    if sharing.gathered:
        # The weights under adapters share their blocks with what learns: they are no one's pieces, but whole.
        own = set(adapters(model.llm))
        under = {parameter for parameter in model.llm.parameters() if parameter not in own} if own else set()
        shard = partial(shard, ignored_params=under)
        for part in (model.encoder, model.llm):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                kept += [cut(unit, reshard_after_forward=False) for unit in dict.fromkeys([*units(part), part])]
    for module in (model, teacher):
        for unit in units(module) if module is not None else ():
            if unit is not teacher and unit not in kept:
                cut(unit)
    if teacher is not None:  # no backward puts it back into pieces
        cut(teacher, reshard_after_forward=True)
    cut(root)

    def gather(*_: object) -> None:
        for unit in kept:  # nothing happens where it is whole already: before a checkpoint it is put into pieces
            unit.unshard()

    for unit in kept:
        unit.set_reshard_after_backward(False)
    root.register_forward_pre_hook(gather)
    return root


class Filling:
    """Takes the weights of a model on meta, and of its teacher, from another model: whole, or in other pieces."""

    def __init__(
        self, model: GranViT, teacher: nn.Module | None, weights: GranViT | None, device: torch.device
    ) -> None:
        self.device, self.sources = device, {}
        if weights is None:
            return
        state = weights.state_dict()  # what is gathered goes into pieces again, and has its own precision
        for name, parameter in model.named_parameters():
            self.sources[parameter] = state[name]
        for name, parameter in teacher.named_parameters() if teacher is not None else ():
            self.sources[parameter] = state[f"encoder.{name}"]
        theirs = dict(weights.named_buffers())
        for name, buffer in model.named_buffers():
            buffer.copy_(theirs[name])

    @torch.no_grad()
    def fill(self, unit: nn.Module) -> None:
        """Give the parameters of a unit that are still on meta their values, on the device. All ranks do it together.
        """
        for parameter in list(unit.parameters()):
            if parameter in self.sources:
                value = whole(self.sources.pop(parameter)).to(self.device, parameter.dtype, copy=True)
                torch.utils.swap_tensors(parameter, nn.Parameter(value, parameter.requires_grad))


@torch.no_grad()
def gathered(hollow: GranViT, model: GranViT, world: World, prefix: str) -> GranViT:
    """`hollow`, a model on meta, with the parameters of that prefix of one in pieces, in host memory: on the first
    rank, while the others give it their pieces."""
    state = model.state_dict()
    for name, parameter in hollow.named_parameters():
        if name.startswith(prefix):
            value = whole(state[name])
            if world.leads:
                torch.utils.swap_tensors(parameter, nn.Parameter(value.to("cpu", copy=True), parameter.requires_grad))
    return hollow


def whole(tensor: Tensor) -> Tensor:
    """A tensor, out of its pieces if it is in some; all ranks ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mesh_of(world: World, sharing: Sharing, device: torch.device) -> DeviceMesh:
    """The ranks in a line, or with "hsdp" as a table with a row for each node."""
    if sharing.parallel == "fsdp":
        return dist.init_device_mesh(device.type, (world.ranks,))
    shape = (world.ranks // world.local, world.local)
    return dist.init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


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
