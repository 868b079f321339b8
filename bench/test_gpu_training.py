"""A training step on a GPU at the shapes of real models, beside the recipe of one question a sample (one_question.py).

Random weights, bfloat16 autocast, six questions an image of up to 1024 patches; rows go to
DEVICE-training.json as they are measured, and one that stands there for this commit is not measured
again. MFU is of useful operations alone (granvit.cost.flops): no recomputation, no padding, a frozen LLM 4 a parameter
and token. What does not fit is halved until it does. GRANVIT_BENCH_DEVICE=cpu is a dry run at a tiny size, in float32.
"""

from __future__ import annotations

import gc
import json
import os
import random
import time
import zlib
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from one_question import OneQuestion, Samples, prepare, trainer
from rows import Rows, gpu_file, gpu_name, provenance
from workloads import image_sizes

from granvit.cost.flops import Sizes, count, one_question_each, operations, padded, pictures_of
from granvit.cost.shapes import config_of
from granvit.data.collate import collate
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

DEVICE = os.environ.get("GRANVIT_BENCH_DEVICE", "cuda")
DRY = DEVICE == "cpu"
if not DRY and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

PEAKS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "B200": 2250.0}
"""10^12 dense bfloat16 operations a second, by the vendor's data sheets (SXM)."""
ROUNDS = 1 if DRY else 4
QUESTIONS = 6
TEXT = {"box_style": "text", "box_format": "text"}
SMALL = {f"{part}_{name}": n for part in ("encoder", "llm") for name, n in (("width", 32), ("layers", 1), ("heads", 2))}
SHAPES = {"tiny": (Model(**SMALL, **TEXT, vocabulary=400, max_image_tokens=16), 4, 9)} if DRY else {
    "large": (Model(encoder="siglip2-so400m", llm="qwen2.5-1.5b", max_image_tokens=1024, **TEXT), 8, 8),
    "base": (Model(encoder="siglip2-base", llm="smollm2-135m", max_image_tokens=1024, **TEXT), 48, 32),
}  # fmt: skip
"""Shapes, images a step, and samples that the other recipe takes at a time (its step is as large)."""
DISTILL = Distill(target="mse", alpha=0.9, crop_grid=(2, 2) if DRY else (7, 7))
STAGES = {
    "pretrain": Stage("pretrain", ("encoder", "projector"), (GLOBAL_CAPTION, BBOX2CAPTION), distill=1.0),
    "adapt": Stage("adapt", ("projector", "llm"), (GLOBAL_CAPTION, CAPTION2BBOX)),
}


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
    found = []
    for number, (height, width) in enumerate(image_sizes("B", images)):
        if DRY:
            height, width = height // 8, width // 8
        image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=noise)
        regions = []
        for region in range(QUESTIONS - 1):
            x, y = draw.uniform(0, 0.5), draw.uniform(0, 0.5)
            box = (x, y, x + draw.uniform(0.15, 0.5), y + draw.uniform(0.15, 0.5))
            regions.append(Region(box, f"a thing {number} {region}", "natural"))
        found.append(Sample(str(number), image, f"image {number}", tuple(regions), "noise", ""))
    return found


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


def ours(model: GranViT, stage: Stage, samples: list[Sample], writer: Writer, compiled: bool) -> Callable:
    asked = [questions_of(sample, stage.tasks) for sample in samples]
    batch = collate(samples, asked, writer, max(8192, 2 * writer.max_image_tokens)).to(torch.device(DEVICE))
    teacher = Teacher(model.encoder, DISTILL.alpha) if stage.distill else None

    def losses():
        with autocast():
            loss = stage_loss(model, teacher, batch, stage, DISTILL)["loss"]
        yield loss

    encoder = teacher and teacher.encoder
    step = trainer(model.groups(), stage, losses, model.encoder, encoder, DISTILL.alpha)
    finish(model, encoder, compiled)
    return step


def theirs(model: GranViT, stage: Stage, batches: list[Samples], compiled: bool, crops_at_once: bool) -> Callable:
    other = OneQuestion(model, stage, DISTILL, crops_at_once).train()
    answers = sum(len(batch.targets) for batch in batches)
    crops = sum(len(batch.crop_samples) for batch in batches)

    def losses():  # gradients of the whole step's mean losses, batch by batch
        for batch in batches:
            with autocast():
                found = other.losses(batch)
                loss = found["loss_caption"] * (len(batch.targets) / answers)
                if "loss_distill" in found:
                    loss = loss + stage.distill * found["loss_distill"] * (len(batch.crop_samples) / crops)
            yield loss

    step = trainer(other.groups(), stage, losses, other.encoder, other.teacher, DISTILL.alpha)
    finish(other, other.teacher, compiled)
    return step


