"""From the encoder's features to the LLM's embedding space: the two-layer MLP and the pixel shuffle."""

from __future__ import annotations

import numpy as np
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
    grids = [(h, w) for h, w in layout.grids.tolist()]
    cells = {grid: _merged_cells(*grid, factor) for grid in dict.fromkeys(grids)}
    starts = np.cumsum([0] + [h * w for h, w in grids])
    pieces = [cells[grid] + start for grid, start in zip(grids, starts, strict=False)]
    index = (
        torch.from_numpy(np.concatenate(pieces)) if pieces else torch.zeros(0, factor**2, dtype=torch.int64)
    )
    merged = PackedLayout.from_grids(
        [(-(-h // factor), -(-w // factor)) for h, w in grids], device=features.device
    )
    return features[index.to(features.device)].flatten(1), merged


def _merged_cells(height: int, width: int, factor: int) -> np.ndarray:
    """Token indices [merged tokens, factor**2] of one grid, its last row and column repeated where needed."""
    rows = np.minimum(np.arange(-(-height // factor) * factor), height - 1).reshape(-1, 1, factor, 1)
    columns = np.minimum(np.arange(-(-width // factor) * factor), width - 1).reshape(1, -1, 1, factor)
    return (rows * width + columns).reshape(-1, factor**2)
