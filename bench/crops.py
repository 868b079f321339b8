"""How closely the teacher of self-distillation looks at a region: its crop's patches over the cells of the student's
grid under the box, of one fixed grid for all crops and of crops that keep the aspect ratio (granvit.data.crops).

    python bench/crops.py          writes bench/results/crops.json

The sample set's regions are seen as the preset smoke sees them. Gran's are not published: in their place stand images
of 224 to 1536 pixels a side, seen as the preset paper sees them, with boxes of sides drawn as in workloads.py, those
kept that pass the paper's filter (aspect ratio in [1/3, 3], more than 100 x 100 pixels).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from rows import Rows, provenance, results_folder
from workloads import BOX_SIDES, image_sizes

from granvit.data.loader import GranDataset
from granvit.data.sample import cached_sample
from granvit.questions.schema import Region, Sample
from granvit.train.presets import PRESETS
from granvit_kernels import fit_grid

BOXES = 4000
FIXED = {"smoke": (4, 4), "paper": (7, 7)}
"""What every crop had before."""


def sample_set() -> list[Sample]:
    data = GranDataset(cached_sample(600))
    return [sample for sample in map(data.annotations, range(len(data))) if sample is not None]


def like_gran() -> list[Sample]:
    draw = random.Random(0)
    samples = []
    for height, width in image_sizes("B", BOXES):
        low, high = BOX_SIDES
        across, down = (low * (high / low) ** draw.random() for _ in range(2))
        tall, wide = down * height, across * width
        if tall * wide > 100**2 and 1 / 3 <= tall / wide <= 3:
            x, y = draw.uniform(0, 1 - across), draw.uniform(0, 1 - down)
            image = torch.zeros((), dtype=torch.uint8).expand(height, width, 3)
            samples.append(Sample("", image, None, (Region((x, y, x + across, y + down), "", "natural"),), "", ""))
    return samples


def rows(samples: Sequence[Sample], preset: str, data: str) -> list[dict]:
    config = PRESETS[preset]
    processor = SimpleNamespace(patch_size=config.model.patch_size, max_image_tokens=config.model.max_image_tokens)
    crops = config.crops
    fixed, ours = [], []
    for sample in samples:
        sides = fit_grid(*sample.image.shape[:2], processor.patch_size, processor.max_image_tokens)
        for number, region in enumerate(sample.regions):
            x1, y1, x2, y2 = region.box
            seen = np.array([(y2 - y1) * sides[0], (x2 - x1) * sides[1]])
            for grids, grid in ((fixed, FIXED[preset]), (ours, crops.grid(sample, number, processor))):
                grids.append((*grid, *seen))
    return [
        {"data": data, "preset": preset, "crops": name, **figures(np.array(grids))}
        for name, grids in (("{} x {}".format(*FIXED[preset]), fixed), (f"{crops.tokens} patches", ours))
    ]


def figures(grids: np.ndarray) -> dict[str, float]:
    """grids: [N, 4], rows and columns of crops, and of the student's cells under their boxes."""
    ratio = grids[:, :2].prod(1) / grids[:, 2:].prod(1)
    aspect = np.abs(np.log(grids[:, 0] / grids[:, 1]) - np.log(grids[:, 2] / grids[:, 3]))
    return {
        "regions": len(grids),
        "finer": float((ratio > 1).mean()),
        "coarser_along_a_side": float((grids[:, :2] < grids[:, 2:]).any(1).mean()),
        "median_ratio": float(np.median(ratio)),
        "median_stretch": float(np.exp(np.median(aspect))),
        "mean_patches": float(grids[:, :2].prod(1).mean()),
    }


def main() -> None:
    results = Rows(results_folder() / "crops.json", ("data", "preset", "crops"))
    for samples, preset, data in ((sample_set(), "smoke", "sample set"), (like_gran(), "paper", "like Gran")):
        for row in rows(samples, preset, data):
            results.save({**row, **provenance("counted")})
            print(row)


if __name__ == "__main__":
    main()
