"""Ask a model about every region of a dataset, and the same questions blinded.

Images are opened twice. At first each rank looks whether its share of them can be read (`readable`), so that all ranks
know what can be asked and which image stands in for which. Then each opens those that it asks about, a few at a time.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from granvit.data.loader import GranDataset, spread
from granvit.data.schema import good_or_none
from granvit.eval.metrics import Prediction, summarise
from granvit.model.asking import answer
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX, Question
from granvit.questions.prompts import questions as write_questions
from granvit.questions.schema import DataFault
from granvit.world import World

TASKS = (BBOX2CAPTION, CAPTION2BBOX)
MAX_NEW_TOKENS = 48  # of a caption; a box ends where its written form does
SINGLE_PROCESS = World()

Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""


@dataclass(frozen=True)
class Asked:
    """A question, the image it is asked of by its row in the dataset (an id may be repeated by mistake), and the truth
    half of its prediction (see granvit.eval.metrics)."""

    question: Question
    row: int
    truth: Prediction


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name (`metrics.summarise`) and the predictions that they summarise."""

    metrics: dict[str, float]
    predictions: list[Prediction]


def readable(
    dataset: GranDataset, rows: Sequence[int], world: World = SINGLE_PROCESS, progress: Progress | None = None
) -> list[int]:
    """Those of the rows that can be asked about: whose text and picture can be read.

    Every rank calls it and opens its share of the pictures; each one's dataset then counts the faults of all. Raises
    FaultBudgetExceeded on every rank where there are too many. progress: of this rank's share.
    """
    share = rows[world.rank :: world.ranks]

    def look() -> tuple[list[tuple[int, DataFault]], set[int]]:
        faults: list[tuple[int, DataFault]] = []
        lost: set[int] = set()
        for number, row in enumerate(share, 1):
            noted: list[DataFault] = []
            if good_or_none(lambda note, row=row: dataset.read(row, note), noted.append) is None:
                lost.add(row)
            faults += [(row, fault) for fault in noted]
            if len({row for row, _ in faults}) > dataset.faults.allowed:
                break  # the budget is exceeded already, whatever the other ranks meet
            if progress:
                progress(number, len(share))
        return faults, lost

    parts = world.each(look)
    faults = sorted((fault for part, _ in parts for fault in part), key=lambda fault: fault[0])
    dataset.faults.add_all((row, dataset.name(row), fault) for row, fault in faults)
    dataset.faults.check()
    lost = set().union(*(part for _, part in parts))
    return [row for row in rows if row not in lost]


def ask(
    dataset: GranDataset,
    tasks: Iterable[str],
    rows: Iterable[int],
    write: Callable[..., list[Question]] = write_questions,
) -> Iterator[Asked]:
    """Every question of the tasks (about regions) on these rows, for sentences that regions share once for each. No
    picture is opened. `write` writes a sample's questions. Rows with a faulty text are skipped, and counted by the
    dataset."""
    tasks = tuple(tasks)
    for row in rows:
        sample = dataset.annotations(row)
        for question in [] if sample is None else write(sample, tasks, shared=True):
            region = sample.regions[question.region]
            truth = {"id": sample.id, "source": sample.source, "task": question.task, "kind": region.kind}
            truth |= {"box": list(region.box), "caption": region.caption}
            truth |= {"dataset": sample.dataset} if sample.dataset else {}
            yield Asked(question, row, truth)


