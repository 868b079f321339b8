"""Which captions a trained model doubts: it captions a box, finds captions again, and weighs the one that is given.

Captioning a box and finding the model's own words again (`cycle_iou`) never looks at the dataset's caption: it says how
well the model knows the box, not whether the caption is right. So the given caption c takes its place in both
directions of the cycle, and each is measured by what the model's own answer is like and by how likely the given is:

    box -> caption   said_rouge_l   ROUGE-L of the model's caption of the box b and c
                     caption_gain   log p(c | image, b) - log mean_k p(c | image_k, b_k), boxes of other images
    caption -> box   found_iou      IoU of the box that the model finds for c and b
                     box_gain       log p(b | image, c) - log mean_k p(b | image, c_k), captions of other images

The gains, in nats, are what the caption tells about the box and the box about the caption, both estimates of their
pointwise mutual information: log-likelihood ratios of "c was written for b" against "c belongs elsewhere", which is
what a wrong caption is, and no test tells two such hypotheses apart better than their likelihood ratio. The ratio
matters: p(c | image, b) alone is low for every rare or long caption, right ones too. Unlike the answers, which are
right or wrong, gains say how sure the model is, so a model that finds one box in four still ranks captions well.

`score` is their mean: the cycle's two directions with the given caption in place. Low scores are doubtful, and below 0
the caption fits other boxes better than its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from granvit.data.measures import box_iou
from granvit.eval.evaluation import MAX_NEW_TOKENS, answer
from granvit.eval.metrics import rouge_l
from granvit.questions.packing import pack_questions
from granvit.questions.prompts import Box, Question, describe_box, find_box, format_box
from granvit.questions.schema import Region, Sample

PARTS = ("cycle_iou", "said_rouge_l", "found_iou", "caption_gain", "box_gain")
NEGATIVES = 8
"""Boxes and captions of other images that a region's own are weighed against. On a sample set of another seed 2, 4
and 8 gave areas of 0.85, 0.88 and 0.92 for captions of other images, in 15, 20 and 29 seconds."""
IMAGES = 64
"""As many images are in memory at a time; the others' boxes and captions come from among them."""
LONGEST = 300
"""Characters of a caption that the model is shown: one caption must not take all memory."""
_TOGETHER = 8  # questions in one packed sequence behind their image


@dataclass(frozen=True)
class Checked:
    """A region, given by its sample's row (number of the sample among those given) and its place among the regions.

    said: the model's caption of the box. found: where it finds the given caption; cycled: where it finds what it said;
    relative xyxy, None for an answer without a box. parts: by the names of PARTS; score: see above. A gain without
    anything to compare with (an only image) is NaN, and so is the score.
    """

    row: int
    place: int
    region: Region
    said: str
    found: Box | None
    cycled: Box | None
    parts: dict[str, float]

    @property
    def score(self) -> float:
        return (self.parts["caption_gain"] + self.parts["box_gain"]) / 2


@torch.no_grad()
def check_regions(
    model: Any, processor: Any, samples: Iterable[Sample], batch_size: int = 64, seed: int = 0
) -> Iterator[list[Checked]]:
    """Check every region of the samples against the model (a GranViT in eval mode), IMAGES images at a time: the
    regions of each such group, in order. batch_size: questions at a time."""
    samples, first = iter(samples), 0
    while group := list(islice(samples, IMAGES)):
        yield _check(model, processor, group, first, batch_size, random.Random(seed + first))
        first += len(group)


def _check(
    model: Any, processor: Any, group: list[Sample], first: int, batch_size: int, draw: random.Random
) -> list[Checked]:
    style = {"box_style": processor.box_style, "box_format": processor.box_format, "bins": processor.bins}
    asked = [
        (image, place, region) for image, sample in enumerate(group) for place, region in enumerate(sample.regions)
    ]
    asked.sort(key=lambda entry: entry[2].kind)  # answers of one kind are of about one length
    if not asked:
        return []
    images = [image for image, _, _ in asked]
    shown = {image: sample.image for image, sample in enumerate(group)}
    captions = [region.caption[:LONGEST] for _, _, region in asked]
    boxes = [format_box(region.box, processor.box_format, processor.bins) for _, _, region in asked]

    def describe(index: int, caption: str) -> Question:
        """What is in the box of region `index`, answered by a caption."""
        return describe_box(asked[index][2].box, caption, asked[index][1], **style)

    def locate(caption: str, index: int) -> Question:
        """Where is what the caption says, answered by the box of region `index`."""
        return find_box(caption, boxes[index], asked[index][1])

    every = range(len(asked))

    def answers(questions: list[Question]) -> list[str]:
        return answer(model, processor, questions, images, shown, batch_size, MAX_NEW_TOKENS)

    said = answers([describe(i, captions[i]) for i in every])
    predicted, cycled = (
        processor.parse_boxes(answers([locate(text[i], i) for i in every]))
        for text in (captions, [text or "nothing" for text in said])
    )

    negatives = _negatives(asked, draw)
    forward = [(images[i], describe(i, captions[i])) for i in every]
    forward += [(images[k], describe(k, captions[i])) for i in every for k in negatives[i]]
    backward = [(images[i], locate(captions[i], i)) for i in every]
    backward += [(images[i], locate(captions[k], i)) for i in every for k in negatives[i]]
    gains = [
        _gains(log_likelihood(model, processor, group, questions, batch_size), list(map(len, negatives)))
        for questions in (forward, backward)
    ]

    checked = []
    for i, (image, place, region) in enumerate(asked):
        parts = {
            "cycle_iou": _iou(cycled[i], region.box),
            "said_rouge_l": rouge_l(region.caption, said[i]),
            "found_iou": _iou(predicted[i], region.box),
            "caption_gain": gains[0][i],
            "box_gain": gains[1][i],
        }
        checked.append(Checked(first + image, place, region, said[i], predicted[i], cycled[i], parts))
    return sorted(checked, key=lambda check: (check.row, check.place))


