"""Region prompts: what the LLM is shown of a box that a question asks about."""

from __future__ import annotations

import math

import torch
from torch import nn

from granvit_kernels import PackedLayout, region_pool

from .projector import Projector

OCTAVES = 6


class RegionPrompt(nn.Module):
    """K tokens for a box: learned queries attend to the image's features inside it, and a projector of its
    own brings the result, together with where the box is, to the LLM.

    - The features are the whole image's, so a region token knows its surroundings too; with coverage=True a
      cell that the box covers by a tenth counts a tenth, so boxes smaller than a patch still differ.
    - Attention alone says what is there, not where: the box's geometry (sines and cosines of its four
      coordinates over six octaves, plus its centre and size) is embedded and added before the projector.
    - The projector is not the image tokens' one. In a toy-scale trial a shared one cost most of the colour
      accuracy (.31 against .85): the LLM must read "this region" where it reads "this place in the image"
      otherwise.
    """

    def __init__(self, width: int, heads: int, tokens: int, outputs: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(tokens, heads, width // heads))
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.geometry = nn.Linear(8 * OCTAVES + 4, width)
        self.projector = Projector(width, outputs)
        self.reset_parameters()

    def forward(
        self, features: torch.Tensor, layout: PackedLayout, boxes: torch.Tensor, image_index: torch.Tensor
    ) -> torch.Tensor:
        """features [T, C] and boxes [R, 4], relative xyxy, of the images image_index [R] -> [R, K, D]."""
        seen = self.attend(features, layout, layout.to_grid(boxes, image_index), image_index)
        where = self.geometry(box_features(boxes).to(features.dtype))
        return self.projector(seen.flatten(2) + where[:, None])

    def attend(
        self, features: torch.Tensor, layout: PackedLayout, boxes: torch.Tensor, image_index: torch.Tensor
    ) -> torch.Tensor:
        """Attention of the queries to the features under each box, [R, K, H, C / H]; boxes [R, 4] in patch units.

        Keys W_key x + b and values W_value x of T tokens are never made. The queries are the same everywhere, so
        query . (W_key x + b) is (W_key^T query) . x + query . b, one linear layer to K * H logits. And W_value of a
        mean is the mean of W_value x: it is applied to R means in place of T features.
        """
        tokens, heads, size = self.queries.shape
        values = features[:, None]  # first: so autograd adds what comes back of it to the logits' share in place
        key, value = (layer.weight.unflatten(0, (heads, size)) for layer in (self.key, self.value))
        dtype = torch.promote_types(features.dtype, torch.float32)  # half-precision logits cost accuracy
        with torch.autocast("cuda" if features.is_meta else features.device.type, enabled=False):
            queries = self.queries.to(dtype) * size**-0.5
            weight = torch.einsum("khd,hdc->khc", queries, key.to(dtype)).flatten(0, 1)
            bias = (queries * self.key.bias.to(dtype).unflatten(0, (heads, size))).sum(-1).flatten()
            logits = nn.functional.linear(features.to(dtype), weight, bias).unflatten(1, (tokens, heads))
        pooled, lse = region_pool(logits, values, layout, boxes, image_index, coverage=True, return_lse=True)
        seen = torch.einsum("rkhc,hdc->rkhd", pooled, value)
        # Weights sum to 1, so each mean has the bias once; a box that meets no cell has no mean.
        bias = self.value.bias.unflatten(0, (heads, size)) * lse.isfinite()[..., None]
        return seen + bias.to(seen.dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.queries)
        for layer in (self.key, self.value, self.geometry):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)


class CellPositions(nn.Module):
    """Where each image token's cell is, added to the projector's output: the LLM reads coordinates off its image tokens
    rather than infer them from a token's place in a sequence whose grid differs from image to image.

    Linear in `box_features` of the cell, at the scale of the LLM's embeddings as the projector is: places must differ
    from the first step on, or attention to the right one earns nothing.
    """

    def __init__(self, outputs: int):
        super().__init__()
        self.linear = nn.Linear(8 * OCTAVES + 4, outputs, bias=False)
        self.register_buffer("scale", torch.ones(()))
        self.reset_parameters()

    def forward(self, layout: PackedLayout) -> torch.Tensor:
        """[T, D] for the T cells of a layout."""
        cells = layout.positions().float()
        sides = layout.grids[layout.image_ids()].float()
        boxes = torch.cat(((cells / sides).flip(1), ((cells + 1) / sides).flip(1)), dim=1)
        return self.scale * self.linear(box_features(boxes).to(self.linear.weight.dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.linear.weight, std=self.linear.in_features**-0.5)


def box_features(boxes: torch.Tensor) -> torch.Tensor:
    """Relative xyxy boxes [R, 4] -> [R, 8 * OCTAVES + 4] float32: sin and cos of pi * 2^i * coordinate, then
    centre and size."""
    boxes = boxes.float()
    octaves = math.pi * 2.0 ** torch.arange(OCTAVES, device=boxes.device, dtype=torch.float32)
    angles = (boxes[:, :, None] * octaves).flatten(1)
    low, high = boxes[:, :2], boxes[:, 2:]
    return torch.cat((angles.sin(), angles.cos(), (low + high) / 2, high - low), dim=1)
