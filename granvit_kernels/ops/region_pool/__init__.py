"""region_pool: softmax of given logits over the tokens under each box, times their values, off packed tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from ...layout import PackedLayout
from ...registration import autocast
from .op import CANDIDATES, operator

__all__ = ["CANDIDATES", "region_pool"]


def region_pool(
    logits: Tensor,
    value: Tensor,
    layout: PackedLayout,
    boxes: Tensor,
    image_index: Tensor,
    coverage: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Weighted mean of the values under each box: attention whose logits don't depend on the region.

    output[r, k, h] = sum over tokens t of softmax(logits[t, k, h]) value[t, h], over the tokens whose cell meets box
    r with positive area: [R, K, H, D] in value's dtype, accumulated in float32. Cell (y, x) of an image is the square
    [x, x + 1] x [y, y + 1]. Nothing of size [R, T] is made.

    It is region_attention for queries that all regions share, where logits = scale * query . key. There keys need not
    be made at all: the logits of features x are one matrix product, x (W_key^T query). Nor need values, with
    value = x and W_value applied to the output.

    What is not finite stays with its region and head: it reaches that region's output and the gradients of the tokens
    under its box, and no others.

    logits [T, K, H]: in value's dtype, or float32; any strides.
    value [T, H, D], or [T, 1, D] shared by all heads: float32, bfloat16, float16, or float64 (in the reference); any
        strides. Both get gradients, each in its dtype; once differentiable, deterministic, on the CPU bit-equal for
        any number of threads. Under autocast value is cast to its dtype, and so are logits that are not float32.
    layout: of logits and value, on their device.
    boxes float32 [R, 4]: xyxy in patch units, image i spanning [0, w] x [0, h] (PackedLayout.to_grid); no gradient. A
        box that meets no cell (inverted, empty or outside) gives zeros, lse -inf, and takes part in no gradient.
    image_index int32 or int64 [R]: the image of each box.
    coverage: multiply a token's weight, before they are normalised, by the share of its cell that the box covers, so
        that boxes smaller than a cell still differ.
    return_lse: return (output, lse), lse [R, K, H] float32 (float64 for float64): the natural log of the sum of the
        weights, exp(logits) times the shares with coverage; differentiable.
    Raises ValueError for other shapes, dtypes or devices and, on the CPU, for a box that is not finite or an index
    outside the layout; on a device such a box reads nothing and gives zeros.
    """
    checks.kinds(layout, logits=logits, value=value, boxes=boxes, image_index=image_index)
    (value,) = autocast(value)
    if logits.dtype != torch.float32:
        (logits,) = autocast(logits)
    _check(logits, value, layout)
    checks.boxes(boxes, image_index)
    checks.same_device(logits.device, value=value, layout=layout.grids, boxes=boxes, image_index=image_index)
    output, lse = operator(
        logits, value, layout.grids, layout.cu_seqlens, boxes, image_index, bool(coverage)
    )  # fmt: skip
    return (output, lse) if return_lse else output


def _check(logits: Tensor, value: Tensor, layout: PackedLayout) -> None:
    """Shapes and dtypes of the two."""
    checks.packed("logits", logits, layout.num_tokens, 3, "[T, K, H]")
    checks.packed("value", value, layout.num_tokens, 3, "[T, H, D] or [T, 1, D]")
    for name, tensor, sizes in (("logits", logits, "K and H"), ("value", value, "H and D")):
        if 0 in tensor.shape[1:]:
            raise ValueError(f"{name} is {checks.describe(tensor)}; it takes {sizes} of at least 1")
    if value.shape[1] not in (1, logits.shape[2]):
        raise ValueError(
            f"value is {checks.describe(value)}; it takes H = {logits.shape[2]} heads as logits has, or 1 for all"
        )
    if logits.dtype not in (torch.float32, value.dtype):
        raise ValueError(
            f"logits is {checks.describe(logits)}; it takes float32 or value's dtype, and value is "
            f"{checks.describe(value)}"
        )
