"""What `granvit plan` is asked, and what it assumes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import tyro

from granvit.train.presets import TrainConfig

ASSUMED = "assumed, not measured"
MOST_REGIONS = 10_000
"""Of an image. Its questions are laid out to be counted."""
SAMPLE_ROWS = 600
"""Of the sample set, where a run makes its own, so many pictures are drawn and looked at."""


@dataclass(frozen=True)
class PlanConfig:
    """What is planned, and the assumptions that no dataset or result file replaces."""

    run: Annotated[TrainConfig, tyro.conf.arg(name="")]
    images: float = 29.51e6
    """Images of the data set whose cost is asked for (Gran-29M's)."""
    regions: float = 183.55e6
    """And its regions."""
    mfu: float = 0.4
    """Useful operations a second, as a share of the device's. An assumption, unless bench/results/ has a measurement
    of a GPU with these shapes, which is then used and named."""
    device_tflops: float = 989.0
    """The device's peak in 10^12 operations a second: an H100 SXM's in bfloat16 by its data sheet, dense."""
    ranks: int | None = None
    """Of the run, at most: so many of them take part as share a stage's sequences evenly. None: one, and 128 of the
    preset paper."""
    node: int = 8
    """Ranks of a machine, at most."""
    device_gb: float = 80.0
    """A device's memory in GB, by which parallel "auto" chooses: an H100 SXM's by its data sheet."""
    rows: int = 2000
    """Rows of the dataset that are looked at, evenly spread."""
    image_size: tuple[int, int] = (512, 512)
    """Height and width of an image, for the costs."""
    samples: int = 32
    """Samples of a padded batch in the recipe of one question a sample."""
    prompt_tokens: int = 48
    """Of a question without its answer, where no dataset says it."""
    answer_tokens: int = 14
    """Of an answer about a region, where no dataset says it."""
    caption_tokens: int = 80
    """Of a global caption, where no dataset says it."""

    def __post_init__(self) -> None:
        for name in ("images", "regions", "device_tflops", "ranks", "node", "device_gb", "rows", "samples",
                     "prompt_tokens", "answer_tokens", "caption_tokens"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it is above 0, and finite")
        if self.regions > MOST_REGIONS * self.images:
            raise ValueError(
                f"regions is {self.regions:g} of {self.images:g} images; at most {MOST_REGIONS:,} an image are planned"
            )
        if min(self.image_size) < 1:
            raise ValueError(f"image_size is {self.image_size}; height and width are at least 1")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu}; it is a share above 0, at most 1")
