"""Batches as training has them, to count how often Triton compiles a kernel for them (bench/aot.py: count_only)."""

from __future__ import annotations

import random

import torch


def keys(count: int, dtype_name: str, shared: bool, queries: int, heads: int, size: int) -> dict[str, int]:
    """{kernel: keys that Triton's JIT makes} of the three operators, both ways, over `count` random batches.

    Runs where Triton compiles, not in its interpreter. Nothing is computed: tensors hold what memory held. Their
    addresses are multiples of 16, as those of torch's CUDA allocator are; but what a user hands over may begin at any
    row of a longer tensor, which moves image_index by 8 bytes. shared: the regions share their queries; of these there
    are `queries` for each of `heads` heads of `size`.
    """
    import aot

    from granvit_kernels import PackedLayout
    from granvit_kernels.ops.region_attention import triton_launch as attention
    from granvit_kernels.ops.region_pool import triton_launch as pooling
    from granvit_kernels.ops.roi_gather import triton_launch as gather

    dtype, draw = getattr(torch, dtype_name), random.Random(0)

    def rows(number: int, *rest: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        before = draw.randrange(4)
        tensor = torch.empty(before + number + 1, *rest, dtype=dtype)
        assert tensor.data_ptr() % 16 == 0
        return tensor[before : before + number]

    with aot.count_only(90) as keys_of:
        for _ in range(count):
            images, regions = draw.choice((1, draw.randint(1, 40))), draw.choice((1, 16, draw.randint(1, 300)))
            grids = [(draw.randint(1, 48), draw.randint(1, 48)) for _ in range(images)]
            layout = PackedLayout.from_grids(grids)
            boxes, image_index = rows(regions, 4, dtype=torch.float32), rows(regions, dtype=torch.int64)
            place = layout.grids, layout.cu_seqlens, boxes, image_index

            tokens, grad = rows(layout.num_tokens, heads * size), rows(regions, 7, 7, heads * size)
            gather.forward(tokens, *place, 7, 7, 2)
            gather.backward(grad, *place, layout.num_tokens, 2)

            query = torch.empty(queries, heads, size, dtype=dtype) if shared else rows(regions, queries, heads, size)
            inputs = query, rows(layout.num_tokens, heads, size), rows(layout.num_tokens, heads, size)
            output, lse = attention.forward(*inputs, *place, 0.125, True)
            upstream = rows(regions, queries, heads, size), rows(regions, queries, heads, dtype=torch.float32)
            attention.backward(*upstream, *inputs, output, lse, *place, 0.125, True)

            values = (heads, size) if shared else (1, heads * size)
            logits, value = rows(layout.num_tokens, queries, heads), rows(layout.num_tokens, *values)
            output, lse = pooling.forward(logits, value, *place, True)
            shape = regions, *logits.shape[1:]
            upstream = rows(*shape, values[1]), rows(*shape, dtype=torch.float32)
            pooling.backward(*upstream, logits, value, output, lse, *place, True)
    return {kernel: len(keys) for kernel, keys in keys_of.items()}
