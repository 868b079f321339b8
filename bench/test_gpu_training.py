"""A training step on a GPU at the shapes of real models, beside the recipe of one question a sample (one_question.py).

Random weights, bfloat16 autocast, six questions an image of up to 1024 patches; rows go to DEVICE-training.json as they
are measured, and a case whose rows this commit already has is skipped. MFU is of useful operations alone
(granvit.cost.flops): no recomputation, no padding, a frozen LLM 4 a parameter and token. What does not fit is halved
until it does. Our first loss is held to that of float32 with the reference operators; a peer that fails, or whose
losses are others after as many steps, gets a row that says so. GRANVIT_BENCH_DEVICE=cpu is a dry run at a tiny size,
in float32.
"""

from __future__ import annotations

import gc
import json
import os
import random
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from one_question import OneQuestion, Samples, prepare, trainer
from rows import Rows, gpu_file, gpu_name, judged, provenance
from workloads import PACKING_SHARE, aims, image_sizes

from granvit.cost.flops import Sizes, count, one_question_each, operations, padded, pictures_of
from granvit.cost.shapes import config_of
from granvit.data.collate import collate
from granvit.data.crops import Crops
from granvit.model import GranViT
from granvit.model.config import token_grid
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX, GLOBAL_CAPTION, Question
from granvit.questions.prompts import questions as questions_of
from granvit.questions.schema import Region, Sample
from granvit.train.distill import Teacher
from granvit.train.parallel.compiling import compile_blocks
from granvit.train.presets import Distill, Model
from granvit.train.stages import Stage
from granvit.train.step import stage_loss
from granvit_kernels.backends import VARIABLE

DEVICE = os.environ.get("GRANVIT_BENCH_DEVICE", "cuda")
DRY = DEVICE == "cpu"
if not DRY and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if DRY:
    torch.set_num_threads(1)  # tensors so small that a second one is in the way

PEAKS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "B200": 2250.0}
"""10^12 dense bfloat16 operations a second, by the vendor's data sheets (SXM)."""
QUESTIONS = 6
TEXT = {"box_style": "text", "box_format": "text"}
SMALL = {f"{part}_{name}": n for part in ("encoder", "llm") for name, n in (("width", 32), ("layers", 1), ("heads", 2))}
SHAPES = {"tiny": (Model(**SMALL, **TEXT, vocabulary=400, max_image_tokens=16), 4, 9)} if DRY else {
    "large": (Model(encoder="siglip2-so400m", llm="qwen2.5-1.5b", max_image_tokens=1024, **TEXT), 8, 8),
    "base": (Model(encoder="siglip2-base", llm="smollm2-135m", max_image_tokens=1024, **TEXT), 24, 16),
}  # fmt: skip
"""Shapes, images a step, and samples that the other recipe takes at a time (its step is as large)."""
DISTILL = Distill(
    target="mse", alpha=0.9, crop_tokens=6 if DRY else 256, region_grid=(2, 2) if DRY else (7, 7)
)  # fmt: skip
CROPS = Crops(DISTILL.crop_tokens)
STAGES = {
    "pretrain": Stage("pretrain", ("encoder", "projector"), (GLOBAL_CAPTION, BBOX2CAPTION), distill=1.0),
    "adapt": Stage("adapt", ("projector", "llm"), (GLOBAL_CAPTION, CAPTION2BBOX)),
}
TOLERANCE = 1e-4 if DRY else 0.02
"""Of two losses, as a share: what bfloat16 and other orders of summing may do in a few steps."""


