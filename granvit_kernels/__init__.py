"""Operators on packed token sequences: many images' tokens in one [T, C] tensor, described by PackedLayout.

`python -m granvit_kernels` prints which backend runs where, and why the others don't.

On CUDA no operator waits for the device, and all can be captured in a CUDA graph. Before a capture, call each once as
it will be captured (shapes, dtypes, options; the backward too) and make its PackedLayouts. A first call loads the
native library, and compiles Triton's kernels for its dtype, channels, heads and options: that takes a second each and
fails inside a capture.
"""

from .layout import PackedLayout, fit_grid
from .ops.patch_packing import pack_patches, plan_packing, unpack_patches
from .ops.region_attention import region_attention
from .ops.region_pool import region_pool
from .ops.roi_gather import roi_gather

__all__ = [
    "PackedLayout",
    "fit_grid",
    "pack_patches",
    "plan_packing",
    "region_attention",
    "region_pool",
    "roi_gather",
    "unpack_patches",
]
