"""Evaluation of a model in pieces: ranks that have different numbers of questions, and answers of different lengths,
go through the model the same number of times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from granvit.model import GranViT
from granvit.world import World
from granvit_kernels import PackedLayout

T = TypeVar("T")
NONE, ENCODER, LLM = range(3)


def compute(root: nn.Module | None, work: Callable[[], T]) -> T:
    """What `work` returns, which computes with the model of a `distribute`d root; None: of one that never was. Where it
    is in pieces all ranks call this, and go through encoder and LLM equally often."""
    if not isinstance(root, FSDPModule):
        return work()
    try:
        return root(work)
    finally:
        root.reshard()


def in_step(root: nn.Module | None, model: GranViT, world: World, work: Callable[[World], T]) -> T:
    """As `compute`, for a `work` that asks the model in `world.each` alone, on each rank as often as it likes."""
    if not isinstance(root, FSDPModule):
        return work(world)
    step = InStep(model, world)
    try:
        return compute(root, lambda: work(replace(world, finish=step.finish)))
    finally:
        step.remove()


class InStep:
    """Before a rank goes through encoder or LLM, all ranks agree which it is: the encoder if any wants it. Who doesn't
    goes through it too, with a blank of one token; and so does who is at its end, until all are."""

    def __init__(self, model: GranViT, world: World) -> None:
        self.model, self.world, self.blank = model, world, False
        parts = {ENCODER: model.encoder, LLM: model.llm.get_decoder()}
        self.hooks = [
            part.register_forward_pre_hook(lambda *_, wanted=wanted: self._take_turns(wanted), prepend=True)
            for wanted, part in parts.items()
        ]

    def finish(self) -> None:
        """Until the other ranks are at their ends too."""
        self._take_turns(NONE)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _take_turns(self, wanted: int) -> None:
        while not self.blank and (turn := self._agree(wanted)) != wanted:
            self.blank = True
            try:
                self._go_through(turn)
            finally:
                self.blank = False

    def _agree(self, wanted: int) -> int:
        encoder, llm = self.world.total(wanted == ENCODER, wanted == LLM)
        return ENCODER if encoder else LLM if llm else NONE

    @torch.no_grad()
    def _go_through(self, part: int) -> None:
        config, device = self.model.config, self.model.locations.input.device
        if part == ENCODER:
            patches = torch.zeros(1, config.patch_size**2 * 3, device=device)
            self.model.encoder(patches, PackedLayout.from_grids([(1, 1)], device=device))
            return
        ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.model.llm.get_decoder()(
            inputs_embeds=self.model.embed_ids(ids), attention_mask=ids + 1, position_ids=ids, use_cache=False
        )
