"""From the encoder's features to the LLM's embedding space: the two-layer MLP and the pixel shuffle."""

from __future__ import annotations

import torch
from torch import nn

from granvit_kernels import PackedLayout


class Projector(nn.Module):
    """Two-layer MLP with a norm before it; its outputs start at the RMS of the LLM's own embeddings.

    An LLM's embeddings are small (RMS .02-.1 is common) and a frozen LLM has never met anything larger, so
    the MLP starts at unit RMS and `scale`, a buffer that `GranViT.match_llm_scale` sets, brings it to the
    LLM's.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, outputs)
        self.fc2 = nn.Linear(outputs, outputs)
        self.register_buffer("scale", torch.ones(()))
        self.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., inputs] -> [..., outputs]."""
        return self.scale * self.fc2(nn.functional.gelu(self.fc1(self.norm(x)), approximate="tanh"))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.ones_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)
        nn.init.normal_(self.fc1.weight, std=self.fc1.in_features**-0.5)
        # A unit normal has E[gelu(x)^2] = .425: this std makes the output's RMS 1.
        nn.init.normal_(self.fc2.weight, std=(0.425 * self.fc2.in_features) ** -0.5)
        for layer in (self.fc1, self.fc2):
            nn.init.zeros_(layer.bias)


def shuffle_pixels(
    features: torch.Tensor, layout: PackedLayout, factor: int
) -> tuple[torch.Tensor, PackedLayout]:
    """Merge factor x factor neighbouring tokens into one by concatenating their channels.

    A side that factor does not divide is completed by repeating its last row or column, so that every token
    of every grid arrives. Row-major over the merged grid; within a merged token row-major over its cells.

    Args:
        features [T, C], layout: the encoder's output.
        factor: 1 (nothing changes) or 2.
    Returns:
        [T', C * factor**2] and its layout, grids ceil(h / factor) x ceil(w / factor).
    """
    if factor == 1:
        return features, layout
    grids = [(-(-h // factor), -(-w // factor)) for h, w in layout.host_grids]
    merged = PackedLayout.from_grids(grids, device=features.device)
    # Of each merged token its image's first token, height and width, and the rows and columns of its cells.
    images, within = merged.image_ids(), torch.arange(factor, device=features.device)
    first, (heights, widths) = layout.cu_seqlens[images].long(), layout.grids[images].long().unbind(1)
    rows, columns = (merged.positions()[:, :, None] * factor + within).unbind(1)
    rows, columns = torch.minimum(rows, heights[:, None] - 1), torch.minimum(columns, widths[:, None] - 1)
    cells = (first[:, None] + rows * widths[:, None])[:, :, None] + columns[:, None, :]
    return features[cells.flatten(1)].flatten(1), merged
