"""Boxes and tensors of every sort, for the tests of region_attention's and region_pool's kernels."""

import numpy as np
import torch

BOXES = [
    [0.5, 0.5, 2.2, 2.0],  # parts of cells
    [-5.0, -1e30, 1e30, 9.0],  # far larger than its image
    [1.0, 1.0, 2.0, 2.0],  # exactly one cell
    [1.25, 0.5, 1.5, 0.75],  # inside one cell
    [2.0, 2.0, 1.0, 1.0],  # inverted
    [1.0, 0.0, 1.0, 3.0],  # no width
    [-3.0, -3.0, 0.0, 0.0],  # touches the image's corner from outside
    [50.0, 50.0, 60.0, 60.0],  # outside
]
UNREADABLE = [[0.0, 0.0, float("nan"), 2.0], [0.0, float("-inf"), 2.0, 2.0]]

VIEWS = {
    "of more heads": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second value": lambda x: x.repeat_interleave(2, 2)[..., ::2],
    "odd rows": lambda x: torch.nn.functional.pad(x, (0, 3))[..., : x.shape[2]],
}
"""{name: what makes another view of the same numbers of x [T, H, D]}."""


def far_apart(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x with a stride of 2**31 along `dim`: 4 GiB of addresses for each entry of it, a few pages of memory."""
    strides = [2**31 if d == dim else stride for d, stride in enumerate(x.stride())]
    storage = torch.from_numpy(np.empty(2**31 * (x.shape[dim] - 1) + x.numel(), np.float16))
    return storage.as_strided(x.shape, strides).copy_(x)
