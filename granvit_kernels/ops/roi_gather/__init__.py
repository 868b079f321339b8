"""roi_gather: RoIAlign read straight off packed tokens."""

from __future__ import annotations

from torch import Tensor

from ... import checks
from ...layout import PackedLayout
from .op import CANDIDATES, operator

__all__ = ["CANDIDATES", "roi_gather"]


def roi_gather(
    tokens: Tensor,
    layout: PackedLayout,
    boxes: Tensor,
    image_index: Tensor,
    output_size: int | tuple[int, int] = (7, 7),
    sampling_ratio: int = 2,
) -> Tensor:
    """Features of boxes, each on a grid of output_size bins: [R, oh, ow, C], of the tokens' dtype.

    RoIAlign (He et al., Mask R-CNN, 2017; aligned=True): a bin is the mean of sampling_ratio x sampling_ratio
    bilinear samples, spread evenly over it. What torchvision.ops.roi_align(spatial_scale=1, aligned=True)
    gives on each image's own feature map. Samples more than one patch outside the image count as zeros.

    What is not finite in a token reaches only the boxes that read it, and in a gradient only the tokens that its box
    reads.

    tokens [T, C]: float32, bfloat16 or float16 (accumulated in float32; float64 in the reference). Only they
        get a gradient, once differentiable. Autocast leaves their dtype alone.
    layout: of those tokens, on their device.
    boxes float32 [R, 4]: xyxy in patch units, image i spanning [0, w] x [0, h] (PackedLayout.to_grid).
        Inverted and empty boxes do what they do in torchvision.
    image_index int32 or int64 [R]: the image of each box.
    sampling_ratio: samples a bin and axis, at most 1024; 0 or less is adaptive, ceil(bin size) without limit, as
        in torchvision.
    Raises ValueError for other shapes, dtypes or devices and, on the CPU, for a box that is not finite or an
    index outside the layout; on a device such a box reads nothing and gives zeros.
    """
    checks.kinds(layout, tokens=tokens, boxes=boxes, image_index=image_index)
    checks.packed("tokens", tokens, layout.num_tokens, 2, "[T, C]")
    checks.boxes(boxes, image_index)
    checks.same_device(tokens.device, layout=layout.grids, boxes=boxes, image_index=image_index)
    out_h, out_w = _bins(output_size)
    # Every sample is visited, and 1024 a bin are already about as close as float32 can place them in a large image.
    samples = max(checks.integer("sampling_ratio", sampling_ratio, high=1024), 0)
    return operator(tokens, layout.grids, layout.cu_seqlens, boxes, image_index, out_h, out_w, samples)


def _bins(output_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    try:
        out_h, out_w = sides
        return checks.integer("height", out_h, 1, 2**31 - 1), checks.integer("width", out_w, 1, 2**31 - 1)
    except ValueError:
        raise ValueError(
            f"output_size is {checks.shown(output_size)}; it takes (height, width), both at least 1 and below 2**31, "
            "or one number for both"
        ) from None
