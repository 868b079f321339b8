"""What a stage reads: its images and questions as the trainer packs them, and how much of the data that is."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from granvit.cost.config import ASSUMED, PlanConfig
from granvit.cost.flops import Asked, Picture, pictures_of
from granvit.data.lengths import Lengths, lengths_of
from granvit.data.loader import GranDataset, spread
from granvit.data.mixture import shares
from granvit.data.order import Order
from granvit.data.planning import Lane, packs_of
from granvit.eval.loading import find_model
from granvit.model import GranViTConfig, GranViTProcessor
from granvit.model.config import cached_fit_grid
from granvit.model.llm import SMOLLM2, TOY, load_llm
from granvit.questions.prompts import BBOX2CAPTION, GLOBAL_CAPTION
from granvit.questions.turns import end_of_turn
from granvit.toy.tiny import train_tokenizer
from granvit.train.build import training_text
from granvit.train.counting import order_seed
from granvit.train.stages import Stage


@dataclass(frozen=True)
class Question:
    """Mean tokens of a question (prompt and answer) and of its answer."""

    tokens: float
    answers: float


@dataclass(frozen=True)
class Reading:
    """What one stage reads.

    rows: for each sequence its images with the questions that are asked of them, of one pass over some images. regions:
    questions about regions that there are of those images. images: of the whole data set. packs: sequences a batch.
    source: where lengths come from.
    """

    source: str
    region: Question
    caption: Question
    rows: list[list[Picture]]
    regions: int
    images: float
    packs: int


@dataclass(frozen=True)
class Seen:
    """What a whole stage sees: counts of one run, but for shares and means. padding: share of the sequences' tokens."""

    steps: float
    images_a_step: float
    images: float
    times: float
    asked: float
    asked_share: float
    tokens: float
    padding: float
    crops: float


def seen(stage: Stage, reading: Reading, capacity: int) -> Seen:
    """What the stage sees in its steps, or in its epochs, judged by the sequences of `reading`."""
    pictures = [picture for row in reading.rows for picture in row]
    a_step = len(pictures) / len(reading.rows) * reading.packs * stage.accumulate
    images = stage.steps * a_step if stage.epochs is None else reading.images * stage.epochs
    scale = images / len(pictures)
    asked = sum(asked.region for picture in pictures for asked in picture.asked)
    tokens = sum(picture.length for picture in pictures)
    return Seen(
        images / a_step,
        a_step,
        images,
        images / reading.images,
        scale * asked,
        asked / max(1, reading.regions),
        scale * tokens,
        1 - tokens / (capacity * len(reading.rows)),
        scale * sum(len(picture.crops) for picture in pictures),
    )


def assumed_reading(plan: PlanConfig, config: GranViTConfig, stage: Stage) -> Reading:
    """Images of one size, with `assumed_regions`, packed as the trainer does."""
    region = Question(plan.prompt_tokens + plan.answer_tokens, plan.answer_tokens)
    caption = Question(plan.prompt_tokens + plan.caption_tokens, plan.caption_tokens)
    reading = Reading(ASSUMED, region, caption, [], 0, plan.images, 0)
    pictures = [typical(plan, config, stage, reading, number, plan.image_size) for number in assumed_regions(plan)]
    asked = [asked for picture in pictures for asked in picture.asked]
    lengths = Lengths(
        tuple(sorted(stage.tasks)),
        np.array([picture.tokens for picture in pictures], np.int32),
        np.cumsum([0, *(len(picture.asked) for picture in pictures)]),
        np.array([question.tokens for question in asked], np.int32),
        np.array([_task(stage, question) for question in asked], np.int8),
        [],
    )
    rows = []
    for pack in _one_pass(plan, stage, lengths):
        chosen = [(pictures[row], [pictures[row].asked[n] for n in numbers]) for row, numbers in pack]
        rows.append([_asked(picture, tuple(questions)) for picture, questions in chosen])
    packs = stage.packs or _packs(plan, stage, lengths)
    return replace(reading, rows=rows, regions=sum(question.region for question in asked), packs=packs)


def assumed_regions(plan: PlanConfig) -> list[int]:
    """How many regions each of `plan.rows` images has: drawn from a geometric distribution with the data set's mean, at
    least one where that is possible (Gran-29M has no image without)."""
    mean = plan.regions / plan.images
    place = np.random.default_rng(0).permutation((np.arange(plan.rows) + 0.5) / plan.rows)  # quantiles, in any order
    numbers = 1 + np.log1p(-place) // np.log1p(-1 / mean) if mean > 1 else place < mean
    return numbers.astype(int).tolist()


def _asked(picture: Picture, questions: tuple[Asked, ...]) -> Picture:
    """An image of which these questions alone are asked, and these regions' crops alone seen."""
    return replace(picture, asked=questions, crops=picture.crops[: sum(asked.region for asked in questions)])


def _task(stage: Stage, question: Asked) -> int:
    """Which of the stage's tasks an assumed question is: of those about regions, the first."""
    tasks = sorted(stage.tasks)
    return next(i for i, task in enumerate(tasks) if (task != GLOBAL_CAPTION) == question.region)


def _one_pass(plan: PlanConfig, stage: Stage, lengths: Lengths) -> list[list[tuple[int, list[int]]]]:
    data, rows = plan.run.data, len(lengths.image)
    order = Order(np.ones(rows, dtype=np.int64), 1, plan.run.seed, lengths.image)
    return list(Lane(lengths, order, 0, stage.weights, data.capacity, data.questions_per_image, 512, epochs=1))


