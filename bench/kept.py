"""Counts what a training step keeps in memory for its backward pass."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


class Kept(saved_tensors_hooks):
    """A context that counts what operations keep for the backward pass: `bytes`, each memory once, without what `model`
    holds anyway."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        held = (*model.parameters(), *model.buffers())
        self._held = {tensor.untyped_storage()._cdata for tensor in held}
        self.storages: dict[int, torch.UntypedStorage] = {}  # kept alive, or another would take its place

    def __enter__(self) -> Kept:
        super().__enter__()
        return self

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held:
            self.storages[storage._cdata] = storage
        return tensor
