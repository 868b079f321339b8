"""The image processors of transformers that pack_patches reproduces, and how: one Family each.

`patches` of a processor's output and `pack` of the same pictures are equal to float32's rounding, where the processor
uses Pillow; tests/kernels/test_patch_processors.py says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL
import torch
from torch import Tensor

from granvit_kernels import fit_grid, pack_patches

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ROUND = "pil13" if int(PIL.__version__.split(".")[0]) >= 13 else "pil"
"""What the Pillow installed here does."""


@dataclass(frozen=True)
class Family:
    """module, name: of the processor in transformers.models. settings: of the processor. arguments(images): those of
    pack_patches that hold for this family. patches(output): a processor's output as pack_patches orders it."""

    module: str
    name: str
    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    arguments: Callable[[Sequence[Tensor]], dict[str, Any]]
    patches: Callable[[Mapping[str, Tensor]], Tensor]
    settings: dict[str, Any] = field(default_factory=dict)

    def processor(self, pillow: bool) -> Callable[..., Mapping[str, Tensor]]:
        """The one that uses Pillow, or the one that uses torchvision. ModuleNotFoundError where that is missing."""
        if not pillow:
            importlib.import_module("torchvision")  # without it some of transformers' fail in calls, by a NameError
        kind, ending = ("_pil", "Pil") if pillow else ("", "")
        module = importlib.import_module(f"transformers.models.{self.module}.image_processing{kind}_{self.module}")
        return getattr(module, f"{self.name}ImageProcessor{ending}")(**self.settings)

    def pack(self, images: Sequence[Tensor], dtype: torch.dtype = torch.float32, round: str | None = ROUND) -> Tensor:
        """[T, patch**2 * 3] of uint8 images [H, W, 3]."""
        return pack_patches(
            images, self.patch, self.mean, self.std, dtype=dtype, round=round, **self.arguments(images)
        )[0]


def cut(side: int, patch: int) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Patches, "chw", of pixel_values [B, 3, side, side]."""
    n = side // patch
    return lambda output: (
        output["pixel_values"].reshape(-1, 3, n, patch, n, patch).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * patch**2)
    )


def centre(short: int, side: int) -> Callable[[Sequence[Tensor]], dict[str, Any]]:
    """The shorter edge to `short` pixels, then the square in the middle."""

    def arguments(images: Sequence[Tensor]) -> dict[str, Any]:
        sizes, crops = [], []
        for i, (height, width, _) in enumerate(image.shape for image in images):
            long = int(short * max(height, width) / min(height, width))
            sizes.append((short, long) if height <= width else (long, short))
            top, left = ((length - side) // 2 for length in sizes[-1])
            crops.append((i, left, top, left + side, top + side))
        return dict(sizes=sizes, crops=crops, resample="bicubic", order="chw")

    return arguments


def squashed(side: int) -> Callable[[Sequence[Tensor]], dict[str, Any]]:
    """Every image to side x side patches."""
    return lambda images: dict(grids=[(side, side)] * len(images), resample="bicubic", order="chw")


def naflex(images: Sequence[Tensor]) -> dict[str, Any]:
    return dict(grids=[fit_grid(*image.shape[:2], 16, 256) for image in images])


def smart(images: Sequence[Tensor]) -> dict[str, Any]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    sizes = [smart_resize(*image.shape[:2], 28, 56 * 56, 28 * 28 * 1280) for image in images]
    return dict(grids=[(h // 14, w // 14) for h, w in sizes], resample="bicubic", order="chw", merge=2)


FAMILIES = {
    "SigLIP2 NaFlex": Family(
        "siglip2", "Siglip2", 16, HALF, HALF, naflex,
        lambda output: output["pixel_values"][output["pixel_attention_mask"].bool()],
    ),
    "SigLIP": Family("siglip", "Siglip", 16, HALF, HALF, squashed(14), cut(224, 16)),
    "CLIP": Family("clip", "CLIP", 14, CLIP_MEAN, CLIP_STD, centre(224, 224), cut(224, 14)),
    "DINOv2": Family(
        "bit", "Bit", 14, IMAGENET_MEAN, IMAGENET_STD, centre(256, 224), cut(224, 14),
        dict(image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, size={"shortest_edge": 256}),
    ),
    # A still picture is two equal frames a patch: patches.unflatten(1, (3, 1, -1)).expand(-1, 3, 2, -1).flatten(1)
    "Qwen2-VL": Family(
        "qwen2_vl", "Qwen2VL", 14, CLIP_MEAN, CLIP_STD, smart,
        lambda output: output["pixel_values"].unflatten(1, (3, 2, -1))[:, :, 0].flatten(1),
    ),
}  # fmt: skip
