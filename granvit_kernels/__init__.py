"""Operators on packed token sequences: many images' tokens in one [T, C] tensor, described by PackedLayout.

`python -m granvit_kernels` prints which backend runs where, and why the others don't.
"""

from .layout import PackedLayout, fit_grid
from .ops.patch_packing import pack_patches, plan_packing, unpack_patches
from .ops.region_attention import region_attention
from .ops.roi_gather import roi_gather

__all__ = [
    "PackedLayout",
    "fit_grid",
    "pack_patches",
    "plan_packing",
    "region_attention",
    "roi_gather",
    "unpack_patches",
]
