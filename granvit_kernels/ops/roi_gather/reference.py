"""RoIAlign on packed tokens in plain PyTorch: the specification. Any device and floating dtype; autograd.

Formula: Mask R-CNN's RoIAlign (He et al. 2017, section 3) with half-pixel alignment, as
torchvision.ops.roi_align with aligned=True and spatial_scale=1 computes it. The four corners of a sample are
weighted bilinearly, and a sample's weight is the product of a row's and a column's: so a bin is the sum of
(row weight * column weight * token) over the rows and columns that its samples touch, over the number of
samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """It runs everywhere."""
    return None


def forward(
    tokens: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
    out_h: int, out_w: int, sampling_ratio: int,
) -> Tensor:  # fmt: skip
    """tokens [T, C], the layout's tensors, boxes float32 [R, 4], image_index [R] -> [R, out_h, out_w, C].

    A box that is not finite, or whose index names no image, reads nothing and gives zeros. Accumulates in
    float32 at least.
    """
    compute = torch.promote_types(tokens.dtype, torch.float32)
    outputs = []
    sides, starts, images = grids.tolist(), cu_seqlens.tolist(), image_index.tolist()
    boxes = boxes.cpu()
    finite = boxes.isfinite().all(1).tolist()
    for box, image, fine in zip(boxes, images, finite, strict=True):
        if not fine or not 0 <= image < len(sides):
            outputs.append(tokens.new_zeros(out_h, out_w, tokens.shape[1], dtype=compute))
            continue
        h, w = sides[image]
        feature = tokens[starts[image] : starts[image + 1]].unflatten(0, (h, w))
        rows = axis_weights(box[1], box[3], h, out_h, sampling_ratio)
        columns = axis_weights(box[0], box[2], w, out_w, sampling_ratio)
        # Only the cells that the box reads: 0 times infinity would carry what is not finite to others and from them.
        y, x = (weights.any(0).nonzero().flatten() for weights in (rows, columns))
        feature = feature[y.to(tokens.device)][:, x.to(tokens.device)].to(compute)
        rows, columns = rows[:, y].to(feature), columns[:, x].to(feature)
        with torch.autocast(tokens.device.type, enabled=False):
            outputs.append(torch.einsum("qw,pwc->pqc", columns, torch.einsum("ph,hwc->pwc", rows, feature)))
    if not outputs:
        return tokens.new_zeros(0, out_h, out_w, tokens.shape[1])
    return torch.stack(outputs).to(tokens.dtype)


def axis_weights(low: Tensor, high: Tensor, size: int, bins: int, sampling_ratio: int) -> Tensor:
    """Share of each of `size` cells in each of `bins` bins along one axis: float64 [bins, size].

    low, high: the box's two ends, float32 scalars on the CPU. Sample positions are float32 in torchvision's
    order of operations, one rounding each: they decide which cells are read. Only samples within [-1, size]
    are visited, and those at one position together: a huge box has a great many.
    """
    weights = torch.zeros(bins, size, dtype=torch.float64)
    start = low - 0.5
    bin_size = ((high - 0.5) - start) / bins
    if not bin_size.isfinite():  # ends so far apart that their distance overflows: no sample has a place
        return weights
    samples = sampling_ratio if sampling_ratio > 0 else min(int(bin_size.ceil()), 2**62)
    if samples <= 0:
        return weights
    rising = bool(bin_size >= 0)
    for index in range(bins):
        offset = start + index * bin_size

        def position(sample: int, offset: Tensor = offset) -> Tensor:
            """Rises with the sample's number, which counts backwards in an inverted box."""
            sample = sample if rising else samples - 1 - sample
            return offset + (torch.tensor(sample, dtype=torch.float32) + 0.5) * bin_size / float(samples)

        sample = first(samples, lambda s: position(s) >= -1)
        end = first(samples, lambda s: position(s) > size)
        while sample < end:
            here = position(sample)
            following = sample + 1
            if following < end and position(following) == here:
                following = first(end, lambda s, here=here: position(s) > here)
            share = (following - sample) / samples
            at = here.clamp(min=0)
            cell = min(int(at), size - 1)
            upper = float(at - cell) if cell < size - 1 else 0.0
            weights[index, cell] += share * (1 - upper)
            if cell < size - 1:
                weights[index, cell + 1] += share * upper
            sample = following
    return weights


def first(count: int, passes: Callable[[int], bool]) -> int:
    """The first number in [0, count) that passes, count if none does; all after one that passes must, too."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle + 1, high)
    return low


def backward(
    grad: Tensor, grids: Tensor, cu_seqlens: Tensor, boxes: Tensor, image_index: Tensor,
    num_tokens: int, sampling_ratio: int,
) -> Tensor:  # fmt: skip
    """grad [R, out_h, out_w, C] -> the tokens' gradient [num_tokens, C], by autograd: it is linear."""
    _, out_h, out_w, channels = grad.shape
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        tokens = grad.new_zeros(num_tokens, channels, requires_grad=True)
        output = forward(tokens, grids, cu_seqlens, boxes, image_index, out_h, out_w, sampling_ratio)
        if not output.requires_grad:  # no box reads anything
            return tokens.detach()
        return torch.autograd.grad(output, tokens, grad)[0]
