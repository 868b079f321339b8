"""region_attention: each region's queries attend to the tokens under its box, straight off packed tokens."""

from __future__ import annotations

import math

from torch import Tensor

from ... import checks
from ...layout import PackedLayout
from ...registration import autocast
from .op import CANDIDATES, operator

__all__ = ["CANDIDATES", "region_attention"]


def region_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    boxes: Tensor,
    image_index: Tensor,
    scale: float | None = None,
    coverage: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each region's queries over the tokens whose cell meets its box with positive area.

    output[r, k, h] = sum over those tokens t of softmax(scale * query[r, k, h] . key[t, h]) value[t, h]:
    [R, K, H, D] in query's dtype (under autocast: in its dtype), accumulated in float32. Cell (y, x) of an
    image is the square [x, x + 1] x [y, y + 1]. Time and memory go with the covered tokens: nothing of size
    [R, T] is made.

    What is not finite stays with its region and head: it reaches that region's output, its queries' gradient and the
    gradients of the tokens under its box, any element of them, and no others.

    query [R, K, H, D], or [K, H, D] shared by all regions: float32, bfloat16, float16, or float64 (in the
        reference).
    key, value [T, H, D]: of query's dtype, any strides. All three get gradients, once differentiable;
        deterministic, on the CPU bit-equal for any number of threads.
    layout: of key and value, on their device.
    boxes float32 [R, 4]: xyxy in patch units, image i spanning [0, w] x [0, h] (PackedLayout.to_grid); no
        gradient. A box that meets no cell (inverted, empty or outside) gives zeros, lse -inf, and takes part
        in no gradient.
    image_index int32 or int64 [R]: the image of each box.
    scale: of the logits, a finite number; None is D**-0.5.
    coverage: add log(share of the token's cell that the box covers) to its logit, so that boxes smaller than
        a cell still differ.
    return_lse: return (output, lse), lse [R, K, H] float32 (float64 for float64): the natural log of the sum
        of the logits' exponentials, scale and coverage included; differentiable.
    Raises ValueError for other shapes, dtypes or devices and, on the CPU, for a box that is not finite or an
    index outside the layout; on a device such a box reads nothing and gives zeros.
    """
    checks.kinds(layout, query=query, key=key, value=value, boxes=boxes, image_index=image_index)
    device = query.device
    query, key, value = autocast(query, key, value)
    _check(query, key, value, layout)
    checks.boxes(boxes, image_index)
    if query.dim() == 4 and query.shape[0] != boxes.shape[0]:
        raise ValueError(
            f"query is {checks.describe(query)}; [R, K, H, D] takes R = {boxes.shape[0]}, the number of boxes"
        )
    checks.same_device(
        device, key=key, value=value, layout=layout.grids, boxes=boxes, image_index=image_index
    )
    scale = query.shape[-1] ** -0.5 if scale is None else _finite(scale)
    output, lse = operator(
        query, key, value, layout.grids, layout.cu_seqlens, boxes, image_index, float(scale), bool(coverage)
    )  # fmt: skip
    return (output, lse) if return_lse else output


def _finite(scale: float) -> float:
    try:
        number = float(scale)
    except (TypeError, ValueError):
        number = math.nan
    if not -math.inf < number < math.inf:
        raise ValueError(f"scale is {checks.shown(scale)}; it takes a finite number or None")
    return number


def _check(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout) -> None:
    """Shapes and dtypes of the three."""
    checks.float_dtype("query", query)
    if query.dim() not in (3, 4) or 0 in query.shape[-3:]:
        raise ValueError(
            f"query is {checks.describe(query)}; it takes [R, K, H, D] or [K, H, D], with K, H and D at least 1"
        )
    for name, tensor in (("key", key), ("value", value)):
        checks.packed(name, tensor, layout.num_tokens, 3, "[T, H, D]")
        if tensor.shape[1:] != query.shape[-2:] or tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} is {checks.describe(tensor)}; it takes query's dtype, H and D, and query is "
                f"{checks.describe(query)}"
            )
