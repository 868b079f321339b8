"""Training steps of both stages beside the recipe of one question a sample (one_question.py), at the smoke preset's
size, six questions an image. The measure is trained regions a second.

Both sides have the same weights, images, questions and crops a step, and their losses are compared before anything is
timed. What packing saves is known beforehand: the ratio of operations of the two recipes with their padding
(granvit.cost.flops). The aim is a step faster by 0.9 of that than the other recipe's, whose teacher sees one crop at a
time; with all crops at once it is timed too. Ours cuts its patches out of pixels within the time, the other before.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from one_question import OneQuestion, prepare, trainer
from workloads import PACKING_SHARE

from granvit.cost.flops import Sizes, count, one_question_each, operations, packed, padded, pictures_of
from granvit.data.batches import collate
from granvit.data.crops import Crops
from granvit.data.loader import GranDataset
from granvit.data.sample import cached_sample
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX, GLOBAL_CAPTION, Question
from granvit.questions.schema import Region, Sample
from granvit.train.build import build
from granvit.train.distill import Teacher
from granvit.train.presets import PRESETS
from granvit.train.step import stage_loss

SMOKE = PRESETS["smoke"]
IMAGES, QUESTIONS = 12, 6
CROPS = Crops(SMOKE.distill.crop_tokens)
STAGES = {
    "pretrain": (SMOKE.pretrain, BBOX2CAPTION),
    "adapt": (SMOKE.adapt, CAPTION2BBOX),
}


@pytest.fixture(scope="module")
def data() -> GranDataset:
    return GranDataset(cached_sample(600))


def mixed(data: GranDataset, processor, task: str) -> tuple[list[Sample], list[list[Question]]]:
    """Pictures of the sample set, the global caption and regions asked for until there are six questions. A picture
    with fewer regions borrows others' captions, at boxes of its own."""
    draw = random.Random(0)
    rows = [i for i in range(len(data)) if data.annotations(i) is not None]
    captions = sorted({region.caption for i in rows for region in data.annotations(i).regions})
    samples, asked = [], []
    for row in draw.sample(rows, IMAGES):
        sample = data[row]
        wanted = QUESTIONS - (1 if sample.caption else 0)
        regions = list({region.caption: region for region in sample.regions}.values())[:wanted]
        for caption in draw.sample([c for c in captions if c not in {r.caption for r in regions}], wanted):
            if len(regions) < wanted:
                regions.append(Region(_box(draw), caption, "natural"))
        samples.append(replace(sample, regions=tuple(regions)))
        asked.append(processor.questions(samples[-1], [GLOBAL_CAPTION, task]))
    return samples, asked


def equal(data: GranDataset, processor, task: str) -> tuple[list[Sample], list[list[Question]]]:
    """Pictures of one size and questions of one length: nobody has anything to pad."""
    draw = random.Random(0)
    rows = [i for i in range(len(data)) if data.annotations(i) is not None]
    captions = sorted({region.caption for i in rows for region in data.annotations(i).regions})
    lengths = [len(ids) for ids in processor.answer_ids(captions)]
    usual = Counter(lengths).most_common(1)[0][0]
    captions = [caption for caption, length in zip(captions, lengths, strict=True) if length == usual]
    sizes = Counter(tuple(data.annotations(i).image.shape[:2]) for i in rows)
    square = max((size for size in sizes if size[0] == size[1]), key=sizes.get)
    rows = [i for i in rows if tuple(data.annotations(i).image.shape[:2]) == square]
    samples = [
        replace(
            data[row],
            regions=tuple(Region(_box(draw), caption, "natural") for caption in draw.sample(captions, QUESTIONS)),
        )
        for row in draw.sample(rows, IMAGES)
    ]
    return samples, [processor.questions(sample, [task]) for sample in samples]


def _box(draw: random.Random) -> tuple[float, float, float, float]:
    x, y = draw.uniform(0, 0.5), draw.uniform(0, 0.5)
    return x, y, x + draw.uniform(0.15, 0.5), y + draw.uniform(0.15, 0.5)


