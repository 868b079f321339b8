"""The tables of `granvit plan`: what a run costs, as far as can be said before it.

What is measured is measured on a dataset's own text and sizes; what is assumed is called so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from granvit.cost.config import ASSUMED, SAMPLE_ROWS, PlanConfig
from granvit.cost.flops import PARTS, Counts, Sizes, operations
from granvit.cost.ranks import Rank, rank_of
from granvit.cost.reading import Reading, assumed_reading, measured_reading, processor_for, seen
from granvit.cost.recipes import Recipes, compare, gpu_hours, per_image, repeated
from granvit.cost.shapes import ALSO, config_of, on_meta
from granvit.data.loader import GranDataset
from granvit.data.mixture import open_split
from granvit.data.sample import cached_sample
from granvit.model import GranViTConfig
from granvit.model.linear_cross_entropy import CHUNK
from granvit.train.stages import Stage

RESULTS = Path(__file__).parents[2] / "bench" / "results"


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
    stages = [stage for stage in plan.run.stages if stage is not plan.run.sft]
    if not stages:
        raise ValueError("nothing to plan: align.steps, pretrain.steps and adapt.steps are 0")
    config = config_of(plan.run.model)
    data = dataset(plan, console)
    note = ""
    if data is not None:
        processor, note = processor_for(plan, config, data)
    sizes = Sizes.of(on_meta(config, plan.run.model.lora))
    readings, recipes = {}, {}
    for stage in stages:
        if data is None:
            reading = assumed_reading(plan, config, stage)
        else:
            reading = measured_reading(plan, stage, data, processor)
        if plan.run.data.path is None:  # of the sample set a part was looked at
            reading = replace(reading, images=reading.images * plan.run.data.images / SAMPLE_ROWS)
        readings[stage.name] = reading
        recipes[stage.name] = compare(reading.rows, plan.samples, plan.run.data.capacity)
    with console.status("taking a step of each stage without memory"):
        ranks = {stage.name: rank_of(plan, config, stage, readings[stage.name]) for stage in stages}
    for line in _summary(plan, sizes, stages, readings, recipes, ranks, note):
        console.print(line)
    console.print(_seen_table(plan, stages, readings))
    console.print(_model_table(plan, sizes))
    console.print(_recipes_table(plan, sizes, stages, recipes))
    console.print(_memory_table(ranks))
    for table in _cost_tables(plan, config, sizes, stages, readings):
        console.print(table)
    rows = [
        (stage.name, what, f"{100 * share:.1f} %", meaning)
        for stage in stages
        for what, share, meaning in repeated(sizes, config, stage, recipes[stage.name].ours)
    ]
    console.print(_table("What is left", ("stage", "computed again or for nothing", "share", "without it"), rows))


def dataset(plan: PlanConfig, console: Console) -> GranDataset | None:
    """The dataset that lengths come from: data.path, the sample set where it is None, none where it is empty."""
    if plan.run.data.path == "":
        return None
    paths = plan.run.data.paths
    if plan.run.data.path is None:
        with console.status("building pictures of the sample set (once)"):
            paths = (str(cached_sample(SAMPLE_ROWS, pages=plan.run.data.pages)),)
    return open_split(paths)


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], caption: str | None = None) -> Table:
    table = Table(*columns, title=title, caption=caption, title_justify="left", caption_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _many(number: float) -> str:
    """A large number in a few characters."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:,.0f}"


def _speed(plan: PlanConfig, stage: Stage) -> tuple[float, float, str]:
    """MFU, the device's 10^12 operations a second, and where both are from."""
    measured = measurements(plan, stage)
    if measured is None:
        return plan.mfu, plan.device_tflops, f"{100 * plan.mfu:.0f} % MFU of {plan.device_tflops:g} TFLOP/s, {ASSUMED}"
    source = f"measured on {measured['device']} (bench/results/{measured['file']})"
    return measured["mfu"], measured["device_tflops"], f"{100 * measured['mfu']:.0f} % MFU {source}"


