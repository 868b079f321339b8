"""From what somebody typed to a frozen encoder that gives features of regions, and the floor of plain pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from granvit.eval.maps import PatchFeatures, load_features
from granvit.model.adapter import patch_side
from granvit.model.config import cached_fit_grid
from granvit_kernels import pack_patches, roi_gather

GRIDS = {"1x1": (1, 1), "7x7": (7, 7)}
"""By name, the cells (rows, columns) in which a region's features are read."""

RANDOM = "random:"


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder in eval mode and in float32, with the pixels and the patches an image that it takes."""

    name: str
    features: PatchFeatures

    @property
    def patch_size(self) -> int:
        return patch_side(self.features.encoder.config)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of so many pixels."""
        return cached_fit_grid(height, width, self.patch_size, self.features.max_patches)

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], boxes: Tensor, image_index: Tensor) -> dict[str, Tensor]:
        """Features of boxes: RoIAlign of the patches' features, in float32, as many samples a cell as it has patches.

        images: uint8 [H, W, 3]. boxes: float32 [R, 4], relative xyxy, and image_index, int64 [R], the image of each.
        Returns {name of GRIDS: [R, rows * columns * C]}.
        """
        encoder, device = self.features.encoder, next(self.features.encoder.parameters()).device
        patches, layout = pack_patches(
            [image.to(device) for image in images],
            self.patch_size,
            self.features.image_mean,
            self.features.image_std,
            grids=torch.tensor([self.grid(*image.shape[:2]) for image in images]),
            dtype=torch.float32,
            resample=self.features.image_resample,
            round=self.features.image_round,
        )
        tokens, image_index = encoder(patches, layout), image_index.to(device)
        boxes = layout.to_grid(boxes.to(device), image_index)
        return {
            name: roi_gather(tokens, layout, boxes, image_index, size, sampling_ratio=0).flatten(1)
            for name, size in GRIDS.items()
        }

    def about(self) -> dict[str, Any]:
        """What a result says of the encoder."""
        config = self.features.encoder.config
        return {
            "type": config.model_type, "width": config.hidden_size,
            "parameters": sum(p.numel() for p in self.features.encoder.parameters()), "patch_size": self.patch_size,
            "max_patches": self.features.max_patches,
        }  # fmt: skip


@dataclass(frozen=True)
class Pixels:
    """The floor: a region's crop, resized to the grid's cells. 1x1 is its mean colour."""

    name: str = "pixels"

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return GRIDS["7x7"]

    def __call__(self, images: Sequence[Tensor], boxes: Tensor, image_index: Tensor) -> dict[str, Tensor]:
        """As FrozenEncoder's: {name: [R, rows * columns * 3]}, values from 0 to 1."""
        # In float64, in which no box of float32 that has an area loses it.
        sides = torch.tensor([[image.shape[1], image.shape[0]] * 2 for image in images], dtype=torch.float64)
        crops = torch.cat([image_index[:, None].double(), boxes.double() * sides[image_index]], 1)
        made = {}
        for name, (rows, columns) in GRIDS.items():
            grids = torch.tensor([(rows, columns)] * len(boxes))
            cells, _ = pack_patches(images, 1, [0.0] * 3, [1.0] * 3, crops=crops, grids=grids, dtype=torch.float32)
            made[name] = cells.view(len(boxes), rows * columns * 3)
        return made

    def about(self) -> dict[str, Any]:
        return {"type": "pixels", "width": 3}


def split_name(spec: str) -> tuple[str, str]:
    """NAME=ENCODER -> its name and the rest; of ENCODER by itself both are the whole."""
    name, equals, path = spec.partition("=")
    return (name, path) if equals and name and path else (spec, spec)


def check_names(specs: Sequence[str]) -> None:
    """ValueError for two encoders of one name, and for the name of the floor."""
    names = [split_name(spec)[0] for spec in specs]
    for name in names:
        if names.count(name) > 1 or name == Pixels.name:
            raise ValueError(f"two encoders are called {name!r}; write NAME=ENCODER to tell them apart")


def load(spec: str, device: str = "cpu", max_patches: int | None = None) -> FrozenEncoder:
    """The encoder that [NAME=]ENCODER means: a run, an export, or a checkpoint that load_features takes (a folder or a
    hub name); with "random:" before it the same with random weights, drawn with seed 0, on the same pixels.

    max_patches: of an image; None: as it was trained. Raises ValueError for what is no encoder.
    """
    name, path = split_name(spec)
    is_random = path.startswith(RANDOM)
    path = path.removeprefix(RANDOM)
    if (Path(path) / "manifest.json").is_file():
        raise ValueError(
            f"{path} is a checkpoint of a run: `granvit export {path} --output DIR --format encoder` takes "
            "its encoder out"
        )
    features = load_features(path, device)
    if is_random:
        features = features.with_random_weights()
    features.encoder.float().eval()
    return FrozenEncoder(name, replace(features, max_patches=max_patches or features.max_patches))