@pytest.mark.parametrize("sizes", [mixed, equal], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", STAGES)
def test_training(compare, data: GranDataset, name: str, sizes: Callable):
    stage, task = STAGES[name]
    torch.manual_seed(0)
    model, processor = build(SMOKE.model, data)
    samples, asked = sizes(data, processor, task)
    batch = collate(samples, asked, processor, SMOKE.data.capacity, CROPS if stage.distill else None)
    pairs = [(sample, question) for sample, row in zip(samples, asked, strict=True) for question in row]
    random.Random(1).shuffle(pairs)  # as a loader would: one image's questions are not neighbours
    dtype = torch.float32
    theirs = prepare(pairs, model, processor, SMOKE.distill, dtype)
    gate(model, batch, theirs, stage)

    mine = deepcopy(model)
    teacher = taught(mine, batch, stage)
    statistics = teacher and teacher.statistics

    def ours():
        yield stage_loss(mine, teacher, batch, stage, SMOKE.distill)["loss"]

    step = trainer(mine.groups(), stage, ours, mine.encoder, teacher and teacher.encoder, SMOKE.distill.alpha)

    def peer(at_once: bool) -> Callable[[], float]:
        other = OneQuestion(model, stage, SMOKE.distill, at_once, statistics)

        def loss():
            losses = other.losses(theirs)
            yield losses["loss_caption"] + stage.distill * losses.get("loss_distill", 0)

        return trainer(other.groups(), stage, loss, other.encoder, other.teacher, SMOKE.distill.alpha)

    peers = {"one question a sample": lambda: peer(False)}
    if stage.distill:
        peers["one question a sample, crops at once"] = lambda: peer(True)
    bound = ratios(model, samples, asked, batch, pairs, processor, stage)
    regions = batch.packed.regions
    workload = f"{IMAGES} images of {sizes.__name__} sizes, {QUESTIONS} questions each, {regions} regions"
    aims = {"one question a sample": ("ratio", PACKING_SHARE * bound["ratio_padded"])}
    compare("training", name, workload, step, peers, count=regions, aims=aims, regions=regions, **bound)


@torch.no_grad()
def taught(model, batch, stage) -> Teacher | None:
    """A teacher that knows the statistics of a step."""
    if not stage.distill:
        return None
    teacher = Teacher(model.encoder, SMOKE.distill.alpha)
    teacher.statistics.update(stage_loss(model, teacher, batch, stage, SMOKE.distill)["moments"])
    return teacher


def gate(model, batch, theirs, stage) -> None:
    """Raises AssertionError unless both sides compute the same losses from the same weights."""
    teacher = taught(model, batch, stage)
    with torch.no_grad():
        mine = stage_loss(model, teacher, batch, stage, SMOKE.distill)
        for at_once in (False, True):
            other = OneQuestion(model, stage, SMOKE.distill, at_once, teacher and teacher.statistics).losses(theirs)
            for name, loss in other.items():
                torch.testing.assert_close(mine[name], loss, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert ("loss_distill" in mine) == bool(stage.distill)


def ratios(model, samples, asked, batch, pairs, processor, stage) -> dict[str, float]:
    """How many times ours the other recipe's operations are: the useful ones, and with both sides' padding; and shares
    of padding."""
    crops = CROPS.choose(samples, asked, [range(len(samples))], processor) if stage.distill else ()
    pictures = pictures_of(samples, asked, processor, crops)
    rows = [[pictures[i] for i in dict.fromkeys(row) if i >= 0] for row in batch.packed.image_index.tolist()]
    alone = one_question_each(pictures)
    model_sizes = Sizes.of(model)
    counts = {
        "ours": count(pictures),
        "ours padded": packed(rows),
        "theirs": count(alone),
        "theirs padded": padded(alone),
    }
    total = {key: operations(model_sizes, one, stage.train).total for key, one in counts.items()}
    assert counts["theirs"].questions == len(pairs)
    return {
        "ratio_operations": total["theirs"] / total["ours"],
        "ratio_padded": total["theirs padded"] / total["ours padded"],
        "our_padding": 1 - counts["ours"].tokens / counts["ours padded"].tokens,
        "their_padding": 1 - counts["theirs"].tokens / counts["theirs padded"].tokens,
    }