def _summary(
    plan: PlanConfig, sizes: Sizes, stages: Sequence[Stage], readings: dict[str, Reading], recipes: dict[str, Recipes],
    ranks: dict[str, Rank], note: str,
) -> Iterable[str]:
    """The most important first: what the run takes, what it sees, and what that rests on."""
    hours, lines = 0.0, []
    for stage in stages:
        reading, ours = readings[stage.name], recipes[stage.name].ours
        sees = seen(stage, reading, plan.run.data.capacity)
        total = operations(sizes, ours, stage.train).total / ours.images * sees.images
        its = gpu_hours(total, *_speed(plan, stage)[:2])
        hours += its
        lines.append(
            f"{stage.name}: {_few(its)}, {sees.steps:,.0f} steps of {sees.images_a_step:.0f} images, "
            f"{100 * sees.asked_share:.1f} % of regions asked"
        )
    yield f"{_few(hours)} of training, without evaluations"
    yield from lines
    fullest = (f"{name} {_gib(rank.peak.total)} GiB in {rank.peak.when}" for name, rank in ranks.items())
    yield f"peak memory of a rank: {', '.join(fullest)}"
    for source in dict.fromkeys(reading.source for reading in readings.values()):
        yield f"lengths: {source}{note}"
    speeds: dict[str, list[str]] = {}
    for stage in stages:
        speeds.setdefault(_speed(plan, stage)[2], []).append(stage.name)
    for speed, names in speeds.items():
        yield f"speed of {', '.join(names)}: {speed}"


def _few(hours: float) -> str:
    return f"{hours:,.3g} GPU hours" if hours >= 0.01 else "under 0.01 GPU hours"


def _seen_table(plan: PlanConfig, stages: Sequence[Stage], readings: dict[str, Reading]) -> Table:
    capacity = plan.run.data.capacity
    columns = [_seen_column(stage, readings[stage.name], capacity) for stage in stages]
    rows = ([label, *(column[label] for column in columns)] for label in columns[0])
    return _table(f"What will be seen, in sequences of {capacity} tokens", ("", *(s.name for s in stages)), rows)


def _seen_column(stage: Stage, reading: Reading, capacity: int) -> dict[str, str]:
    sees = seen(stage, reading, capacity)
    return {
        "steps": f"{sees.steps:,.0f}",
        "images a step": f"{sees.images_a_step:.1f}",
        "sequences a step": f"{reading.packs * stage.accumulate}",
        "GPUs that share these": " ".join(str(n) for n in range(1, reading.packs + 1) if reading.packs % n == 0),
        "images": _many(sees.images),
        "times that each is seen": f"{sees.times:.3g}",
        "regions asked about": _many(sees.asked),
        "of those of the images": f"{100 * sees.asked_share:.1f} %",
        "tokens": _many(sees.tokens),
        "padding": f"{100 * sees.padding:.1f} %",
        "teacher's crops": _many(sees.crops),
    }


def _model_table(plan: PlanConfig, sizes: Sizes) -> Table:
    model = plan.run.model
    meets = {"encoder": sizes.patch + sizes.encoder, "projector": sizes.projector, "llm": sizes.llm}
    names = {"encoder": model.encoder or "tiny", "llm": model.llm or "tiny", "projector": "with the region prompt"}
    rows = [
        (f"{name} ({names[name]})", f"{number / 1e6:,.2f}", f"{meets[name] / 1e6:,.2f}")
        for name, number in sizes.parameters.items()
    ]
    if sizes.adapters:
        rows.append((f"its adapters (rank {model.lora.rank})", *[f"{sizes.adapters / 1e6:,.2f}"] * 2))
    return _table("The model", ("part", "parameters, M", "met by a token, M"), rows)


def _recipes_table(
    plan: PlanConfig, sizes: Sizes, stages: Sequence[Stage], recipes: dict[str, Recipes]
) -> Table:
    columns = []
    for stage in stages:
        both = recipes[stage.name]
        for packed, useful, full in (
            (True, both.ours, both.ours_padded), (False, both.theirs, both.theirs_padded),
        ):  # fmt: skip
            columns.append(_recipe_column(sizes, stage, both, packed, useful, full))
    title = "Useful operations: images once with their questions packed, or one question a sample"
    caption = f"Padded batches of {plan.samples} samples, packed sequences of {plan.run.data.capacity} tokens."
    names = [f"{stage.name},\n{recipe}" for stage in stages for recipe in ("packed", "one each")]
    rows = ([label, *(column[label] for column in columns)] for label in columns[0])
    return _table(title, ("", *names), rows, caption)


