"""Vision transformers of transformers as the encoder, on packed patches: CLIP, DINOv2, DINOv3, AIMv2, InternViT, ViT.

Each runs its own forward pass, once for all images of one grid, so features and gradients are those of the model by
itself. It is slower than `VisionEncoder`, which takes images of any grids in one pass.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from granvit_kernels import PackedLayout

_RANDOM = {
    "attention_dropout": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
    "projection_dropout": 0.0, "drop_path_rate": 0.0, "pos_embed_shift": None, "pos_embed_jitter": None,
    "pos_embed_rescale": None,
}  # fmt: skip
"""What models draw at random in training, and the value that turns it off."""


@dataclass(frozen=True)
class Family:
    """How a vision model of transformers is asked for its patch tokens.

    model: its class in transformers. class_token: whether one stands before the patches; registers follow it where the
    configuration counts some. arguments: of its forward pass. build: of its constructor. settings: of its
    configuration. table: the nn.Embedding of positions that the model does not interpolate itself. prefix: of its
    weights' names in a whole model's checkpoint, where transformers does not know it.
    """

    model: str
    class_token: bool = True
    arguments: dict[str, Any] = field(default_factory=dict)
    build: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    table: str | None = None
    prefix: str | None = None

    @property
    def kind(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.model)


_INTERPOLATE = {"interpolate_pos_encoding": True}

FAMILIES = {
    "clip_vision_model": Family("CLIPVisionModel", arguments=_INTERPOLATE),
    "dinov2": Family("Dinov2Model"),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel"),
    "dinov3_vit": Family("DINOv3ViTModel"),
    "aimv2_vision_model": Family(
        "Aimv2VisionModel", class_token=False, settings={"use_head": False}, table="position_embedding",
        prefix=r"^vision_model\.",
    ),
    "internvl_vision": Family("InternVLVisionModel", prefix=r"^(model\.)?vision_tower\."),
    "vit": Family("ViTModel", arguments=_INTERPOLATE, build={"add_pooling_layer": False}),
}
"""By the type of the vision model's configuration."""

WHOLE = {"clip": "clip_vision_model", "aimv2": "aimv2_vision_model", "internvl": "internvl_vision"}
"""Types of whole models, and of the vision model in them."""


class AdaptedEncoder(nn.Module):
    """A vision model of transformers behind the interface of `VisionEncoder`: packed patches in, packed features out.

    Images of equal grids are one batch of the model. Class and register tokens take part in it and are left out of the
    features, which are its last_hidden_state: after the last norm, but for CLIP, which norms its class token alone.
    Positions are interpolated as the model does it; AIMv2's of one resolution, which it does not, bicubic as CLIP's.
    Dropout, stochastic depth and DINOv3's shifting of positions are off, in training too.

    config: the vision model's (see FAMILIES). model: its weights, taken as they are; None: random ones.
    Raises ValueError for another configuration. Warns once that it is slower than ours.
    """

    def __init__(self, config: PretrainedConfig, model: PreTrainedModel | None = None):
        super().__init__()
        self.family = FAMILIES[config.model_type]
        self.config = adapted(config)
        self.patch_size = patch_side(self.config)
        self.leading = int(self.family.class_token) + getattr(self.config, "num_register_tokens", 0)
        self.model = self.family.kind(self.config, **self.family.build) if model is None else model
        self.tables = []  # no modules of this one: they are the model's
        for parent in list(self.model.modules()) if self.family.table else ():
            if isinstance(getattr(parent, self.family.table, None), nn.Embedding):
                setattr(parent, self.family.table, PositionTable(getattr(parent, self.family.table)))
                self.tables.append(getattr(parent, self.family.table))
        _say_slower(self.family.model)

    def forward(self, patches: Tensor, layout: PackedLayout) -> Tensor:
        """patches [T, patch_size**2 * 3] in the order "hwc", as pack_patches returns them -> features [T, C]."""
        tokens = layout.num_tokens
        if not tokens:  # a rank without images still has gradients, of zeros, which the others wait for
            patches, layout = patches.new_zeros(1, self.patch_size**2 * 3), PackedLayout.from_grids([(1, 1)])
        images = defaultdict(list)
        for index, grid in enumerate(layout.host_grids):
            images[grid].append(index)
        rows = patches.to(next(self.model.parameters()).dtype).split([h * w for h, w in layout.host_grids])
        features: list[Any] = [None] * len(layout)
        for grid, members in images.items():
            for table in self.tables:
                table.grid = grid
            pixels = unfold(torch.stack([rows[i] for i in members]), grid, self.patch_size)
            hidden = self.model(pixel_values=pixels, **self.family.arguments).last_hidden_state
            for index, image in zip(members, hidden[:, self.leading :], strict=True):
                features[index] = image
        return torch.cat(features)[:tokens]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random weights as transformers draws them."""
        fresh = self.family.kind(self.config, **self.family.build)
        self.model.load_state_dict(fresh.state_dict())

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **kwargs) -> AdaptedEncoder:
        """The encoder with the weights of a checkpoint of FAMILIES' types, a vision model's or a whole model's (hub
        name or folder; kwargs go to the vision model's from_pretrained).

        Raises ValueError where the checkpoint is of another type or lacks weights.
        """
        config = adapted_config(name_or_path)
        family = FAMILIES[config.model_type]
        if family.prefix:
            kwargs = {"key_mapping": {family.prefix: ""}, **kwargs}
        model, info = family.kind.from_pretrained(
            name_or_path, config=config, output_loading_info=True, **family.build, **kwargs
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"name_or_path: {name_or_path} lacks weights, {missing[0]} among {len(missing)}")
        return cls(config, model)

    def to_transformers(self) -> PreTrainedModel:
        """A plain model of transformers with these weights (copied)."""
        plain = self.family.kind(self.config, **self.family.build).to(next(self.model.parameters()))
        plain.load_state_dict(self.model.state_dict())
        return plain

    def image_processor(self, max_num_patches: int) -> dict[str, Any]:
        """Of preprocessor_config.json, what is not pixel values. transformers has no image processor of these models
        that keeps an image's aspect ratio, so it is one that squeezes images into a square: the largest that
        max_num_patches allow, or the model's own where the plain model takes no other."""
        side = self.patch_size * max(1, int(max_num_patches**0.5))
        if self.family.arguments or self.tables:
            side = self.config.image_size if isinstance(self.config.image_size, int) else self.config.image_size[0]
        return {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}}


