"""The vision encoder: SigLIP2's vision transformer on packed tokens, without padding.

Parameter names are those of transformers' `Siglip2VisionModel` (without its pooling head, which a dense
encoder does not use), so that weights go both ways by name alone: `from_siglip2` and `save_siglip2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Siglip2VisionConfig, Siglip2VisionModel, SiglipVisionConfig, SiglipVisionModel
from transformers.activations import ACT2FN

from granvit_kernels import PackedLayout

from .files import own
from .packed_attention import packed_attention
from .preprocessor import write_preprocessor

CHECKPOINTS = {
    "siglip2": Siglip2VisionModel,
    "siglip2_vision_model": Siglip2VisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}
"""The vision model of transformers that reads a checkpoint of each type. SigLIP2's of one resolution are "siglip"."""


class Embeddings(nn.Module):
    """Patch embedding plus the position table, interpolated to each image's grid as SigLIP2 NaFlex does."""

    def __init__(self, config: Siglip2VisionConfig):
        super().__init__()
        self.side = int(config.num_patches**0.5)
        if self.side**2 != config.num_patches:
            raise ValueError(
                f"num_patches: got {config.num_patches}, accepted is a square number (a square table)"
            )
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, patches: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """patches [T, patch_size**2 * 3] in the order "hwc" -> [T, C]."""
        embedded = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype))
        table = {grid: self.positions(*grid) for grid in dict.fromkeys(grids)}
        pieces = []
        for grid, run in groupby(grids):
            count = sum(1 for _ in run)
            pieces.append(table[grid].expand(count, -1, -1).flatten(0, 1) if count > 1 else table[grid])
        return embedded + torch.cat(pieces) if pieces else embedded

    def positions(self, height: int, width: int) -> torch.Tensor:
        """Position embeddings [height * width, C]: antialiased bilinear interpolation of the square table, in
        float32 on the CPU, where half precision has no antialiasing (transformers does the same)."""
        weight = self.position_embedding.weight
        table = weight.view(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        if weight.device.type == "cpu":
            table = table.float() if weight.dtype != torch.float64 else table
        table = F.interpolate(table, (height, width), mode="bilinear", align_corners=False, antialias=True)
        return table.flatten(2)[0].T.to(weight.dtype)


class Attention(nn.Module):
    """Multi-head self-attention within each image of a packed sequence."""

    def __init__(self, config: Siglip2VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        shape = (len(x), self.heads, x.shape[1] // self.heads)
        q, k, v = (proj(x).view(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(packed_attention(q, k, v, layout).flatten(1))


class MLP(nn.Module):
    def __init__(self, config: Siglip2VisionConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: Siglip2VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x), layout)
        return x + self.mlp(self.layer_norm2(x))


class Layers(nn.Module):
    """Holds the layers under the name that Siglip2VisionModel gives them."""

    def __init__(self, config: Siglip2VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class VisionEncoder(nn.Module):
    """SigLIP2's vision transformer on packed patches.

    Differs from Siglip2VisionModel in what it is given, not in what it computes: images of any grids stand
    one after the other in one [T, ...] tensor, and a PackedLayout says where each begins. Dropout (0 in
    SigLIP2) is left out.

    checkpointing: let the backward pass compute each layer's activations again instead of keeping them.
    """

    checkpointing = False

    def __init__(self, config: Siglip2VisionConfig):
        super().__init__()
        if config.attention_dropout:
            raise ValueError(f"attention_dropout: got {config.attention_dropout}, accepted is 0")
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.reset_parameters()

    def forward(self, patches: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        """patches [T, patch_size**2 * 3] as pack_patches returns them -> features [T, C] after the last
        norm."""
        x = self.embeddings(patches, layout.host_grids)
        again = self.checkpointing and torch.is_grad_enabled()
        for layer in self.encoder.layers:
            # no layer draws random numbers, so their state need not be kept
            x = (
                checkpoint(layer, x, layout, use_reentrant=False, preserve_rng_state=False)
                if again
                else layer(x, layout)
            )
        return self.post_layernorm(x)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random weights as SigLIP2 draws them: xavier in the layers, lecun for the patches."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch, position = self.embeddings.patch_embedding, self.embeddings.position_embedding
        nn.init.normal_(patch.weight, std=patch.in_features**-0.5)
        nn.init.normal_(position.weight, std=position.embedding_dim**-0.5)

    @classmethod
    def from_siglip2(cls, name_or_path: str | Path, **kwargs) -> VisionEncoder:
        """The encoder with the weights of a SigLIP or SigLIP2 checkpoint of any kind (NaFlex or of one resolution), a
        vision model's or a whole model's (hub name or folder; kwargs go to the vision model's from_pretrained). The
        pooling head is left behind. One of one resolution has its positions interpolated for other grids.

        Raises ValueError where the checkpoint is of another type or lacks weights.
        """
        source, info = _class_of(name_or_path).from_pretrained(name_or_path, output_loading_info=True, **kwargs)
        missing = sorted(key for key in info["missing_keys"] if "head." not in key)
        if missing:
            raise ValueError(f"name_or_path: {name_or_path} lacks weights, {missing[0]} among {len(missing)}")
        return cls.from_transformers(source)

    @classmethod
    def from_transformers(cls, source: Siglip2VisionModel | SiglipVisionModel) -> VisionEncoder:
        """The encoder with a vision model's weights (copied, but inside `files.mapped`)."""
        state = {key.removeprefix("vision_model."): value for key, value in source.state_dict().items()}
        config = source.config
        if isinstance(config, SiglipVisionConfig):  # patches are embedded by a convolution: [C, 3, p, p]
            convolution = state["embeddings.patch_embedding.weight"]
            state["embeddings.patch_embedding.weight"] = convolution.permute(0, 2, 3, 1).flatten(1)
        with torch.device("meta"):
            encoder = cls(_headless(config))
        weights = {key: own(value) for key, value in state.items() if not key.startswith("head.")}
        encoder.load_state_dict(weights, assign=True)
        return encoder

    def to_transformers(self) -> Siglip2VisionModel:
        """A Siglip2VisionModel (vision_use_head=False) with this encoder's weights (copied)."""
        target = Siglip2VisionModel(_headless(self.config)).to(self.post_layernorm.weight)
        # earlier transformers (5.0 still) keep the transformer one module deeper
        prefix = "vision_model." if hasattr(target, "vision_model") else ""
        target.load_state_dict({prefix + key: value for key, value in self.state_dict().items()})
        return target

    def save_siglip2(
        self,
        directory: str | Path,
        max_num_patches: int | None = None,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        image_resample: str = "bilinear",
        image_round: str | None = None,
    ) -> None:
        """Write a folder that plain transformers loads: Siglip2VisionModel.from_pretrained(directory).

        max_num_patches: patches an image that the encoder was trained on. With it AutoImageProcessor.from_pretrained
        and pipeline("image-feature-extraction") load the folder too, and prepare images as `GranViT.encode` does but
        for rounding: they round pixels to 8 bits after resizing. The rest: as of GranViTConfig.
        """
        self.to_transformers().save_pretrained(directory)
        if max_num_patches is not None:
            processor = self.image_processor(max_num_patches)
            write_preprocessor(directory, processor, image_mean, image_std, image_resample, image_round)

    def image_processor(self, max_num_patches: int) -> dict[str, Any]:
        """Of preprocessor_config.json, what is not pixel values."""
        return {
            "image_processor_type": "Siglip2ImageProcessor",
            "patch_size": self.config.patch_size,
            "max_num_patches": max_num_patches,
        }


def siglip2_config(name_or_path: str | Path) -> Siglip2VisionConfig:
    """The configuration that `VisionEncoder.from_siglip2` gives an encoder. Raises ValueError where it would."""
    return _headless(_class_of(name_or_path).config_class.from_pretrained(name_or_path))


def _class_of(name_or_path: str | Path) -> type[Siglip2VisionModel] | type[SiglipVisionModel]:
    kind = Siglip2VisionConfig.get_config_dict(name_or_path)[0].get("model_type")
    if kind not in CHECKPOINTS:
        raise ValueError(
            f"name_or_path: {name_or_path} is of model type {kind!r}, accepted is a SigLIP or SigLIP2 checkpoint "
            f"({', '.join(map(repr, CHECKPOINTS))})"
        )
    return CHECKPOINTS[kind]


def _headless(config: Siglip2VisionConfig | SiglipVisionConfig) -> Siglip2VisionConfig:
    """Without the pooling head; NaFlex's of what was trained at one resolution."""
    if isinstance(config, Siglip2VisionConfig):
        return Siglip2VisionConfig(**{**config.to_dict(), "vision_use_head": False})
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
    names += ("patch_size", "attention_dropout", "layer_norm_eps", "hidden_act")
    sizes = {name: getattr(config, name) for name in names}
    num_patches = (config.image_size // config.patch_size) ** 2
    return Siglip2VisionConfig(**sizes, num_patches=num_patches, vision_use_head=False)
