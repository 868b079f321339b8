"""Operations and hours of both recipes: ours, packed, and one question a sample in padded batches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from granvit.cost.config import PlanConfig
from granvit.cost.flops import Counts, Picture, Sizes, count, one_question_each, operations, packed, padded
from granvit.cost.reading import Reading, typical
from granvit.model import GranViTConfig
from granvit.train.stages import Stage


@dataclass(frozen=True)
class Recipes:
    """Counts of both recipes over the same images and questions, without their padding and with it."""

    ours: Counts
    ours_padded: Counts
    theirs: Counts
    theirs_padded: Counts

    def ratio(self, sizes: Sizes, train: Iterable[str], with_padding: bool = False) -> float:
        """Operations of one question a sample over ours."""
        ours, theirs = (self.ours_padded, self.theirs_padded) if with_padding else (self.ours, self.theirs)
        return operations(sizes, theirs, train).total / operations(sizes, ours, train).total


def compare(rows: Sequence[Sequence[Picture]], samples: int, capacity: int = 0) -> Recipes:
    """Both recipes on images packed in `rows`, which are filled up to `capacity` where that is more than the longest;
    the other recipe's samples are shuffled into padded batches of `samples`."""
    pictures = [picture for row in rows for picture in row]
    separate = one_question_each(pictures)
    random.Random(0).shuffle(separate)
    batches = (separate[start : start + samples] for start in range(0, len(separate), samples))
    theirs_padded = sum((padded(batch) for batch in batches), Counts())
    ours = count(pictures)
    filled = packed(rows)
    room = len(rows) * capacity
    if room > filled.tokens:
        filled = replace(filled, tokens=room, pairs=ours.pairs + room - ours.tokens)
    return Recipes(ours, filled, count(separate), theirs_padded)


def per_image(
    plan: PlanConfig, config: GranViTConfig, sizes: Sizes, stage: Stage, reading: Reading, regions: float,
    image_size: tuple[int, int] | None = None,
) -> tuple[float, float]:
    """Useful operations of an image with `regions` regions, ours and of one question a sample; between whole numbers of
    regions it goes in a straight line."""
    low = int(regions)
    totals = []
    for number in (low, low + 1):
        picture = typical(plan, config, stage, reading, number, image_size or plan.image_size)
        totals.append(
            [
                operations(sizes, count(pictures), stage.train).total
                for pictures in ([picture], one_question_each([picture]))
            ]
        )
    return tuple(a + (b - a) * (regions - low) for a, b in zip(*totals, strict=True))


def gpu_hours(total: float, mfu: float, device_tflops: float) -> float:
    """Of one device, for so many operations."""
    return total / (mfu * device_tflops * 1e12) / 3600


def repeated(sizes: Sizes, config: GranViTConfig, stage: Stage, counts: Counts) -> list[tuple[str, float, str]]:
    """(what, share of the step's useful operations, what leaving it out would mean) of our own recipe."""
    total = operations(sizes, counts, stage.train).total
    text, vision = config.text_config, config.vision_config
    passes = operations(replace(sizes, llm_attention=0), counts, stage.train).parts["llm"]  # matrices alone
    mlp = 3 * text.hidden_size * text.intermediate_size / sizes.llm  # of gated layers, one layer's share
    unscored = 1 - counts.answers / max(1, counts.tokens)
    savings = [
        ("the LLM's last MLP on tokens that are not scored", passes * mlp * unscored, "exact"),
    ]
    if stage.distill:
        teacher = operations(sizes, counts, stage.train).parts["teacher"]
        whole = operations(
            sizes, replace(counts, crop_patches=counts.patches, crop_pairs=counts.patch_pairs), stage.train
        ).parts["teacher"]
        more = "" if teacher > whole else " (it would cost more)"
        savings.append(
            (f"the teacher's crops, against one pass over each image{more}", teacher - whole,
             "another method: the crop's closer look is what is distilled")
        )  # fmt: skip
    if "encoder" not in stage.train:
        encoder = operations(sizes, counts, stage.train).parts["encoder"]
        savings.append(
            ("the frozen encoder, once an epoch", encoder,
             f"exact from the second epoch on; {2 * vision.hidden_size * counts.patches / counts.images / 1024:.0f} "
             "KiB an image to keep in bfloat16")
        )  # fmt: skip
    return [(what, operations_ / total, meaning) for what, operations_, meaning in savings]