def other_images(sources: Mapping[int, str]) -> dict[int, int]:
    """For each row, whose image's source is given, another one whose image is shown instead: a derangement, the same at
    every call.

    It is one of the same source, so that a page stands in for a page and gives away no more than that. Images that are
    the only ones of their source stand in for each other; where there is only one such image, it joins the source of
    the most images.
    """
    if len(sources) < 2:
        raise ValueError(f"blind='other_image' needs at least 2 images, the dataset has {len(sources)}")
    order = random.Random(0).sample(list(sources), len(sources))
    groups: dict[str, list[int]] = {}
    for row in order:
        groups.setdefault(sources[row], []).append(row)
    cycles = sorted((rows for rows in groups.values() if len(rows) > 1), key=len)
    single = [rows[0] for rows in groups.values() if len(rows) == 1]
    if len(single) == 1:
        single += cycles.pop()
    return {row: other for rows in [*cycles, single] for row, other in zip(rows, rows[1:] + rows[:1], strict=True)}


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; behind it, whatever happens, in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def evaluate(
    model: Any,
    processor: Any,
    dataset: GranDataset,
    tasks: tuple[str, ...] = TASKS,
    blind: Literal["other_image", "text"] | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    world: World = SINGLE_PROCESS,
    progress: Progress | None = None,
    rows: Sequence[int] | None = None,
    questions: int | None = None,
) -> Evaluation:
    """Ask `model` (a GranViT) the tasks' questions of at most `limit` images of `dataset`, spread evenly over it (or
    over `rows`), greedily decoded.

    blind: None; "other_image" shows another test image with every question (`other_images`); "text" shows none, only
        the question's text. The model is put back into training mode if it was, also where something is raised.
    batch_size: questions at a time. The images in memory are those of so many regions at most, and every image is
        encoded once.
    world: the processes that share the images; all call this. Each opens its own alone; predictions and figures are
        those of one process, and every rank has them. Up to batch_size regions are one rank's work.
    progress: of this rank's answers, after each batch.
    rows: what `readable` gave, where it was called before; None: it looks at the images that are asked about.
    questions: at most so many, spread evenly over tasks, kinds and images.
    Raises ValueError for another `blind`, a dataset without regions, and where "other_image" finds one image only; and
        what `readable` raises. What fails on one rank is raised on all: Failed on the others.
    """
    if blind not in (None, "other_image", "text"):
        raise ValueError(f"blind must be None, 'other_image' or 'text', got {blind!r}")
    chosen = range(len(dataset)) if rows is None else rows
    asked = list(ask(dataset, tasks, [chosen[i] for i in spread(len(chosen), limit)], processor.questions))
    asked.sort(key=lambda a: (a.truth["task"], a.truth["kind"]))
    asked = [asked[i] for i in spread(len(asked), questions)]
    if rows is None:
        good = set(readable(dataset, sorted({a.row for a in asked}), world))
        asked = [a for a in asked if a.row in good]
    if not asked:
        raise ValueError(f"nothing to ask: none of {len(dataset)} rows has a region for {', '.join(tasks)}")
    shown = {a.row: a.row for a in asked}
    if blind == "other_image":
        shown = other_images({a.row: a.truth["source"] for a in asked})
    mine = list(portions(asked, batch_size))[world.rank :: world.ranks]

    def answers() -> dict[int, str]:
        texts: dict[int, str] = {}
        total = sum(map(len, mine))
        for numbers in mine:
            of, before = [asked[i].row for i in numbers], len(texts)
            images = None if blind == "text" else {row: picture(dataset, shown[row]) for row in dict.fromkeys(of)}
            tell = (lambda now, _, before=before: progress(before + now, total)) if progress else None
            said = answer(
                model, processor, [asked[i].question for i in numbers], of, images, batch_size, MAX_NEW_TOKENS, tell
            )
            texts |= zip(numbers, said, strict=True)
        return texts

    with eval_mode(model):
        texts = {number: text for part in world.each(answers) for number, text in part.items()}
    boxes = processor.parse_boxes([texts[i] for i in range(len(asked))])
    predictions = []
    for i, (a, box) in enumerate(zip(asked, boxes, strict=True)):
        predicted = list(box) if box is not None and a.truth["task"] == CAPTION2BBOX else None
        predictions.append({**a.truth, "answer": texts[i], "predicted_box": predicted})
    return Evaluation(summarise(predictions), predictions)


def portions(asked: Sequence[Asked], size: int) -> Iterator[list[int]]:
    """The numbers of the questions in portions, rising within each: all questions of some images, at most `size` of a
    task, or those of an image that has more by itself. Images of one kind of region stand together, as their captions
    are of about one length.

    How an answer is rounded depends on the answers that are made with it. So portions, of which each is one rank's,
    don't depend on the number of ranks.
    """
    images: dict[int, list[int]] = {}
    for number, question in enumerate(asked):
        images.setdefault(question.row, []).append(number)
    kinds = {row: sorted({asked[number].truth["kind"] for number in own}) for row, own in images.items()}
    portion: list[int] = []
    counts: Counter[str] = Counter()
    for row in sorted(images, key=lambda row: (kinds[row], row)):
        own = Counter(asked[number].question.task for number in images[row])
        if portion and any(counts[task] + own[task] > size for task in own):
            yield sorted(portion)
            portion, counts = [], Counter()
        portion += images[row]
        counts += own
    if portion:
        yield sorted(portion)


def picture(dataset: GranDataset, row: int) -> torch.Tensor:
    """A row's picture, uint8 [H, W, 3], which `readable` has found good. Raises ValueError where it isn't any more."""
    sample = dataset[row]
    if sample is None:
        raise ValueError(f"{dataset.name(row)} could be read before and can't be now: the data changes meanwhile")
    return sample.image