@torch.no_grad()
def log_likelihood(
    model: Any, processor: Any, samples: Sequence[Sample], asked: Sequence[tuple[int, Question]], batch_size: int = 64
) -> np.ndarray:
    """Log-probability in nats of each question's answer and its end, teacher forced: float64 [N]. asked: (place of the
    image's sample in samples, question). ValueError for an empty answer."""
    order = sorted(range(len(asked)), key=lambda i: asked[i][0])
    packs: list[list[int]] = []  # questions about one image that share a sequence
    for i in order:
        if not packs or len(packs[-1]) == _TOGETHER or asked[packs[-1][0]][0] != asked[i][0]:
            packs.append([])
        packs[-1].append(i)
    values = np.zeros(len(asked))
    step = max(1, batch_size // _TOGETHER)
    for start in range(0, len(packs), step):
        batch = packs[start : start + step]
        flat = [i for pack in batch for i in pack]
        shown = [samples[asked[pack[0]][0]] for pack in batch]
        prompts = processor.prompt_ids([asked[i][1].prompt for i in flat])
        answers = processor.answer_ids([asked[i][1].answer for i in flat])
        lengths = dict(zip(flat, map(len, answers), strict=True))
        texts = {i: len(prompt) + lengths[i] for i, prompt in zip(flat, prompts, strict=True)}
        capacity = max(
            len(processor.image_part(processor.image_tokens(*sample.image.shape[:2]))) + sum(texts[i] for i in pack)
            for sample, pack in zip(shown, batch, strict=True)
        )
        questions = [[asked[i][1] for i in pack] for pack in batch]
        packed = pack_questions(shown, questions, processor, capacity).to(model.device)
        losses = F.cross_entropy(model.forward_packed(packed).logits.float(), packed.targets, reduction="none")
        ends = np.cumsum([0, *(lengths[i] for i in flat)])
        values[flat] = -np.add.reduceat(losses.double().cpu().numpy(), ends[:-1])
    return values


def auc(wrong: Sequence[float], right: Sequence[float]) -> float:
    """The share of pairs of a wrong and a right one in which the wrong one has the lower score, ties counted half: 0.5
    is chance. NaN counts as the lowest; without pairs the result is NaN."""
    wrong, right = (np.nan_to_num(np.asarray(part, float), nan=-np.inf) for part in (wrong, right))
    if not len(wrong) or not len(right):
        return float("nan")
    right = np.sort(right)
    above = len(right) - np.searchsorted(right, wrong, "right")
    equal = np.searchsorted(right, wrong, "right") - np.searchsorted(right, wrong, "left")
    return float((above + equal / 2).mean() / len(right))


def _negatives(asked: list[tuple[int, int, Region]], draw: random.Random) -> list[list[int]]:
    """For each region up to NEGATIVES of other images, with other captions, of its kind where there are enough."""
    drawn = []
    for image, _, region in asked:
        strange = [
            i
            for i, (another, _, candidate) in enumerate(asked)
            if another != image and candidate.caption != region.caption
        ]
        alike = [i for i in strange if asked[i][2].kind == region.kind]
        pool = alike if len(alike) >= NEGATIVES else strange
        drawn.append(draw.sample(pool, min(NEGATIVES, len(pool))))
    return drawn


def _gains(values: np.ndarray, counts: list[int]) -> list[float]:
    """Of log-likelihoods, first each region's own, then those of its others, region by region: own less the log of the
    others' mean likelihood."""
    own, rest = values[: len(counts)], iter(values[len(counts) :])
    gains = []
    for value, number in zip(own, counts, strict=True):
        strange = np.array(list(islice(rest, number)))
        gains.append(float(value - np.logaddexp.reduce(strange) + np.log(number)) if number else float("nan"))
    return gains


def _iou(predicted: Box | None, box: Box) -> float:
    return 0.0 if predicted is None else float(box_iou(np.array(predicted), np.array(box)))
