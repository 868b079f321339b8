"""python -m granvit.train plan [quick|smoke|compact|paper] [--config FILE] [--data.path DIR]: a run's costs.

Operations of both recipes, ours (an image once, its questions packed behind it) and one question a sample in padded
batches; their padding; where the operations go; memory of a rank; GPU hours of a data set of Gran-29M's size, and how
they grow. Nothing is trained or downloaded. What is measured is measured on a dataset's own text and sizes; what is
assumed is called so.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from granvit.cost.flops import (
    PARTS,
    Asked,
    Counts,
    Picture,
    Sizes,
    count,
    one_question_each,
    operations,
    packed,
    padded,
    pictures_of,
)
from granvit.cost.shapes import ALSO, config_of, on_meta
from granvit.data.lengths import lengths_of
from granvit.data.loader import GranDataset, spread
from granvit.data.planning import FULL, Lane, Order
from granvit.data.sample import cached_sample
from granvit.eval.loading import find_model
from granvit.model import GranViTConfig, GranViTProcessor
from granvit.model.config import cached_fit_grid
from granvit.model.llm import SMOLLM2, TOY, load_llm
from granvit.questions.prompts import BBOX2CAPTION, GLOBAL_CAPTION
from granvit.toy.tiny import train_tokenizer
from granvit.train.build import training_text
from granvit.train.presets import PRESETS, TrainConfig, load_config
from granvit.train.stages import Stage

RESULTS = Path(__file__).parents[2] / "bench" / "results"
SAMPLE_ROWS = 600
ASSUMED = "assumed, not measured"


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
    ranks: int = 128
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
        for name in ("images", "regions", "device_tflops", "ranks", "rows", "samples"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it is above 0")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu}; it is a share above 0, at most 1")


# ---- lengths ----


@dataclass(frozen=True)
class Question:
    """Mean tokens of a question (prompt and answer) and of its answer."""

    tokens: float
    answers: float


@dataclass
class Lengths:
    """What one stage reads. rows: images with their questions as they are packed, empty where nothing was measured."""

    source: str
    region: Question
    caption: Question
    rows: list[list[Picture]] = field(default_factory=list)


def assumed_lengths(plan: PlanConfig, stage: Stage) -> Lengths:
    region = Question(plan.prompt_tokens + plan.answer_tokens, plan.answer_tokens)
    caption = Question(plan.prompt_tokens + plan.caption_tokens, plan.caption_tokens)
    return Lengths(ASSUMED, region, caption)


def measured_lengths(plan: PlanConfig, stage: Stage, data: GranDataset, processor: GranViTProcessor) -> Lengths:
    """The packs of one pass over `plan.rows` rows of a dataset, planned as the trainer plans them."""
    rows = spread(len(data), plan.rows)
    samples = [sample for sample in map(data.annotations, rows) if sample is not None]
    tasks = sorted(stage.tasks)
    lengths = lengths_of(samples, processor, tasks)
    wanted, capacity = plan.run.data.questions_per_image, plan.run.data.capacity
    order = Order(np.ones(len(samples), dtype=np.int64), 1, plan.run.seed, lengths.image)
    packs = list(Lane(lengths, order, 0, stage.weights, capacity, wanted, 512, epochs=1))
    if not packs:
        raise ValueError(f"{data.path}: no image with a question of {tasks} fits {capacity} tokens (data.capacity)")
    flat = [(samples[row], numbers) for pack in packs for row, numbers in pack]
    asked = []
    for sample, numbers in flat:
        written = processor.questions(sample, tasks)
        asked.append([written[number] for number in numbers])
    sequences = iter(range(len(flat)))
    sequences = [[next(sequences) for _ in pack] for pack in packs]
    pictures = pictures_of([sample for sample, _ in flat], asked, processor, crops=False)
    if stage.distill > 0:
        chosen = Counter(i for i, _ in plan.run.crops.choose([sample for sample, _ in flat], asked, sequences))
        pictures = [replace(picture, crops=chosen[i]) for i, picture in enumerate(pictures)]
    placed = [[pictures[i] for i in sequence] for sequence in sequences]
    every = [question for row in placed for picture in row for question in picture.asked]
    return Lengths(
        f"{len(samples)} rows of {data.path}",
        _mean([question for question in every if question.region]),
        _mean([question for question in every if not question.region]),
        placed,
    )


def _mean(asked: Sequence[Asked]) -> Question:
    number = max(1, len(asked))
    return Question(sum(a.tokens for a in asked) / number, sum(a.answers for a in asked) / number)


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
    return GranViTProcessor.from_config(known, tokenizer), note


# ---- recipes ----


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


def compare(rows: Sequence[Sequence[Picture]], crop_grid: tuple[int, int], samples: int, capacity: int = 0) -> Recipes:
    """Both recipes on images packed in `rows`, which are filled up to `capacity` where that is more than the longest;
    the other recipe's samples are shuffled into padded batches of `samples`."""
    pictures = [picture for row in rows for picture in row]
    separate = one_question_each(pictures)
    random.Random(0).shuffle(separate)
    batches = (separate[start : start + samples] for start in range(0, len(separate), samples))
    theirs_padded = sum((padded(batch, crop_grid) for batch in batches), Counts())
    ours = count(pictures, crop_grid)
    filled = packed(rows, crop_grid)
    room = len(rows) * capacity
    if room > filled.tokens:
        filled = replace(filled, tokens=room, pairs=ours.pairs + room - ours.tokens)
    return Recipes(ours, filled, count(separate, crop_grid), theirs_padded)