def _packs(plan: PlanConfig, stage: Stage, lengths: Lengths) -> int:
    data, images = plan.run.data, stage.images / stage.accumulate
    seed = order_seed(plan.run, stage)
    return packs_of(images, lengths, stage.weights, data.capacity, data.questions_per_image, seed)


def measured_reading(plan: PlanConfig, stage: Stage, data: GranDataset, processor: GranViTProcessor) -> Reading:
    """The packs of one pass over `plan.rows` rows of a dataset, planned as the trainer plans them."""
    looked_at = _looked_at(data, plan)
    samples = [sample for sample in map(data.annotations, looked_at) if sample is not None]
    tasks = sorted(stage.tasks)
    lengths = lengths_of(samples, processor, tasks)
    packs, capacity = _one_pass(plan, stage, lengths), plan.run.data.capacity
    if not packs:
        raise ValueError(f"{data.path}: no image with a question of {tasks} fits {capacity} tokens (data.capacity)")
    flat = [(samples[row], numbers) for pack in packs for row, numbers in pack]
    asked, regions = [], 0
    for sample, numbers in flat:
        written = processor.questions(sample, tasks)
        asked.append([written[number] for number in numbers])
        regions += sum(question.region is not None for question in written)
    sequences = iter(range(len(flat)))
    sequences = [[next(sequences) for _ in pack] for pack in packs]
    packed = [sample for sample, _ in flat]
    crops = plan.run.crops.choose(packed, asked, sequences, processor) if stage.distill else ()
    pictures = pictures_of(packed, asked, processor, crops)
    every = [question for picture in pictures for question in picture.asked]
    return Reading(
        f"{len(samples)} rows of {data.path}",
        _mean([question for question in every if question.region]),
        _mean([question for question in every if not question.region]),
        [[pictures[i] for i in sequence] for sequence in sequences],
        regions,
        len(data) * len(flat) / max(1, len(looked_at)),
        stage.packs or _packs(plan, stage, lengths),
    )


def _looked_at(data: GranDataset, plan: PlanConfig) -> list[int]:
    """At most `plan.rows` rows, evenly spread over the dataset; of a mixture, as many of each dataset as its share is,
    one more than once where it is drawn so often."""
    weights = plan.run.data.weights
    if weights is None:
        return list(spread(len(data), plan.rows))
    number, rows, first = min(plan.rows, len(data)), [], 0
    for part, share in zip(data.parts, shares([], weights), strict=True):
        rows += (first + np.linspace(0, len(part), round(number * share), endpoint=False).astype(int)).tolist()
        first += len(part)
    return rows


def _mean(asked: Sequence[Asked]) -> Question:
    number = max(1, len(asked))
    return Question(sum(a.tokens for a in asked) / number, sum(a.answers for a in asked) / number)


def typical(
    plan: PlanConfig, config: GranViTConfig, stage: Stage, reading: Reading, regions: int, image_size: tuple[int, int]
) -> Picture:
    """An image of that size with its regions' questions, and its global caption's where that is asked for."""
    patch, merge = config.patch_size, config.pixel_shuffle
    grid = cached_fit_grid(*image_size, patch, config.max_image_tokens)
    tokens = -(-grid[0] // merge) * -(-grid[1] // merge)
    with_tokens = config.box_style != "text" and BBOX2CAPTION in stage.tasks
    prompts = config.region_tokens if with_tokens else 0
    cells = grid[0] * grid[1] // 10  # about a tenth is under a box (bench/workloads.py)
    region = Asked(round(reading.region.tokens), round(reading.region.answers), prompts, cells)
    caption = Asked(round(reading.caption.tokens), round(reading.caption.answers), region=False)
    asked = [region] * regions + [caption] * (GLOBAL_CAPTION in stage.tasks and stage.global_captions > 0)
    crops = (max(plan.run.distill.crop_tokens, cells),) * regions if stage.distill else ()
    head = next((picture.head for row in reading.rows for picture in row), 1)
    return Picture(grid[0] * grid[1], head + tokens, tuple(asked), crops, head)


def tokenizer_for(plan: PlanConfig, data: GranDataset) -> tuple[PreTrainedTokenizerBase, str]:
    """The LLM's tokenizer, where it is on this machine, else a stand-in, and what to say of it."""
    name = plan.run.model.llm
    if name is None:
        return train_tokenizer(training_text(data), plan.run.model.vocabulary), ""
    if Path(name).is_dir() and any(Path(name).glob("tokenizer*")):
        return AutoTokenizer.from_pretrained(name), ""
    if name in (SMOLLM2, TOY):
        try:
            return load_llm(name)[1], ""
        except (ValueError, ImportError):
            pass
    return train_tokenizer(training_text(data), 8192), f"; the tokenizer of {name} is not here, one of 8192 tokens is"


def processor_for(plan: PlanConfig, config: GranViTConfig, data: GranDataset) -> tuple[GranViTProcessor, str]:
    """The run's processor, and what to say of it. The table of an LLM that is made from scratch gets its size here."""
    model = plan.run.model
    if model.whole:
        return GranViTProcessor.from_pretrained(find_model(model.whole)), ""
    tokenizer, note = tokenizer_for(plan, data)
    if model.llm is None:
        config.text_config.vocab_size = len(tokenizer)
    known = deepcopy(config)
    known.text_vocab = len(tokenizer)
    known.end_of_turn_token_id = end_of_turn(tokenizer, model.chat_template)
    return GranViTProcessor.from_config(known, tokenizer), note
