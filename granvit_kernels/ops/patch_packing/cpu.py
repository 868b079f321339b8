"""pack_patches by the C++ kernel for the CPU (csrc/cpu/pack_patches.cpp)."""

from __future__ import annotations

import torch

from granvit_kernels import native
from granvit_kernels.ops.patch_packing.arguments import Packing

why_not = native.cpu_why_not


def forward(job: Packing) -> torch.Tensor:
    """The patches [T, patch_size**2 * 3] in job.dtype."""
    # The kernel reads rows of RGBRGB...: other layouts (a permuted [3, H, W], say) are copied, sliced rows are not.
    images = [image if image.stride()[1:] == (3, 1) else image.contiguous() for image in job.images]
    addresses = torch.tensor([[image.data_ptr(), image.stride(0)] for image in images], dtype=torch.int64)
    patches = torch.empty(job.num_tokens, job.patch_values, dtype=job.dtype)
    native.library().pack_patches(
        addresses.data_ptr(),
        job.crops.data_ptr(),
        job.grids.data_ptr(),
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
