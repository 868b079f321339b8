"""The memory of a rank when it is fullest. A step of the very run is taken on the meta device while its tensors are
counted, so no formula has to follow what a step does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from granvit.cost.flops import Picture
from granvit.cost.live import Live
from granvit.cost.shapes import on_meta
from granvit.cost.stand_in import batch_of
from granvit.data.collate import Batch
from granvit.model import GranViT, GranViTConfig
from granvit.train.distill import Teacher
from granvit.train.loop import Phase
from granvit.train.parallel.meta import OnGPU, as_device, fake_group
from granvit.train.parallel.sharing import Sharing
from granvit.train.presets import TrainConfig
from granvit.train.stages import Stage
from granvit.train.step import Share, stage_loss
from granvit.world import World

META = torch.device("meta")
KEPT = ("parameters", "teacher", "moments", "gradients")
PASSING = "made by the step"
"""The name of the rest: activations and their gradients, logits, gathered weights, copies in half precision."""


@dataclass(frozen=True)
class Peak:
    """when: in which part of a step it is ("forward", "backward", "optimizer"). parts: bytes that are there at that
    time, by name: KEPT and PASSING."""

    when: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def peak(
    config: TrainConfig, stage: Stage, shapes: GranViTConfig, rows: Sequence[Sequence[Picture]], world: World,
    sharing: Sharing, several: bool = False,
) -> Peak:  # fmt: skip
    """Of a step on micro-batches whose sequences are `rows`, on one of the world's ranks. several: whether there are
    more than one of them in a step, so that gradients are there when the next begins.

    It is what torch.cuda.max_memory_allocated would say, but for the workspaces of CUDA's libraries.
    """
    model = on_meta(shapes, config.model.lora, config.dtype).train()
    if world.ranks > 1 and not sharing.pieces:
        world, several = World(), True  # to one rank, DDP is gradients that are there from step to step
    config = replace(config, micro_packs=0, compile=False)
    stage = replace(stage, packs=len(rows) * world.ranks, images=None, steps=2, epochs=None)
    batch = batch_of(rows, shapes, META)

    def loss_of(model: GranViT, teacher: Teacher | None, _: int, batch: Batch, share: Share) -> dict[str, Tensor]:
        return stage_loss(model, teacher, batch, stage, config.distill, share)

    with as_device(), fake_group(world.rank, world.ranks), OnGPU(config.dtype):
        phase = Phase(config, stage, model, SimpleNamespace(dataset=None), loss_of, batch, world, META, sharing)
        given = phase.feed.step([batch] * (1 + several))
        with watched(phase) as live:
            phase.take(given)
    return peak_of(live)


def watched(phase: Phase) -> Live:
    """A context for steps of a phase on meta. What the phase keeps counts under its name in KEPT."""
    live = Live("meta")
    for name, tensors in (
        ("parameters", [*phase.model.parameters(), *phase.model.buffers()]),
        ("teacher", phase.teacher.tensors().values() if phase.teacher else ()),
        ("moments", [value for state in phase.optimizer.state.values() for value in state.values()]),
    ):
        for tensor in tensors:
            live.count(tensor, name)

    def label(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            live.count(parameter.grad, "gradients")

    def entering(name: str) -> Callable[..., None]:
        return lambda *_: setattr(live, "phase", name)

    def optimizing(*_: object) -> None:
        live.phase = "optimizer"
        for parameter in phase.trained:  # DDP has put gradients into its buckets since
            label(parameter)

    for parameter in phase.trained:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(label)
    phase.root.register_forward_pre_hook(entering("forward"), prepend=True)
    phase.root.register_forward_hook(entering("backward"))
    phase.optimizer.register_step_pre_hook(optimizing)
    return live


def peak_of(live: Live) -> Peak:
    """When the steps inside `watched` took most."""
    parts = {name: live.peak[name] for name in KEPT}
    return Peak(live.when, parts | {PASSING: live.peak[""]})
