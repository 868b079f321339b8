"""What a training step keeps in memory: activations that can be computed again, and parameters that do not change."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from granvit.model.vision import VisionEncoder


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only the input of each transformer block of a GranViT for the backward pass, which computes the rest again.

    Nothing is kept where no gradient flows (a frozen encoder, a teacher), and nothing is computed twice there. An LLM's
    blocks do it in training mode alone (transformers' rule).
    """
    for module in model.modules():
        if isinstance(module, VisionEncoder):
            module.checkpointing = True
        elif isinstance(module, GradientCheckpointingLayer):
            # By hand: what does this for a whole model has another name in almost every version of transformers.
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            module.gradient_checkpointing = True


@torch.no_grad()
def hold_frozen(model: nn.Module, dtype: torch.dtype) -> int:
    """Hold the frozen weights of `model`'s linear layers in `dtype`, that of autocast, where not a bit is lost by it,
    as in an LLM that was published in bfloat16. Returns the bytes that this frees.

    Autocast casts a frozen weight anew at each use, and the backward pass keeps every copy; results are equal to the
    bit without the cast. A table that is also the input's stays as it is, because there its dtype is the activations'.
    From then on these layers run under autocast alone; `model.float()` undoes it.
    """
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    freed = 0
    for weight in _linear_parameters(model):
        if weight.requires_grad or weight in embeddings or weight.dtype == dtype:
            continue
        held = weight.to(dtype)
        if torch.equal(held.to(weight.dtype), weight):
            freed += weight.nbytes - held.nbytes
            weight.data = held
    return freed


def _linear_parameters(model: nn.Module) -> Iterable[nn.Parameter]:
    linear = (module for module in model.modules() if isinstance(module, nn.Linear))
    return dict.fromkeys(parameter for module in linear for parameter in module.parameters(recurse=False))


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
