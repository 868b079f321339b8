"""pack_patches by the C++ kernel for the CPU (csrc/cpu/pack_patches.cpp)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from granvit_kernels import native
from granvit_kernels.ops.patch_packing.arguments import Packing

why_not = native.cpu_why_not


def forward(job: Packing) -> Tensor:
    """The patches [T, patch_size**2 * 3] in job.dtype."""
    # The kernel reads rows of RGBRGB...: a permuted [3, H, W] is copied, a slice of rows and columns is not.
    images = [image if image.stride()[1:] == (3, 1) else image.contiguous() for image in job.images]
    addresses = np.array([(image.data_ptr(), image.stride(0)) for image in images], dtype=np.int64)
    patches = torch.empty(job.shape, dtype=job.dtype)
    native.library().pack_patches(
        addresses.ctypes.data,
        job.crops.ctypes.data,
        job.grids.ctypes.data,
        len(job.crops),
        job.patch_size,
        [1 / (255 * std) for std in job.std],
        [-mean / std for mean, std in zip(job.mean, job.std, strict=True)],
        job.order == "chw",
        native.DTYPES[job.dtype],
        patches.data_ptr(),
        torch.get_num_threads(),
    )
    return patches
