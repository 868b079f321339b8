"""Which of a model's tensors lie in which checkpoint.

The final checkpoint of a phase holds all of the model (but the weights under adapters, which are read where the LLM
is). One of a phase on its way holds what the phase trains: the rest is as it was when the phase began, at the end of
the phase before it or where the model was loaded from.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from granvit.lora import ADAPTER, adapters
from granvit.train.presets import PHASES
from granvit.train.retention import checkpoints_of


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors under the names that they have in a checkpoint. The weights under an LLM's adapters are left
    out: they never change, and are read where the LLM is."""
    under = {f"llm.{name}" for name, _ in model.llm.named_parameters()} if adapters(model.llm) else set()
    under -= {name for name in under if ADAPTER in name}
    return {f"model.{name}": value for name, value in model.state_dict().items() if name not in under}


def learnt_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`model_tensors` without the parameters that do not learn now (see `optimizer.freeze`)."""
    tensors = model_tensors(model)
    frozen = {f"model.{name}" for name in _frozen(model)}
    return {name: value for name, value in tensors.items() if name not in frozen}


def frozen_norm(model: nn.Module) -> float:
    """The norm, in float64, of the parameters that do not learn now, those under adapters too. It tells whether what a
    checkpoint leaves out is still the same. All ranks ask for it together."""
    state, names = model.state_dict(), _frozen(model)
    norms = [torch.linalg.vector_norm(state[name].detach(), dtype=torch.float64) for name in names]
    return math.hypot(*(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) for norm in norms))


def _frozen(model: nn.Module) -> list[str]:
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if not parameter.requires_grad]


def beginning(checkpoints: Path, phase: str) -> Path | None:
    """The final checkpoint with which `phase` begins, in a run's `checkpoints/`; None: with the model as it was built.
    """
    for earlier in reversed(PHASES[: PHASES.index(phase)]):
        written = checkpoints_of(checkpoints, earlier)
        if written and written[-1].name.endswith("-final"):
            return written[-1]
    return None
