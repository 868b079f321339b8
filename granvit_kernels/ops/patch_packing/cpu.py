"""pack_patches by the C++ kernel for the CPU (csrc/cpu/pack_patches.cpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import native
from ...layout import PackedLayout
from ...native import cpu_why_not as why_not

if TYPE_CHECKING:
    from .arguments import Packing

__all__ = ["forward", "why_not"]


def forward(job: Packing) -> tuple[Tensor, PackedLayout]:
    """As reference.forward."""
    patches = torch.empty(job.shape, dtype=job.dtype)
    problem, _keep = job.native(patches)
    native.library().pack_patches(problem, torch.get_num_threads())
    return patches, job.layout