def _recipe_column(
    sizes: Sizes, stage: Stage, both: Recipes, packed: bool, useful: Counts, full: Counts
) -> dict[str, str]:
    spent = operations(sizes, useful, stage.train)
    return {
        "images": f"{both.ours.images:,}",
        "questions": f"{useful.questions:,}",
        "10^9 an image": f"{spent.total / 1e9 / both.ours.images:,.3g}",
        "10^9 a region": f"{spent.total / 1e9 / max(1, useful.regions):,.3g}",
        "padding, encoder": f"{100 * (1 - useful.patches / full.patches):.1f} %",
        "padding, LLM": f"{100 * (1 - useful.tokens / full.tokens):.1f} %",
        "ratio": "1" if packed else f"{both.ratio(sizes, stage.train):.2f}",
        "ratio with padding": "1" if packed else f"{both.ratio(sizes, stage.train, True):.2f}",
    } | {f"share of {part}": f"{100 * spent.share(part):.1f} %" for part in PARTS}


def _memory_table(ranks: dict[str, Rank]) -> Table:
    first = next(iter(ranks.values()))
    rows = {name: [_gib(rank.peak.parts[name]) for rank in ranks.values()] for name in first.peak.parts}
    rows |= {
        "peak": [_gib(rank.peak.total) for rank in ranks.values()],
        "it is in": [rank.peak.when for rank in ranks.values()],
        "sequences at once": [f"{rank.sequences}" for rank in ranks.values()],
        "ranks": [f"{rank.world.ranks}" for rank in ranks.values()],
        "parallel": [rank.sharing.parallel for rank in ranks.values()],
        "host: loader, at most": [_gib(rank.host) for rank in ranks.values()],
    }
    title = "Memory of a rank, GiB, when it is fullest"
    caption = (
        "Counted in a step on meta, which makes activations, gathered weights, copies in half precision and, "
        f"{CHUNK >> 20} MiB at once, logits. CUDA's context and its libraries' workspaces come on top."
    )
    return _table(title, ("", *ranks), ([label, *columns] for label, columns in rows.items()), caption)


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}"


def _cost_tables(
    plan: PlanConfig, config: GranViTConfig, sizes: Sizes, stages: Sequence[Stage], readings: dict[str, Reading]
) -> Iterable[Table]:
    a_picture = plan.regions / plan.images
    height, width = plan.image_size
    names, numbers = [stage.name for stage in stages], sorted({8, 32, plan.ranks or 128})

    def hours(stage: Stage, regions: float, configuration: GranViTConfig) -> tuple[float, ...]:
        both = per_image(plan, configuration, sizes, stage, readings[stage.name], regions, plan.image_size)
        return tuple(gpu_hours(plan.images * per_picture, *_speed(plan, stage)[:2]) for per_picture in both)

    once = [hours(stage, a_picture, config) for stage in stages]
    totals = [per_image(plan, config, sizes, stage, readings[stage.name], a_picture)[0] for stage in stages]
    rows = [
        ("10^18 operations", *(f"{plan.images * total / 1e18:,.3g}" for total in totals)),
        ("GPU hours", *(f"{ours:,.3g}" for ours, _ in once)),
        *((f"hours on {n} GPUs", *(f"{ours / n:,.3g}" for ours, _ in once)) for n in numbers),
        ("one question a sample, GPU hours", *(f"{theirs:,.3g}" for _, theirs in once)),
    ]
    title = f"{plan.images / 1e6:.2f} M images, {plan.regions / 1e6:.2f} M regions, each once, {height}x{width} px"
    caption = "Hours on more GPUs as if they cost nothing; one question a sample at the same speed, without padding."
    yield _table(title, ("", *names), rows, caption)

    def grown(title: str, label: str, cases: Iterable[tuple[str, float, GranViTConfig]]) -> Table:
        columns = (label, *(f"{name},\nGPU hours" for name in names), *(f"{name},\nratio" for name in names))
        rows = []
        for shown, regions, configuration in cases:
            pairs = [hours(stage, regions, configuration) for stage in stages]
            rows.append((shown, *(f"{a:,.3g}" for a, _ in pairs), *(f"{b / a:.2f}" for a, b in pairs)))
        return _table(title, columns, rows)

    sizes_of_images = []
    for budget in sorted({64, 256, 576, 1024, 2304, 4096, config.max_image_tokens}):
        larger = deepcopy(config)
        larger.max_image_tokens = budget
        sizes_of_images.append((str(budget), a_picture, larger))
    yield grown(f"By image size, at {a_picture:.2f} regions an image", "patches an image", sizes_of_images)
    regions = [(f"{number:.3g}", number, config) for number in sorted({1.0, 3.0, a_picture, 12.0, 24.0})]
    yield grown(f"By regions, at {config.max_image_tokens} patches an image", "regions an image", regions)
