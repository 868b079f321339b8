"""Less kept in memory for the backward pass, for some of it computed twice."""

from __future__ import annotations

from functools import partial

from torch import nn
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
