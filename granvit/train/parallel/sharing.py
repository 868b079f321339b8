"""Which way the ranks share a model: by what it takes on each device, and what the devices have."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from granvit.errors import byte_size
from granvit.lora import adapters
from granvit.model import GranViT
from granvit.train.presets import TrainConfig
from granvit.train.stages import Stage
from granvit.world import World

SHARE = 0.6
"""Of a device's memory, what parameters, gradients, moments and a teacher may take. The rest is for activations, logits
and batches."""


@dataclass(frozen=True)
class Sharing:
    """parallel: "ddp", each rank has a copy; "fsdp", each a piece; "hsdp", the ranks of a node share a copy. gathered:
    with pieces, whether what a stage does not train is gathered once and kept, in the precision that it is computed in.
    why: in words."""

    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    gathered: bool = False
    why: str = "one rank"

    @property
    def pieces(self) -> bool:
        return self.parallel != "ddp"


COPIES = Sharing()


def choose(config: TrainConfig, model: GranViT, world: World, memory: int) -> Sharing:
    """How the ranks share a model in all stages of a run. model: its sizes count alone, so that it may be on meta.
    memory: bytes of the smallest device.

    `config.parallel` decides; where it is "auto", copies if they fit, else pieces within nodes if those fit, else
    pieces over all ranks.
    """
    if world.ranks == 1:
        return COPIES
    number = {"ddp": 1, "hsdp": world.local, "fsdp": world.ranks}
    stages = [stage for stage in (config.warmup, *config.stages) if stage.runs]
    width = config.dtype.itemsize

    def most(parallel: str, gathered: bool) -> int:
        return max(state_bytes(model, stage, number[parallel], width if gathered else None) for stage in stages)

    room, parallel = SHARE * memory, config.parallel
    several = 1 < world.local < world.ranks
    if parallel == "auto":
        fitting = [name for name in ("ddp", *(["hsdp"] if several else [])) if most(name, False) <= room]
        muon = any(stage.optimizer == "muon" for stage in stages)  # it takes whole matrices
        parallel = "ddp" if muon else (*fitting, "fsdp")[0]
    elif parallel == "hsdp" and not several:
        parallel = "fsdp"
    gathered = parallel != "ddp" and most(parallel, True) <= room
    why = (
        f"parallel {config.parallel}: {parallel}. Parameters, gradients, moments and teacher take "
        f"{byte_size(most('ddp', False))} of a device's {byte_size(memory)} as a copy"
    )
    if parallel != "ddp":
        frozen = "gathered once" if gathered else "gathered each time"
        why += f", {byte_size(most(parallel, gathered))} in pieces of {number[parallel]}, what is frozen {frozen}"
    return Sharing(parallel, gathered, why)


def state_bytes(model: GranViT, stage: Stage, pieces: int, gathered: int | None = None) -> int:
    """Bytes on a device of what a stage keeps from step to step: parameters in float32 (those under adapters as they
    are), and of those that learn a gradient and the optimiser's moments; a teacher.

    pieces: on how many devices a copy lies. gathered: bytes of a weight in which frozen parts are whole besides, None
    where they are not.
    """
    sizes = {name: sum(parameter.numel() for parameter in group) for name, group in model.groups().items()}
    learns = sum(sizes[name] for name in stage.train)
    under = sum(p.nbytes for p in model.llm.parameters()) - sum(p.nbytes for p in adapters(model.llm))
    under = under if adapters(model.llm) else 0
    moments = 4 if stage.optimizer == "muon" else 8
    cut = 4 * sum(sizes.values()) + (4 + moments) * learns + 4 * bool(stage.distill) * sizes["encoder"]
    if gathered is None:
        return (cut + under) // pieces
    return cut // pieces + under + gathered * (sum(sizes.values()) - learns)


def device_memory(device: torch.device, world: World) -> int:
    """Bytes of the smallest device of all ranks; of a CPU, a rank's share of its machine's memory."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local
    return min(world.gather(memory))
