"""pack_patches by CUDA kernels (csrc/cuda/pack_patches.cu): one copies the crops that keep their size; for the others
one makes the weights and another one the patches. A launch takes some 500 crops, and nothing is copied before.

Crops, grids and addresses travel in the launch's parameters, and the kernels write the layout too: so no call waits
for the device, and a CUDA graph can capture it (with its images, crops and grids; replays read the pixels anew).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import launch, native
from ...layout import PackedLayout

if TYPE_CHECKING:
    from .arguments import Packing

__all__ = ["forward", "why_not"]


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where the kernel can run, else the reason."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, and the images are on {device.type}"
    if dtype not in native.DTYPES:
        return f"it makes {', '.join(map(str, native.DTYPES))}, not {dtype}"
    if native.why_not() is not None:
        return native.why_not()
    if not native.library().cuda:
        return f"the native library was built without nvcc: with a CUDA toolkit on PATH, {native.REBUILD}"
    return launch.device_why_not(device.index)


def forward(job: Packing) -> tuple[Tensor, PackedLayout]:
    """As reference.forward, on torch's current stream of the images' device."""
    patches, layout = empty(job)
    if len(job.crops):
        task, _keep = problem(job, patches, layout)
        stream = torch.cuda.current_stream(job.device)
        native.library().pack_patches_cuda(task, stream.device.index, stream.cuda_stream)
    return patches, layout


def empty(job: Packing) -> tuple[Tensor, PackedLayout]:
    """What the kernel is to fill: patches and their layout."""
    if not len(job.crops):
        return torch.empty(job.shape, dtype=job.dtype, device=job.device), job.layout
    layout = PackedLayout.of_tensors(
        tuple(map(tuple, job.grids.tolist())),
        torch.empty(len(job.crops), 2, dtype=torch.int32, device=job.device),
        torch.empty(len(job.crops) + 1, dtype=torch.int32, device=job.device),
    )
    return torch.empty(job.shape, dtype=job.dtype, device=job.device), layout


def problem(job: Packing, patches: Tensor, layout: PackedLayout) -> tuple:
    """(csrc/bindings.cpp's PackPatchesCuda, what has to live until the kernel was launched)."""
    problem, keep = job.native(patches)
    task = native.library().PackPatchesCuda(problem, layout.grids.data_ptr(), layout.cu_seqlens.data_ptr())
    workspace = torch.empty(task.workspace_bytes, dtype=torch.uint8, device=patches.device)
    task.lend(workspace.data_ptr())
    return task, (*keep, workspace)
