"""Ask a model about every region of a dataset, and the same questions blinded."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import torch

from granvit.data.loader import GranDataset, spread
from granvit.eval.metrics import Prediction, summarise
from granvit.model.asking import answer
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX, Question, questions
from granvit.questions.schema import Sample

TASKS = (BBOX2CAPTION, CAPTION2BBOX)
MAX_NEW_TOKENS = 48  # of a caption; a box ends where its written form does


@dataclass(frozen=True)
class Asked:
    """A question, the image it is asked of with its row in the dataset (an id may be repeated by mistake), and
    the truth half of its prediction (see granvit.eval.metrics)."""

    question: Question
    sample: Sample
    row: int
    truth: Prediction


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name (`metrics.summarise`) and the predictions that they summarise."""

    metrics: dict[str, float]
    predictions: list[Prediction]


def ask(
    dataset: GranDataset,
    tasks: Iterable[str],
    limit: int | None = None,
    write: Callable[..., list[Question]] = questions,
    pictures: bool = True,
) -> Iterator[Asked]:
    """Every question of the tasks (about regions) on at most `limit` images, spread evenly over the dataset,
    so that no source is left out; sentences that regions share are asked of each. `write` writes a sample's questions.
    Without `pictures` images are blank. Faulty rows are skipped, and counted by the dataset.
    """
    chosen, tasks = spread(len(dataset), limit), tuple(tasks)
    read = dataset.__getitem__ if pictures else dataset.annotations
    for row, sample in zip(chosen, map(read, chosen), strict=True):
        for question in [] if sample is None else write(sample, tasks, shared=True):
            region = sample.regions[question.region]
            truth = {"id": sample.id, "source": sample.source, "task": question.task, "kind": region.kind}
            truth |= {"box": list(region.box), "caption": region.caption}
            truth |= {"dataset": sample.dataset} if sample.dataset else {}
            yield Asked(question, sample, row, truth)


def other_images(samples: dict[int, Sample]) -> dict[int, Sample]:
    """For each sample, by its row, another one whose image is shown instead: a derangement, the same at every
    call.

    One cycle through all samples, in a seeded order within each source: nearly every image is replaced by one
    of its own source, so that a page stands in for a page and gives away no more than that.
    """
    if len(samples) < 2:
        raise ValueError(f"blind='other_image' needs at least 2 images, the dataset has {len(samples)}")
    order = random.Random(0).sample(list(samples), len(samples))
    order.sort(key=lambda row: samples[row].source)
    return {here: samples[there] for here, there in zip(order, order[1:] + order[:1], strict=True)}


@torch.no_grad()
def evaluate(
    model: Any,
    processor: Any,
    dataset: GranDataset,
    tasks: tuple[str, ...] = TASKS,
    blind: Literal["other_image", "text"] | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    rank: int = 0,
    ranks: int = 1,
    gather: Callable[[list[Prediction]], list[list[Prediction]]] = lambda own: [own],
    progress: Callable[[int, int], None] | None = None,
    questions: int | None = None,
) -> Evaluation:
    """Ask `model` (a GranViT) the tasks' questions of at most `limit` images of `dataset`, greedily decoded.

    blind: None; "other_image" shows another test image with every question (`other_images`); "text" shows
        none, only the question's text. The images are held in memory, so `limit` is for large test sets. The
        model is put back into training mode if it was.
    rank, ranks, gather: processes that share the questions; gather returns every rank's predictions to each.
    progress: called with the number of answers that there are, and of how many, after each batch.
    questions: at most so many, spread evenly over tasks, kinds and images.
    ValueError for another `blind`, a dataset without
        regions, and where "other_image" finds one image only.
    """
    if blind not in (None, "other_image", "text"):
        raise ValueError(f"blind must be None, 'other_image' or 'text', got {blind!r}")
    asked = list(ask(dataset, tasks, limit, processor.questions))
    if not asked:
        raise ValueError(f"nothing to ask: none of {len(dataset)} rows has a region for {', '.join(tasks)}")
    shown = {a.row: a.sample for a in asked}
    if blind == "other_image":
        shown = other_images(shown)
    # Answers of one task and kind are of about one length: few steps are spent on rows that have ended.
    asked.sort(key=lambda a: (a.truth["task"], a.truth["kind"]))
    asked = [asked[i] for i in spread(len(asked), questions)][rank::ranks]

    training = model.training
    model.eval()
    images = None if blind == "text" else {row: sample.image for row, sample in shown.items()}
    asked_of = [a.row for a in asked]
    answers = answer(
        model, processor, [a.question for a in asked], asked_of, images, batch_size, MAX_NEW_TOKENS, progress
    )
    model.train(training)

    boxes = processor.parse_boxes(answers)
    predictions = []
    for a, said, box in zip(asked, answers, boxes, strict=True):
        predicted = list(box) if box is not None and a.truth["task"] == CAPTION2BBOX else None
        predictions.append({**a.truth, "answer": said, "predicted_box": predicted})
    parts = gather(predictions)
    predictions = [prediction for several in zip_longest(*parts) for prediction in several if prediction is not None]
    return Evaluation(summarise(predictions), predictions)