class Writer:
    """Stands in for a processor: ids of no meaning, of the lengths that Qwen2.5's tokenizer gives such sentences, plus
    or minus two fifths. No tokenizer has to be there."""

    LENGTHS = {BBOX2CAPTION: (48, 14), CAPTION2BBOX: (32, 26), GLOBAL_CAPTION: (20, 60)}

    def __init__(self, config) -> None:
        self.patch_size, self.max_image_tokens = config.vision_config.patch_size, config.max_image_tokens
        self.image_token_id, self.region_token_id = config.image_token_id, config.region_token_id
        self.region_tokens, self.vocab = 1, config.text_vocab
        self.tokenizer = SimpleNamespace(pad_token_id=0)

    def image_tokens(self, height: int, width: int) -> int:
        rows, columns = token_grid(height, width, self.patch_size, self.max_image_tokens, 1)
        return rows * columns

    def image_part(self, number: int) -> list[int]:
        return [1, *[self.image_token_id] * number]

    def _ids(self, text: str, task: str, which: int) -> list[int]:
        draw = random.Random(zlib.crc32(text.encode()))
        length = max(1, round(self.LENGTHS[task][which] * draw.uniform(0.6, 1.4)))
        return [draw.randrange(3, self.vocab) for _ in range(length)]

    def prompt_ids(self, prompts: list[str]) -> list[list[int]]:
        heads = {"Describe in": GLOBAL_CAPTION, "Describe th": BBOX2CAPTION, "Please prov": CAPTION2BBOX}
        return [self._ids(prompt, heads[prompt[:11]], 0) for prompt in prompts]

    def answer_ids(self, answers: list[str]) -> list[list[int]]:
        heads = {"[": CAPTION2BBOX, "a": BBOX2CAPTION, "i": GLOBAL_CAPTION}  # as `samples` writes them
        return [self._ids(answer, heads[answer[0]], 1) for answer in answers]

    def turn_ids(self, questions: list[Question]) -> list[list[tuple[list[int], list[int]]]]:
        return [
            list(zip(self.prompt_ids([question.prompt]), self.answer_ids([question.answer]), strict=True))
            for question in questions
        ]


def samples(images: int) -> list[Sample]:
    """Noise of 224 to 1536 pixels a side, each with a caption and five regions."""
    draw, noise = random.Random(0), torch.Generator().manual_seed(0)
    drawn = []
    for number, (height, width) in enumerate(image_sizes("B", images)):
        if DRY:
            height, width = height // 8, width // 8
        image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=noise)
        regions = []
        for region in range(QUESTIONS - 1):
            x, y = draw.uniform(0, 0.5), draw.uniform(0, 0.5)
            box = (x, y, x + draw.uniform(0.15, 0.5), y + draw.uniform(0.15, 0.5))
            regions.append(Region(box, f"a thing {number} {region}", "natural"))
        drawn.append(Sample(str(number), image, f"image {number}", tuple(regions), "noise", ""))
    return drawn


# ---- a step of each recipe ----


def model_of(shapes: Model) -> GranViT:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = GranViT(config_of(shapes))
    with torch.no_grad():  # as published weights are, so that frozen ones may be held in bfloat16
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.match_llm_scale(reset_locations=True)
    return model.train()


def autocast() -> torch.autocast:
    return torch.autocast(torch.device(DEVICE).type, torch.bfloat16, enabled=not DRY)


def finish(module: torch.nn.Module, teacher: torch.nn.Module | None, compiled: bool) -> None:
    """Compile the blocks, as the trainer does."""
    for part in filter(None, (module, teacher)) if compiled else ():
        compile_blocks(part)


@contextmanager
def reference_operators() -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "reference"
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def ours(
    model: GranViT, stage: Stage, samples: list[Sample], writer: Writer, compiled: bool
) -> tuple[Callable[[], float], float]:
    """A step, and what its first loss has to be."""
    asked = [questions_of(sample, stage.tasks) for sample in samples]
    crops = CROPS if stage.distill else None
    batch = collate(samples, asked, writer, max(8192, 2 * writer.max_image_tokens), crops).to(torch.device(DEVICE))
    teacher = Teacher(model.encoder, DISTILL.alpha) if stage.distill else None

    with torch.no_grad(), reference_operators():
        expected = float(stage_loss(model, teacher, batch, stage, DISTILL)["loss"])

    def losses():
        with autocast():
            loss = stage_loss(model, teacher, batch, stage, DISTILL)["loss"]
        yield loss

    encoder = teacher and teacher.encoder
    step = trainer(model.groups(), stage, losses, model.encoder, encoder, DISTILL.alpha)
    finish(model, encoder, compiled)
    return step, expected