class PositionTable(nn.Embedding):
    """A square table of positions [side**2, C] that is interpolated to `grid`, the grid of the images on their way."""

    grid: tuple[int, int] | None = None

    def __init__(self, table: nn.Embedding):
        super().__init__(*table.weight.shape, _weight=table.weight)
        self.weight = table.weight
        self.side = int(self.num_embeddings**0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [1, side**2], all in order -> [1, h * w, C]."""
        rows = super().forward(ids)
        if self.grid in (None, (self.side, self.side)):
            return rows
        table = rows.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        return F.interpolate(table.float(), self.grid, mode="bicubic").flatten(2).transpose(1, 2).to(rows.dtype)


def unfold(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Patches [N, h * w, patch_size**2 * 3] in the order "hwc" of N images -> their pixels [N, 3, H, W]."""
    height, width = grid
    cells = patches.view(-1, height, width, patch_size, patch_size, 3)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, height * patch_size, width * patch_size)


def adapted_config(name_or_path: str | Path) -> PretrainedConfig:
    """The configuration that `AdaptedEncoder.from_pretrained` gives an encoder. Raises ValueError where it would."""
    kind = PretrainedConfig.get_config_dict(name_or_path)[0].get("model_type")
    family = FAMILIES.get(WHOLE.get(kind, kind))
    if family is None:
        raise ValueError(
            f"name_or_path: {name_or_path} is of model type {kind!r}, accepted are {', '.join(FAMILIES | WHOLE)}"
        )
    return adapted(family.kind.config_class.from_pretrained(name_or_path))


def adapted(config: PretrainedConfig) -> PretrainedConfig:
    """A vision model's configuration without a pooling head and without randomness. Raises ValueError for images that
    are not of three channels and patches that are not square."""
    config = deepcopy(config)
    for name, value in {**_RANDOM, **FAMILIES[config.model_type].settings}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if config.num_channels != 3:
        raise ValueError(f"num_channels: got {config.num_channels}, accepted is 3")
    patch_side(config)
    return config


def patch_side(config: PretrainedConfig) -> int:
    """The side of a patch in pixels, which some configurations give as a pair. ValueError where it is not square."""
    sides = config.patch_size if isinstance(config.patch_size, list | tuple) else [config.patch_size]
    if len(set(sides)) != 1:
        raise ValueError(f"patch_size: got {config.patch_size}, accepted is a square patch")
    return sides[0]


@functools.cache
def _say_slower(model: str) -> None:
    name = re.sub("(Vision)?Model$", "", model)
    warnings.warn(
        f"{name} runs through an adapter, one pass for each grid of images: slower than SigLIP and SigLIP2, which "
        "take images of all grids in one",
        stacklevel=3,
    )
