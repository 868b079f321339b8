"""pack_patches' CUDA kernel on the host, as a backend."""

import torch

from granvit_kernels import native
from granvit_kernels.ops.patch_packing import cuda


class Emulated:
    """The CUDA kernel's blocks, run on the host one after another, over poisoned memory."""

    backwards = False  # the order of what a phase's threads do

    def why_not(self, device, dtype):
        return None if dtype in native.DTYPES else f"not {dtype}"

    def forward(self, job):
        patches, layout = cuda.empty(job)
        patches.fill_(torch.nan)
        layout.grids.fill_(-1), layout.cu_seqlens.fill_(0 if len(layout) == 0 else -1)
        task, _keep = cuda.problem(job, patches, layout)
        native.library().pack_patches_emulated(task, self.backwards)
        return patches, layout
