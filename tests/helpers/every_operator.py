"""Every public operator of granvit_kernels, or of a copy of it, called once on the same inputs, with gradients."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BOXES = [[0.5, 0.5, 3.2, 2.0], [-1.0, 0.0, 9.0, 6.0], [4.0, 5.0, 2.0, 3.0], [1.25, 0.5, 1.5, 0.75]]


def results(kernels: ModuleType) -> dict[str, list[Any]]:
    """{name in kernels.__all__: what it gave, and the gradients of its inputs}."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    layout = kernels.PackedLayout.from_grids([(3, 4), (5, 2)])
    place = layout, torch.tensor(BOXES), torch.tensor([0, 1, 0, 1])
    given: dict[str, list[Any]] = {}

    def both_ways(name: str, leaves: list[Tensor], outputs: Any) -> None:
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        # A box that meets nothing has lse -inf, and no gradient.
        total = sum(output.nan_to_num(neginf=0).square().sum() for output in outputs)
        given[name] = [*(output.detach() for output in outputs), *torch.autograd.grad(total, leaves)]

    tokens = leaf(layout.num_tokens, 6)
    both_ways("roi_gather", [tokens], kernels.roi_gather(tokens, *place, output_size=(2, 3)))
    query, key, value = leaf(3, 2, 8), leaf(layout.num_tokens, 2, 8), leaf(layout.num_tokens, 2, 8)
    attended = kernels.region_attention(query, key, value, *place, coverage=True, return_lse=True)
    both_ways("region_attention", [query, key, value], attended)
    logits, shared = leaf(layout.num_tokens, 2, 3), leaf(layout.num_tokens, 1, 10)
    both_ways("region_pool", [logits, shared], kernels.region_pool(logits, shared, *place, True, return_lse=True))

    images = [torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8) for h, w in ((20, 33), (16, 8))]
    half = [0.5] * 3
    grids = [kernels.fit_grid(20, 33, 4, 12), (2, 2)]
    patches, packed = kernels.pack_patches(images, 4, half, half, grids=grids, dtype=torch.float32)
    given["pack_patches"] = [patches]
    given["PackedLayout"] = [packed.grids, packed.cu_seqlens, packed.positions()]
    given["fit_grid"] = [list(grids[0])]
    given["unpack_patches"] = kernels.unpack_patches(patches, packed, 4, half, half)
    given["plan_packing"] = kernels.plan_packing([5, 3, 8, 2, 1], 8)
    return given
