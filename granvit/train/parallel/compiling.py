"""torch.compile of the transformer blocks, for batches whose sizes differ from step to step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from transformers.modeling_layers import GradientCheckpointingLayer

from granvit.model.vision import Layer

FORMS = 64
"""Compiled forms of one block's code that are kept: those of a frozen part and of a trained one, with gradients and
without, in every stage of a run. From torch's default of 8 on, blocks would run uncompiled without a word."""


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks of a GranViT, an encoder or an LLM: ours, and what transformers knows as an LLM's."""
    return (module for module in model.modules() if isinstance(module, Layer | GradientCheckpointingLayer))


def compile_blocks(model: nn.Module) -> None:
    """Compile each transformer block of a GranViT or an encoder, for any number of tokens and images.

    All blocks of a kind share their compiled code. It is made when a step first needs it: with gradients and without,
    frozen and trained, and for a single sequence, which torch keeps apart from several. A deep copy, such as a
    teacher, is not compiled: compile it too. Call this before fully_shard; evaluate under `eager`, or generation,
    whose sizes are others, would be compiled as well.
    """
    dynamo.recompile_limit = max(FORMS, dynamo.recompile_limit)
    dynamo.optimize_ddp = False  # cuts graphs at DDP's buckets, for models that are compiled whole
    for block in blocks(model):
        block.compile(dynamic=True)


def eager() -> torch.compiler.set_stance:
    """A context in which compiled blocks run as if they were not."""
    return torch.compiler.set_stance("force_eager")


def compiled_graphs() -> int:
    """How many graphs this process has compiled. What is added after the first steps are recompilations."""
    return counters["stats"]["unique_graphs"]