def theirs(
    model: GranViT, stage: Stage, batches: list[Samples], compiled: bool, crops_at_once: bool
) -> Callable[[], float]:
    other = OneQuestion(model, stage, DISTILL, crops_at_once).train()
    answers = sum(len(batch.targets) for batch in batches)
    crops = sum(len(batch.crop_samples) for batch in batches)

    def losses():  # gradients of the whole step's mean losses, batch by batch
        for batch in batches:
            with autocast():
                parts = other.losses(batch)
                loss = parts["loss_caption"] * (len(batch.targets) / answers)
                if "loss_distill" in parts:
                    loss = loss + stage.distill * parts["loss_distill"] * (len(batch.crop_samples) / crops)
            yield loss

    step = trainer(other.groups(), stage, losses, other.encoder, other.teacher, DISTILL.alpha)
    finish(other, other.teacher, compiled)
    return step


@dataclass(frozen=True)
class Timed:
    """Seconds of each step after those of warming up, their peak of memory in bytes, and the losses of all steps."""

    seconds: list[float]
    memory: int
    losses: list[float]

    def figures(self) -> dict[str, object]:
        return {
            "median": float(np.median(self.seconds)), "seconds": self.seconds, "losses": self.losses,
            "peak_memory_bytes": self.memory,
        }  # fmt: skip


def timed(step: Callable[[], float], warm: int, rounds: int) -> Timed:
    def synchronize() -> None:
        if not DRY:
            torch.cuda.synchronize()

    losses = [step() for _ in range(warm)]
    if not DRY:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        losses.append(step())
        synchronize()
        seconds.append(time.perf_counter() - start)
    return Timed(seconds, 0 if DRY else torch.cuda.max_memory_allocated(), losses)


