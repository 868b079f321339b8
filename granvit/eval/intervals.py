"""How far a measured figure may lie from what all pictures like the test's would give: 95 % intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from granvit.eval.metrics import Score

Z = 1.959963984540054  # the normal distribution's quantile 0.975
RESAMPLES = 1000
LEAST_IMAGES = 10
"""Of fewer images the bootstrap's interval is much too narrow."""


def wilson(share: float, number: int) -> tuple[float, float]:
    """Wilson's score interval of a share of `number` answers, each right or wrong (1927). ValueError for none,
    and for what is no share."""
    if number < 1:
        raise ValueError(f"a share is of at least 1 answer, got {number}")
    if not 0 <= share <= 1:
        raise ValueError(f"a share is from 0 to 1, got {share}")
    spread = Z * math.sqrt(share * (1 - share) / number + Z**2 / (4 * number**2))
    middle, scale = share + Z**2 / (2 * number), 1 + Z**2 / number
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def bootstrap(scores: Sequence[Score]) -> tuple[float, float]:
    """Percentile interval of sum of values / sum of weights over RESAMPLES resamples of the images, the same at every
    call. Whole images are drawn: answers about one picture are not independent. ValueError for no scores."""
    if not scores:
        raise ValueError("an interval is of at least 1 answer, got none")
    images: dict[Hashable, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for score in scores:
        images[score.image][0] += score.value
        images[score.image][1] += score.weight
    sums = np.array(list(images.values()))  # [images, 2]
    draw = np.random.default_rng(0)
    totals = np.array([sums[draw.integers(len(sums), size=len(sums))].sum(0) for _ in range(RESAMPLES)])
    low, high = np.quantile(totals[:, 0] / totals[:, 1], (0.025, 0.975))
    return float(low), float(high)


def interval(scores: Sequence[Score], share: bool) -> tuple[float, float] | None:
    """The bootstrap's. Where it says nothing, of fewer than LEAST_IMAGES images or of equal resamples, a share has
    `wilson`'s of as many answers as there are images, rather too wide, and a mean None. ValueError for no scores."""
    low, high = bootstrap(scores)
    images = len({score.image for score in scores})
    if images >= LEAST_IMAGES and high > low:
        return low, high
    total = math.fsum(score.value for score in scores) / math.fsum(score.weight for score in scores)
    return wilson(total, images) if share else None
