"""Features of every region of a split, image by image in bounded memory: gathered, standardised, reduced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from granvit.data.loader import GranDataset, spread
from granvit.data.parallel import progress
from granvit.eval.probe.encoders import GRIDS, FrozenEncoder, Pixels
from granvit.eval.probe.labels import Regions

PATCHES = 8192
"""Of the images that are encoded at a time, at most, but for one image by itself."""

IMAGES = 64
"""That are held at a time, at most."""

SAMPLE = 2048
"""Training regions that features are standardised and reduced by."""

COMPONENTS = 512
"""Principal components that are kept of a grid of several cells."""


@dataclass(frozen=True)
class Reduction:
    """(x - mean) / std, and the projection to principal components [D, d] where there is one; kept is the share of the
    sample's variance that these hold."""

    mean: Tensor
    std: Tensor
    components: Tensor | None = None
    kept: float = 1.0

    @classmethod
    def of(cls, sample: Tensor, components: int | None = None) -> Reduction:
        """Fitted on a sample [n, D]; components: None keeps every dimension as it is. A dimension that does not vary
        becomes zero."""
        mean, std = sample.double().mean(0).float(), sample.double().std(0, unbiased=False).float()
        std = torch.where(std > 1e-6 * std.max(), std, torch.inf)
        if components is None or sample.shape[1] <= components:
            return cls(mean, std)
        standard = (sample - mean) / std
        # Of the products of the sample's regions with each other: n is small where D is tens of thousands.
        values, vectors = torch.linalg.eigh((standard @ standard.T).double())  # ascending
        order = [i for i in reversed(range(len(values))) if values[i] > 1e-5 * values[-1]][:components]
        basis = standard.T @ (vectors[:, order] / values[order].sqrt()).float()
        return cls(mean, std, basis, float(values[order].sum() / values.clamp(min=0).sum()))

    def __call__(self, features: Tensor) -> Tensor:
        standard = (features - self.mean) / self.std
        return standard if self.components is None else standard @ self.components


def fit(encoder: FrozenEncoder | Pixels, dataset: GranDataset, regions: Regions) -> dict[str, Reduction]:
    """A reduction for each grid, of about SAMPLE regions of images that are spread over the training split."""
    rows = np.unique(regions.rows)
    images = max(1, len(rows) * SAMPLE // max(len(regions), SAMPLE))
    chosen = regions.where(np.isin(regions.rows, rows[list(spread(len(rows), images))]))
    parts: dict[str, list[Tensor]] = {name: [] for name in GRIDS}
    for _, features in _stream(encoder, dataset, chosen, "standardising"):
        for name, values in features.items():
            parts[name].append(values)
    if not parts["1x1"]:
        raise ValueError(f"no image of {dataset.path} that has regions can be read")
    return {name: Reduction.of(torch.cat(parts[name]), None if name == "1x1" else COMPONENTS) for name in GRIDS}


def read_features(
    encoder: FrozenEncoder | Pixels, dataset: GranDataset, regions: Regions, reductions: dict[str, Reduction]
) -> tuple[dict[str, Tensor], np.ndarray]:
    """{name of GRIDS: float32 [R, d] on the CPU}, and a mask [R] of the regions whose image could be read; rows of
    the others are zeros. Faults are the dataset's, and within its budget."""
    made: dict[str, Tensor] = {}
    read = np.zeros(len(regions), bool)
    for places, features in _stream(encoder, dataset, regions, dataset.split):
        read[places] = True
        for name, values in features.items():
            values = reductions[name](values).cpu()
            made.setdefault(name, values.new_zeros(len(regions), values.shape[1]))[places] = values
    return made, read


def _stream(
    encoder: FrozenEncoder | Pixels, dataset: GranDataset, regions: Regions, what: str
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """(places among the regions, their features) of some images at a time."""
    images: list[tuple[int, Tensor]] = []
    patches = 0
    rows = np.unique(regions.rows)
    for row in progress(rows.tolist(), f"{encoder.name[:40]}, {what}", len(rows)):
        sample = dataset[row]
        if sample is None:
            continue
        height, width = encoder.grid(*sample.image.shape[:2])
        if images and (patches + height * width > PATCHES or len(images) == IMAGES):
            yield _features(encoder, images, regions)
            images, patches = [], 0
        images.append((row, sample.image))
        patches += height * width
    if images:
        yield _features(encoder, images, regions)


def _features(
    encoder: FrozenEncoder | Pixels, images: list[tuple[int, Tensor]], regions: Regions
) -> tuple[np.ndarray, dict[str, Tensor]]:
    """regions.rows are ascending."""
    rows = [row for row, _ in images]
    first, last = (np.searchsorted(regions.rows, rows, side) for side in ("left", "right"))
    places = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
    index = torch.from_numpy(np.repeat(np.arange(len(rows)), last - first))
    return places, encoder([image for _, image in images], torch.from_numpy(regions.boxes[places]), index)