def halving(number: int, run: Callable[[int], tuple]) -> tuple[int, tuple]:
    """(number, run(number)) of the largest of number, number / 2, ... that fits the memory."""
    while True:
        try:
            return number, run(number)
        except torch.OutOfMemoryError:
            if number == 1:
                raise
        number = -(-number // 2)
        gc.collect()
        torch.cuda.empty_cache()


def close(loss: float, expected: float) -> bool:
    return abs(loss - expected) <= TOLERANCE * abs(expected)


# ---- the rows ----
ROWS = Rows(gpu_file("training"), ("mode", "shape", "provider", "compiled"))


def peak(device: str) -> float | None:
    return next((tflops for name, tflops in PEAKS.items() if name in device), None)


class Case:
    """What the rows of one comparison share: the samples, their operations, and the speed they are worth."""

    def __init__(self, shape: str, stage: Stage, compiled: bool, images: int, writer: Writer, sizes: Sizes) -> None:
        self.shape, self.stage, self.sizes = shape, stage, sizes
        self.samples = samples(images)
        self.asked = [questions_of(sample, stage.tasks) for sample in self.samples]
        together = [range(len(self.samples))]
        crops = CROPS.choose(self.samples, self.asked, together, writer) if stage.distill else ()
        self.pictures = pictures_of(self.samples, self.asked, writer, crops)
        self.counts = count(self.pictures)
        shapes, device = SHAPES[shape][0], gpu_name()
        self.peak = peak(device)
        self.common = {
            "operator": "training", "mode": stage.name, "shape": shape, "shapes": [shapes.encoder, shapes.llm],
            "workload": f"{images} images of up to {shapes.max_image_tokens} patches, {self.counts.questions} "
                        f"questions, {self.counts.regions} regions, {self.counts.tokens} tokens",
            "compiled": compiled, "device_tflops": self.peak, **provenance(device),
        }  # fmt: skip

    def operations(self, counts) -> int:
        return operations(self.sizes, counts, self.stage.train).total

    def row(self, provider: str, measured: Timed, useful: int, aim: tuple[str, float] | None, **more) -> dict:
        """useful: operations that the recipe needs."""
        figures = measured.figures()
        rate = useful / figures["median"] / 1e12
        row = {
            **self.common, "provider": provider, **figures, "tflops": rate,
            "regions_per_second": self.counts.regions / figures["median"],
            "tokens_per_second": self.counts.tokens / figures["median"],
            **({"mfu": rate / self.peak} if self.peak else {}), **more,
        }  # fmt: skip
        return judged(row, *aim) if aim and aim[0] in row else row


@pytest.mark.parametrize("compiled", [False] if DRY else [False, True], ids=lambda c: "compiled" if c else "eager")
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_training(shape: str, name: str, compiled: bool):
    shapes, images, at_a_time = SHAPES[shape]
    stage = STAGES[name]
    peers = {"one question a sample": False} | ({"one question a sample, crops at once": True} if stage.distill else {})
    if compiled:  # the fastest is enough of what compiles for as long as ours
        peers = dict([list(peers.items())[-1]])
    here = {"mode": name, "shape": shape, "compiled": compiled}
    if all(ROWS.has(**here, provider=provider) for provider in ("granvit", *peers)):
        pytest.skip("measured at this commit")
    writer = Writer(config_of(shapes))

    def run_ours(number: int) -> tuple[Sizes, float, Timed]:
        model = model_of(shapes)
        step, expected = ours(model, stage, samples(number), writer, compiled)
        return Sizes.of(model), expected, timed(step, *((1, 1) if DRY else (2, 4)))

    images, (sizes, expected, measured) = halving(images, run_ours)
    assert close(measured.losses[0], expected), (measured.losses, expected)
    case = Case(shape, stage, compiled, images, writer, sizes)
    useful = case.operations(case.counts)
    mine = case.row("granvit", measured, useful, aims("training", name, shape).get("granvit"))
    ROWS.save(mine)
    print(json.dumps(mine))
    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()
    alone = one_question_each(case.pictures)
    pairs = [(sample, question) for sample, own in zip(case.samples, case.asked, strict=True) for question in own]
    order = random.Random(1).sample(range(len(pairs)), len(pairs))
    full = sum(
        case.operations(padded([alone[i] for i in order[start : start + at_a_time]]))
        for start in range(0, len(order), at_a_time)
    )
    once = case.operations(count(alone))
    ratios = {"ratio_operations": once / useful, "ratio_padded": full / useful}
    for peer, crops_at_once in peers.items():

        def run_theirs(number: int, crops_at_once: bool = crops_at_once) -> Timed:
            model = model_of(shapes)
            batches = [
                prepare([pairs[i] for i in order[start : start + number]], model, writer, DISTILL, torch.float32)
                .to(DEVICE)
                for start in range(0, len(order), number)
            ]  # fmt: skip
            return timed(theirs(model, stage, batches, compiled, crops_at_once), 1, 1 if DRY else 2)

        try:
            samples_at_a_time, other = halving(at_a_time, run_theirs)
            # From the same weights, on the same questions and after as many steps, both have to be in one place.
            pairs_of_losses = list(zip(other.losses, measured.losses, strict=False))
            assert all(close(*losses) for losses in pairs_of_losses), f"losses (its, ours): {pairs_of_losses}"
        except Exception as error:
            ROWS.save({**case.common, "provider": peer, "failed": f"{type(error).__name__}: {error}"[:300]})
            continue
        aim = None if crops_at_once else ("ratio", PACKING_SHARE * ratios["ratio_padded"])
        ratio = float(np.median(other.seconds)) / mine["median"]
        row = case.row(peer, other, once, aim, at_a_time=samples_at_a_time, ratio=ratio, **ratios)
        ROWS.save(row)
        print(json.dumps(row))