def typical(
    plan: PlanConfig, config: GranViTConfig, stage: Stage, lengths: Lengths, regions: int, image_size: tuple[int, int]
) -> Picture:
    """An image of that size with its regions' questions, and its global caption's where that is asked for."""
    patch, merge = config.vision_config.patch_size, config.pixel_shuffle
    grid = cached_fit_grid(*image_size, patch, config.max_image_tokens)
    tokens = -(-grid[0] // merge) * -(-grid[1] // merge)
    with_tokens = config.box_style != "text" and BBOX2CAPTION in stage.tasks
    prompts = config.region_tokens if with_tokens else 0
    # A box covers about a tenth of its image (bench/workloads.py): it only tells the region prompt's attention.
    region = Asked(round(lengths.region.tokens), round(lengths.region.answers), prompts, grid[0] * grid[1] // 10)
    caption = Asked(round(lengths.caption.tokens), round(lengths.caption.answers), region=False)
    asked = [region] * regions + [caption] * (GLOBAL_CAPTION in stage.tasks and stage.global_captions > 0)
    return Picture(grid[0] * grid[1], 1 + tokens, tuple(asked), regions if stage.distill else 0)


def per_image(
    plan: PlanConfig, config: GranViTConfig, sizes: Sizes, stage: Stage, lengths: Lengths, regions: float,
    image_size: tuple[int, int] | None = None,
) -> tuple[float, float]:
    """Useful operations of an image with `regions` regions, ours and of one question a sample; between whole numbers of
    regions it goes in a straight line."""
    low = int(regions)
    totals = []
    for number in (low, low + 1):
        picture = typical(plan, config, stage, lengths, number, image_size or plan.image_size)
        crop_grid = plan.run.distill.crop_grid
        totals.append(
            [
                operations(sizes, count(pictures, crop_grid), stage.train).total
                for pictures in ([picture], one_question_each([picture]))
            ]
        )
    return tuple(a + (b - a) * (regions - low) for a, b in zip(*totals, strict=True))


def gpu_hours(total: float, mfu: float, device_tflops: float) -> float:
    """Of one device, for so many operations."""
    return total / (mfu * device_tflops * 1e12) / 3600


# ---- memory ----


def memory(sizes: Sizes, stage: Stage, ranks: int = 1, precision: str = "float32") -> dict[str, float]:
    """Bytes a rank holds between steps, weights and state in float32 as the trainer keeps them, but for an LLM's under
    adapters, which it keeps in the run's `precision`. `ranks`: 1 for DDP, where each holds all, else FSDP's, where each
    holds its part. Activations come on top."""
    learns = sizes.parameters | ({"llm": sizes.adapters} if sizes.adapters else {})
    under = sizes.parameters["llm"] if sizes.adapters else 0
    trained = sum(learns[name] for name in stage.train)
    teacher = sizes.parameters["encoder"] if stage.distill else 0
    weights = 4 * sum(learns.values()) + (2 if precision == "bfloat16" else 4) * under
    parts = {"weights": weights, "gradients": 4 * trained, "Adam": 8 * trained, "teacher": 4 * teacher}
    return {name: number / ranks for name, number in parts.items()}


def activation_bytes(config: GranViTConfig, stage: Stage, tokens: int, patches: int) -> tuple[float, float]:
    """What a backward needs of so many tokens and patches, in bfloat16: everything, or the layers' inputs alone
    (activation checkpointing). An estimate of 34 bytes a channel and layer (Korthikanti et al. 2022, arXiv 2205.05198,
    with attention that keeps no square), of gated layers more."""
    vision, text = config.vision_config, config.text_config
    gradients = "encoder" in stage.train or "projector" in stage.train
    llm = tokens * text.num_hidden_layers if gradients or "llm" in stage.train else 0
    encoder = patches * vision.num_hidden_layers if "encoder" in stage.train else 0
    gated = 18 * text.hidden_size + 8 * text.intermediate_size
    every = llm * gated + encoder * (18 * vision.hidden_size + 4 * vision.intermediate_size)
    return every, 2 * (llm * text.hidden_size + encoder * vision.hidden_size)


# ---- what else is computed for nothing or twice ----


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


# ---- tables ----


def measurements(plan: PlanConfig, stage: Stage, results: Path = RESULTS) -> dict[str, Any] | None:
    """The last measured training step of a GPU with this plan's shapes (bench/test_gpu_training.py), or None."""
    newest = None
    for path in sorted(results.glob("*-training.json")):
        for row in json.loads(path.read_text()):
            shapes = (plan.run.model.encoder, plan.run.model.llm)
            if row.get("provider") == "granvit" and row["mode"] == stage.name and "mfu" in row:
                if tuple(row["shapes"]) == shapes or row["shapes"] == [_known(name) for name in shapes]:
                    newest = {**row, "file": path.name}
    return newest


def _known(name: str | None) -> str | None:
    return ALSO.get(name, name)


def report(plan: PlanConfig, console: Console) -> None:
    """Print all tables. Raises ValueError for shapes that are not known and data that is none."""
    stages = [stage for stage in (plan.run.pretrain, plan.run.adapt) if stage.steps]
    if not stages:
        raise ValueError("nothing to plan: pretrain.steps and adapt.steps are 0")
    config = config_of(plan.run.model)
    data = dataset(plan, console)
    if data is not None:
        processor, note = processor_for(plan, config, data)
    sizes = Sizes.of(on_meta(config, plan.run.model.lora))
    lengths = {}
    for stage in stages:
        if data is None:
            lengths[stage.name] = assumed_lengths(plan, stage)
        else:
            lengths[stage.name] = measured_lengths(plan, stage, data, processor)
            lengths[stage.name].source += note
    console.print(_model_table(plan, sizes))
    recipes = {stage.name: _recipes(plan, config, stage, lengths[stage.name]) for stage in stages}
    console.print(_recipes_table(plan, sizes, stages, recipes, lengths))
    console.print(_shares_table(sizes, stages, recipes))
    console.print(_memory_table(plan, config, sizes, stages))
    for table in _cost_tables(plan, config, sizes, stages, lengths):
        console.print(table)
    table = Table("stage", "computed again or for nothing", "of the operations", "without it", title="What is left")
    for stage in stages:
        for what, share, meaning in repeated(sizes, config, stage, recipes[stage.name].ours):
            table.add_row(stage.name, what, f"{100 * share:.1f} %", meaning)
    console.print(table)


def dataset(plan: PlanConfig, console: Console) -> GranDataset | None:
    """The dataset that lengths come from: data.path, the sample set where it is None, none where it is empty."""
    path = plan.run.data.path
    if path == "":
        return None
    if path is None:
        with console.status("building pictures of the sample set (once)"):
            path = str(cached_sample(SAMPLE_ROWS, pages=plan.run.data.pages))
    return GranDataset(path)


def _recipes(plan: PlanConfig, config: GranViTConfig, stage: Stage, lengths: Lengths) -> Recipes:
    crop_grid, capacity = plan.run.distill.crop_grid, plan.run.data.capacity
    if lengths.rows:
        return compare(lengths.rows, crop_grid, plan.samples, capacity)
    picture = typical(plan, config, stage, lengths, round(plan.regions / plan.images), plan.image_size)
    images = 64  # enough for full batches of the other recipe
    return compare([[picture] * images], crop_grid, plan.samples, round(images * picture.length / FULL))


def _model_table(plan: PlanConfig, sizes: Sizes) -> Table:
    table = Table("part", "parameters, M", "weights that a token meets, M", title="The model")
    model = plan.run.model
    meets = {"encoder": sizes.patch + sizes.encoder, "projector": sizes.projector, "llm": sizes.llm}
    names = {"encoder": model.encoder or "tiny", "llm": model.llm or "tiny", "projector": "with the region prompt"}
    for name, number in sizes.parameters.items():
        table.add_row(Text(f"{name} ({names[name]})"), f"{number / 1e6:,.2f}", f"{meets[name] / 1e6:,.2f}")
    if sizes.adapters:
        table.add_row(f"its adapters (rank {model.lora.rank})", *[f"{sizes.adapters / 1e6:,.2f}"] * 2)
    return table


def _recipes_table(
    plan: PlanConfig, sizes: Sizes, stages: Sequence[Stage], recipes: dict[str, Recipes], lengths: dict[str, Lengths]
) -> Table:
    sources = " | ".join(dict.fromkeys(stage_lengths.source for stage_lengths in lengths.values()))
    table = Table(
        "stage", "recipe", "images", "questions", "10^9 an image", "10^9 a region", "padding, encoder", "padding, LLM",
        "ratio", "ratio with padding",
        title="Useful operations of the two recipes", caption=f"lengths: {sources}; padded batches of {plan.samples} "
        f"samples, packed sequences of {plan.run.data.capacity} tokens",
    )  # fmt: skip
    for stage in stages:
        both = recipes[stage.name]
        for name, useful, full in (
            ("packed", both.ours, both.ours_padded),
            ("one question a sample", both.theirs, both.theirs_padded),
        ):
            total = operations(sizes, useful, stage.train).total / 1e9
            ours = name == "packed"
            padding = (f"{100 * (1 - a / b):.1f} %" for a, b in
                       ((useful.patches, full.patches), (useful.tokens, full.tokens)))  # fmt: skip
            table.add_row(
                stage.name if ours else "", name, f"{both.ours.images:,}", f"{useful.questions:,}",
                f"{total / both.ours.images:,.3g}", f"{total / max(1, useful.regions):,.3g}",
                *padding,
                "1" if ours else f"{both.ratio(sizes, stage.train):.2f}",
                "1" if ours else f"{both.ratio(sizes, stage.train, True):.2f}",
            )  # fmt: skip
    return table


def _shares_table(sizes: Sizes, stages: Sequence[Stage], recipes: dict[str, Recipes]) -> Table:
    table = Table("stage", "recipe", *PARTS, title="Where the operations go")
    for stage in stages:
        for name in ("ours", "theirs"):
            spent = operations(sizes, getattr(recipes[stage.name], name), stage.train)
            label = "packed" if name == "ours" else "one question a sample"
            table.add_row(stage.name, label, *(f"{100 * spent.share(part):.1f} %" for part in PARTS))
    return table


def _memory_table(plan: PlanConfig, config: GranViTConfig, sizes: Sizes, stages: Sequence[Stage]) -> Table:
    columns = ("weights", "gradients", "Adam", "teacher")
    capacity = plan.run.data.capacity
    table = Table(
        "stage", "on each rank", *columns, "sum", f"activations of {capacity} tokens", "checkpointed",
        title="Memory of a rank, GiB (estimated: float32 state, bfloat16 activations)",
    )  # fmt: skip
    for stage in stages:
        activations = activation_bytes(config, stage, capacity, capacity * config.pixel_shuffle**2)
        for label, ranks in (("ddp: everything", 1), (f"fsdp: 1 of {plan.ranks}", plan.ranks)):
            parts = memory(sizes, stage, ranks, plan.run.precision)
            table.add_row(
                stage.name, label, *(f"{parts[name] / 2**30:.3g}" for name in columns),
                f"{sum(parts.values()) / 2**30:.3g}", *(f"{number / 2**30:.3g}" for number in activations),
            )  # fmt: skip
    return table


def _cost_tables(
    plan: PlanConfig, config: GranViTConfig, sizes: Sizes, stages: Sequence[Stage], lengths: dict[str, Lengths]
) -> Iterable[Table]:
    a_picture = plan.regions / plan.images
    speeds, notes = {}, []
    for stage in stages:
        measured = measurements(plan, stage)
        if measured:
            speeds[stage.name] = measured["mfu"], measured["device_tflops"]
            notes.append(f"{stage.name}: {100 * measured['mfu']:.0f} % MFU measured on {measured['device']} "
                         f"(bench/results/{measured['file']})")  # fmt: skip
        else:
            speeds[stage.name] = plan.mfu, plan.device_tflops
            notes.append(f"{stage.name}: {100 * plan.mfu:.0f} % MFU of {plan.device_tflops:g} TFLOP/s, {ASSUMED}")
    height, width = plan.image_size

    def hours(stage: Stage, regions: float, size: tuple[int, int], configuration: GranViTConfig) -> tuple[float, ...]:
        both = per_image(plan, configuration, sizes, stage, lengths[stage.name], regions, size)
        return tuple(gpu_hours(plan.images * per_picture, *speeds[stage.name]) for per_picture in both)

    ranks = sorted({8, 32, plan.ranks})
    table = Table(
        "stage", "10^18 operations", "GPU hours", *(f"hours on {n}" for n in ranks), "one question a sample, GPU hours",
        title=f"One epoch of {plan.images / 1e6:.2f} M images, {plan.regions / 1e6:.2f} M regions, {height}x{width} px",
        caption="; ".join(notes) + "; hours on more ranks as if they cost nothing. One question a sample at the same "
        "MFU and without padding.",
    )  # fmt: skip
    for stage in stages:
        ours, theirs = hours(stage, a_picture, plan.image_size, config)
        total = plan.images * per_image(plan, config, sizes, stage, lengths[stage.name], a_picture)[0] / 1e18
        each = (f"{ours / n:,.3g}" for n in ranks)
        table.add_row(stage.name, f"{total:,.3g}", f"{ours:,.3g}", *each, f"{theirs:,.3g}")
    yield table
    budgets = sorted({64, 256, 576, 1024, 2304, 4096, config.max_image_tokens})
    table = Table(
        "patches an image", *(f"{stage.name}, GPU hours" for stage in stages), *(f"{s.name}, ratio" for s in stages),
        title=f"By image size, at {a_picture:.2f} regions an image",
    )  # fmt: skip
    for budget in budgets:
        larger = deepcopy(config)
        larger.max_image_tokens = budget
        pairs = [hours(stage, a_picture, plan.image_size, larger) for stage in stages]
        table.add_row(str(budget), *(f"{a:,.3g}" for a, _ in pairs), *(f"{b / a:.2f}" for a, b in pairs))
    yield table
    table = Table(
        "regions an image", *(f"{stage.name}, GPU hours" for stage in stages), *(f"{s.name}, ratio" for s in stages),
        title=f"By regions, at {config.max_image_tokens} patches an image, {plan.images / 1e6:.2f} M images",
    )  # fmt: skip
    for number in sorted({1.0, 3.0, a_picture, 12.0, 24.0}):
        pairs = [hours(stage, number, plan.image_size, config) for stage in stages]
        table.add_row(f"{number:.3g}", *(f"{a:,.3g}" for a, _ in pairs), *(f"{b / a:.2f}" for a, b in pairs))
    yield table


# ---- the command ----


def parse(arguments: Sequence[str]) -> PlanConfig:
    """The plan that a command line asks for. Exits with a usage text for what it cannot read."""
    words = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    preset = words.pop(0) if words and not words[0].startswith("-") else "quick"
    if preset not in PRESETS:
        raise SystemExit(f"granvit.train plan: there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    default = PRESETS[preset]
    if "--config" in words:
        at = words.index("--config")
        if at + 1 == len(words):
            raise SystemExit("granvit.train plan: --config takes the path of a run's config.yaml")
        default = load_config(Path(words[at + 1]))
        words = words[:at] + words[at + 2 :]
    return tyro.cli(
        PlanConfig, args=words, default=PlanConfig(default), prog=f"python -m granvit.train plan {preset}",
        description=__doc__,
    )  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    report(parse(arguments), Console(markup=False, emoji=False))