def timed(step: Callable) -> tuple[list[float], float, float]:
    """Seconds of each of ROUNDS steps after two of warming up, their peak of memory in bytes, and the last loss."""
    def synchronize() -> None:
        if not DRY:
            torch.cuda.synchronize()

    for _ in range(1 if DRY else 2):
        step()
    if not DRY:
        torch.cuda.reset_peak_memory_stats()
    seconds, loss = [], 0.0
    for _ in range(ROUNDS):
        synchronize()
        start = time.perf_counter()
        loss = step()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds, 0.0 if DRY else torch.cuda.max_memory_allocated(), loss


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


# ---- the rows ----


ROWS = Rows(gpu_file("training"), ("mode", "workload", "provider", "compiled"))


def peak(device: str) -> float | None:
    return next((tflops for name, tflops in PEAKS.items() if name in device), None)


@pytest.mark.parametrize("compiled", [False] if DRY else [False, True], ids=lambda c: "compiled" if c else "eager")
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_training(shape: str, name: str, compiled: bool):
    shapes, images, at_a_time = SHAPES[shape]
    stage = STAGES[name]
    device = gpu_name()
    peers = {"one question a sample": False} | ({"one question a sample, crops at once": True} if stage.distill else {})
    if all(ROWS.has(mode=name, shape=shape, compiled=compiled, provider=who) for who in ("granvit", *peers)):
        pytest.skip("measured at this commit")
    config = config_of(shapes)
    writer = Writer(config)
    common = {
        "operator": "training", "mode": name, "shape": shape, "shapes": [shapes.encoder, shapes.llm],
        "compiled": compiled, "device_tflops": peak(device), **provenance(device),
    }  # fmt: skip

    def run_ours(number: int) -> tuple:
        model = model_of(shapes)
        return Sizes.of(model), *timed(ours(model, stage, samples(number), writer, compiled))

    images, (sizes, seconds, memory, loss) = halving(images, run_ours)
    chosen = samples(images)
    asked = [questions_of(sample, stage.tasks) for sample in chosen]
    pictures = pictures_of(chosen, asked, writer, bool(stage.distill))
    counts = count(pictures, DISTILL.crop_grid)
    useful = operations(sizes, counts, stage.train).total
    common["workload"] = (
        f"{images} images of up to {shapes.max_image_tokens} patches, {counts.questions} questions, "
        f"{counts.regions} regions, {counts.tokens} tokens"
    )

    def row(provider: str, seconds: list[float], memory: float, loss: float, useful: int, **more) -> dict:
        median = float(np.median(seconds))
        return {
            **common, "provider": provider, "median": median, "seconds": seconds, "loss": loss,
            "regions_per_second": counts.regions / median, "tokens_per_second": counts.tokens / median,
            "tflops": useful / median / 1e12, "peak_memory_bytes": memory,
            **({"mfu": useful / median / 1e12 / peak(device)} if peak(device) else {}), **more,
        }  # fmt: skip

    mine = row("granvit", seconds, memory, loss, useful)
    ROWS.save(mine)
    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()
    alone = one_question_each(pictures)
    pairs = [(sample, question) for sample, found in zip(chosen, asked, strict=True) for question in found]
    order = random.Random(1).sample(range(len(pairs)), len(pairs))
    full = sum(
        operations(sizes, padded([alone[i] for i in order[start : start + at_a_time]], DISTILL.crop_grid),
                   stage.train).total
        for start in range(0, len(order), at_a_time)
    )  # fmt: skip
    once = operations(sizes, count(alone, DISTILL.crop_grid), stage.train).total
    ratios = {"ratio_operations": once / useful, "ratio_padded": full / useful}
    for peer, crops_at_once in peers.items():

        def run_theirs(number: int, crops_at_once: bool = crops_at_once) -> tuple:
            model = model_of(shapes)
            batches = [
                prepare([pairs[i] for i in order[start : start + number]], model, writer, DISTILL.crop_grid,
                        torch.float32).to(DEVICE)
                for start in range(0, len(order), number)
            ]  # fmt: skip
            return timed(theirs(model, stage, batches, compiled, crops_at_once))

        samples_at_a_time, measured = halving(at_a_time, run_theirs)
        other = row(peer, *measured, once, at_a_time=samples_at_a_time, **ratios)
        other["ratio"] = other["median"] / mine["median"]
        ROWS.save(other)
        print(json.dumps(other))
        # From the same weights, on the same questions and after as many steps, both have to be in one place.
        tolerance = 1e-4 if DRY else 0.02
        assert abs(other["loss"] - mine["loss"]) <= tolerance * abs(mine["loss"]), (other["loss"], mine["loss"])
    print(json.dumps(mine))
