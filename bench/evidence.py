"""What each part of the method buys, repeated over seeds: the rows behind docs/evidence.md.

    python bench/evidence.py [PART ...] [--size small|compact] [--seeds N] [--jobs 2] [--folder runs/evidence]

PART: ablation, scaling, boxes, quality; none: all. A variant is a run of the size's preset with some flags changed.
Its row goes to bench/results/evidence.json as soon as it is there, and what the file has is not trained again. Runs
that have a beginning in common (the warm-up, stage 1) share it. What is cut off goes on from its newest checkpoint in
the folder. Ablation and boxes have three seeds, the others one, unless --seeds says otherwise.

Size small: the model and data of the preset smoke, two thirds of its steps before stage 2 and a third more in it, each
run on one thread, for a CPU: some six hours of two cores. Size compact: that preset on a GPU (--jobs 1), for days.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import multiprocessing
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import torch
from evidence_variants import PARTS, SEEDS, SIZES, Size, Variant, flags_of
from rich.progress import track
from rows import Rows, provenance, results_folder

from granvit.audit.cycle import check_regions
from granvit.audit.planting import plant
from granvit.data.loader import GranDataset
from granvit.data.writer import write_dataset
from granvit.eval.baselines import floors
from granvit.eval.evaluation import evaluate
from granvit.eval.metrics import is_attribute
from granvit.eval.probe.probing import probe
from granvit.machine import default_device, device_name
from granvit.questions.prompts import BBOX2CAPTION
from granvit.questions.schema import KINDS, Sample
from granvit.train.__main__ import parse
from granvit.train.checkpoint import load
from granvit.train.console import RunConsole, hush
from granvit.train.distill import feature_moments, feature_statistics
from granvit.train.guard import Termination
from granvit.train.loop import model_tensors
from granvit.train.presets import TrainConfig
from granvit.train.run import Run
from granvit.train.splits import with_data
from granvit.train.stages import Stage
from granvit.world import World

METRICS = (
    "bbox2caption_rouge_l", "natural_bbox2caption_rouge_l", "bbox2caption_exact", "natural_bbox2caption_exact",
    "scenes/bbox2caption_exact", "scenes-heldout/bbox2caption_exact", "scenes-heldout/bbox2caption_kind",
    "scenes-heldout/bbox2caption_pattern", "ocr_cer", "ocr_exact",
    "caption2bbox_acc50", "caption2bbox_acc75", "caption2bbox_acc90", "caption2bbox_miou",
    "natural_caption2bbox_acc50", "natural_caption2bbox_acc75", "natural_caption2bbox_acc90",
    "natural_caption2bbox_miou", "natural_caption2bbox_unparsed",
)  # fmt: skip
"""Of `granvit.eval.metrics` those that a row has, besides attributes."""


# ---- what is trained on ----


def part_of(path: str, part: int, folder: Path, first: int = 0) -> str:
    """The dataset with every `part`th row of its training split from the row `first` on, written once."""
    if part == 1:
        return path
    place = folder / f"part-{part}-{first}"
    with locked(place):
        if not place.exists():
            rows = encoded(path)
            write_dataset(place, {"train": (rows["train"][i] for i in range(first, len(rows["train"]), part)),
                                  "test": rows["test"]})  # fmt: skip
    return str(place)


def with_wrong(path: str, share: float, seed: int, place: Path) -> tuple[str, set[tuple[str, int]]]:
    """The dataset with a share of its training captions swapped for those of other images, written once; and which:
    (row's id, place among its regions)."""
    train = GranDataset(path)
    samples = [sample for sample in map(train.annotations, range(len(train))) if sample is not None]
    planted, wrong = plant(samples, "other_image", share, seed)
    captions = {sample.id: [region.caption for region in sample.regions] for sample in planted}

    def rows() -> Iterator[dict[str, Any]]:
        for row in encoded(path)["train"]:
            regions = zip(row["regions"], captions[row["id"]], strict=True)
            yield row | {"regions": [region | {"caption": caption} for region, caption in regions]}

    if not place.exists():
        write_dataset(place, {"train": rows(), "test": encoded(path)["test"]})
    return str(place), {(samples[row].id, region) for row, region in wrong}


def audited(run: Run, path: str, wrong: set[tuple[str, int]], place: Path) -> tuple[str, dict[str, dict[str, int]]]:
    """The dataset without the training regions whose captions fit other boxes better, as the run's model thinks;
    and by kind of region how many of the wrong ones that were."""
    train = GranDataset(path)
    samples: list[Sample] = [s for s in map(train.__getitem__, range(len(train))) if s is not None]
    checked = [c for group in check_regions(run.model.eval(), run.processor, samples) for c in group]
    doubted = {(samples[check.row].id, check.place) for check in checked if check.score < 0}

    def rows() -> Iterator[dict[str, Any]]:
        for row in encoded(path)["train"]:
            regions = [region for i, region in enumerate(row["regions"]) if (row["id"], i) not in doubted]
            if regions or row["caption"]:
                yield row | {"regions": regions}

    if not place.exists():
        write_dataset(place, {"train": rows(), "test": encoded(path)["test"]})
    counts = {}
    for kind in KINDS:
        of = {(s.id, i) for s in samples for i, region in enumerate(s.regions) if region.kind == kind}
        counts[kind] = {
            "checked": sum(samples[c.row].regions[c.place].kind == kind for c in checked),
            "left_out": len(of & doubted), "wrong": len(of & wrong), "wrong_left_out": len(of & doubted & wrong),
        }  # fmt: skip
    return str(place), counts


def encoded(path: str) -> datasets.DatasetDict:
    """The dataset's rows, images as the bytes that they come with."""
    return datasets.load_from_disk(path).cast_column("image", datasets.Image(decode=False))


# ---- training ----


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Inside, this process is the only one that makes what `place` is called; others wait."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(place.name + ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def opened(config: TrainConfig, place: Path) -> Run:
    """A run that shows nothing of what it does."""
    device = torch.device(default_device() if config.device == "auto" else config.device)
    return Run(config, place, World(), device, Termination(), RunConsole(config, leads=False))


def reached(config: TrainConfig, phases: tuple[Stage, ...], folder: Path, warm: TrainConfig | None = None) -> Run:
    """A run of which the phases are done. Runs that have the same ones share them: each phase has a folder whose name
    is made of all that it depends on. warm: what the warm-up, the first phase, is configured by, if by another."""
    before = None
    if phases[1:]:
        before = reached(config if phases[2:] else warm or config, phases[:-1], folder, warm)
    decides = {name: asdict(config)[name] for name in ("seed", "data", "model", "precision")}
    decides |= {"distill": asdict(config.distill)} if any(phase.distill for phase in phases) else {}
    decides |= {"warm": asdict(warm)["data"]} if warm and warm.data != config.data else {}
    known = json.dumps([decides, [asdict(phase) for phase in phases]], sort_keys=True)
    place = folder / f"{phases[-1].name}-{hashlib.sha256(known.encode()).hexdigest()[:16]}"
    with locked(place):
        run = opened(config, place)
        if before is not None:
            load(before.checkpoints.final(phases[-2].name), model_tensors(run.model))
        run.phase(phases[-1])
    return run


def seconds_now(device: torch.device) -> float:
    """CPU time, which other processes do not lengthen; on a GPU the time when it has done its work."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def paces(configs: tuple[TrainConfig, TrainConfig], stage: str, folder: Path) -> list[float]:
    """Seconds of a step of each configuration's stage, its batch's making too: medians, taken by turns."""
    phases = []
    for number, config in enumerate(configs):
        run = opened(config, folder / f"pace-{config.seed}-{number}")
        phase = run.new_phase(getattr(config, stage), run.model)
        phases.append((phase, phase.batches()))
    seconds: list[list[float]] = [[], []]
    for _ in range(22):
        for (phase, batches), taken in zip(phases, seconds, strict=True):
            began = seconds_now(phase.device)
            phase.take(next(batches))
            taken.append(seconds_now(phase.device) - began)
    return [median(taken[2:]) for taken in seconds]


def config_of(size: Size, variant: Variant, seed: int, folder: Path, first: int = 0) -> TrainConfig:
    """The configuration of a variant but for its data's faults. first: as in `part_of`."""
    config = parse([*f"{size.flags} {flags_of(size, variant)} --seed {seed}".split()])
    stages = {name: replace(getattr(config, name), eval_every=0) for name in ("warmup", "pretrain", "adapt")}
    stages["adapt"] = replace(stages["adapt"], steps=stages["adapt"].steps * variant.longer)
    if variant.all_steps:
        more = parse(size.flags.split()).pretrain.steps
        stages["adapt"] = replace(stages["adapt"], steps=stages["adapt"].steps + more)
    config = with_data(replace(config, control=False, trackers=(), **stages))
    path = part_of(config.data.path, size.part if variant.wrong else variant.part, folder, first)
    return replace(config, data=replace(config.data, path=path, workers=0 if config.threads == 1 else 8))


def faulty(
    size: Size, variant: Variant, seed: int, folder: Path, first: int = 0
) -> tuple[TrainConfig, str, set[tuple[str, int]]]:
    """The configuration with its data's faults, the data's path, and which of its regions are wrong."""
    config = config_of(size, variant, seed, folder, first)
    place = folder / f"wrong-{variant.wrong}-{seed}-{first}"
    with locked(place):
        path, wrong = with_wrong(config.data.path, variant.wrong, seed, place)
    return replace(config, data=replace(config.data, path=path)), path, wrong


def warm_of(config: TrainConfig) -> tuple[Stage, ...]:
    """The warm-up, where there is one."""
    return (config.warmup,) if config.warmup.runs else ()


def measured(size_name: str, part: str, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """The row of a variant."""
    hush()
    size, variant = SIZES[size_name], PARTS[part][name]
    config, warm = config_of(size, variant, seed, folder), None
    row: dict[str, Any] = {
        "size": size_name,
        "part": part,
        "variant": name,
        "seed": seed,
        "flags": flags_of(size, variant),
    }
    if variant.wrong:
        config, path, wrong = faulty(size, variant, seed, folder)
        if variant.audited_by:
            other = config if variant.audited_by == "itself" else faulty(size, variant, seed, folder, first=1)[0]
            place = folder / f"audited-{variant.wrong}-{seed}-by-{variant.audited_by}"
            path, row["audit"] = audited(reached(other, (*warm_of(other), *other.stages), folder), path, wrong, place)
            config = replace(config, data=replace(config.data, path=path))
    if variant.equal_time:
        whole = warm = config_of(size, Variant(), seed, folder)
        for stage in ("pretrain", "adapt"):
            mine, theirs = paces((config, whole), stage, folder)
            row[f"{stage}_pace"] = mine / theirs
            steps = round(getattr(whole, stage).steps * theirs / mine)
            config = replace(config, **{stage: replace(getattr(config, stage), steps=steps)})
    row["regions"] = regions_of(GranDataset(config.data.path))
    phases = warm_of(config)
    for stage in config.stages:
        phases = (*phases, stage)
        run = reached(config, phases, folder, warm)
        row[stage.name] = of_stage(run, stage, size)
        if stage is config.stages[-1]:
            test = run.splits["test"]
            row["photographs"] = kept(evaluate(run.model, run.processor, test, rows=photographs_of(test)).metrics)
        if stage.name == "adapt" and run.model.config.parallel_boxes:
            row["boxes_a_second"] = boxes_a_second(run)
        if stage is config.stages[0] or "encoder" in stage.train:
            place = folder / f"encoder-{part}-{name.replace('/', ' of ')}-{seed}"
            row["encoder"] = of_encoder(run, size, place, config_of(size, Variant(), seed, folder).data.path)
    return {**row, **provenance(device_name(run.device.type))}


# ---- measuring ----


def of_stage(run: Run, stage: Stage, size: Size) -> dict[str, Any]:
    """What the model says after a stage, and what it was trained on."""
    metrics = evaluate(run.model, run.processor, run.splits["test"], limit=size.asked).metrics
    lines = [line for line in run.metrics.lines() if line["stage"] == stage.name and "loss" in line]
    return {
        "metrics": kept(metrics), "steps": len(lines), "images": sum(line["images"] for line in lines),
        "regions_asked": sum(line["regions"] for line in lines),
        "seconds": round(sum(line["seconds"] for line in lines), 1),
    }  # fmt: skip


def kept(metrics: dict[str, float]) -> dict[str, float]:
    """Those of METRICS, and attributes over all captions."""
    attributes = {name for name in metrics if name.startswith(BBOX2CAPTION) and is_attribute(name)}
    return {name: round(value, 4) for name, value in metrics.items() if name in attributes.union(METRICS)}


def regions_of(split: GranDataset) -> int:
    """How many regions are to be learnt from."""
    return sum(len(sample.regions) for sample in map(split.annotations, range(len(split))) if sample is not None)


def photographs_of(test: GranDataset) -> list[int]:
    """The rows of the only pictures that are not drawn."""
    annotated = [(i, test.annotations(i)) for i in range(len(test))]
    return [i for i, sample in annotated if sample is not None and sample.source == "photographs"]


@torch.no_grad()
def of_encoder(run: Run, size: Size, place: Path, path: str) -> dict[str, Any]:
    """What the frozen encoder's features tell of regions: a linear probe and nearest neighbours, on all images of the
    dataset at `path`, whatever the run was trained on."""
    run.model.save_encoder(place)
    result = probe([f"encoder={place}"], GranDataset(path), run.splits["test"], size.probed)
    told = {
        encoder: {
            f"{row['target']} {way} {row['grid']}": round(row["metrics"][f"{way}_top1"], 4)
            for row in result["rows"]
            if row["encoder"] == encoder
            for way in ("linear", "knn")
        }
        for encoder in ("pixels", "encoder")
    }
    test = run.splits["test"]
    images = [test[i].image.to(run.device) for i in range(min(64, len(test)))]
    spread = feature_statistics(feature_moments(run.model.eval().encode(images)[0]))
    return {"pixels": told["pixels"], "probe": told["encoder"], "counts": result["counts"]} | {
        f"features_{name}": round(float(value), 3) for name, value in spread.items()
    }


@torch.no_grad()
def boxes_a_second(run: Run, number: int = 64, rounds: int = 7) -> dict[str, float]:
    """How many boxes a model finds in a second that can tell them in one step and token by token, taken by turns:
    medians. The images are encoded before."""
    model, processor, test = run.model.eval(), run.processor, run.splits["test"]
    rows = list(islice((s for s in map(test.__getitem__, range(len(test))) if s is not None and s.regions), number))
    asked = [processor.ask_where(sample.regions[0].caption) for sample in rows]
    features = model.encode([sample.image for sample in rows])
    inputs = processor(questions=asked, image_sizes=[sample.image.shape[:2] for sample in rows]).to(model.device)
    ways = {
        "one step": lambda: model.generate_boxes(**inputs, features=features),
        "token by token": lambda: model.generate(**inputs, features=features, max_new_tokens=4),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = seconds_now(run.device)
            way()
            seconds[name].append(seconds_now(run.device) - began)
    return {name: round(len(rows) / median(taken), 1) for name, taken in seconds.items()}


def of_data(size_name: str, folder: Path) -> dict[str, Any]:
    """What guesses reach without the image, and how many regions there are."""
    config = config_of(SIZES[size_name], Variant(), 0, folder)
    splits = {name: GranDataset(config.data.path, name) for name in ("train", "test")}
    counted = {name: regions_of(split) for name, split in splits.items()}
    photographs = photographs_of(splits["test"])
    guessed = {
        "floors": floors(**splits, limit=SIZES[size_name].asked),
        "floors_photographs": floors(**splits, rows=photographs),
    }
    row = {"size": size_name, "part": "data", "variant": "floors", "seed": 0, "images": len(splits["train"])}
    row |= {"regions": counted, "photographs": len(photographs)}
    return {
        **row,
        **{name: {guess: kept(metrics) for guess, metrics in of.items()} for name, of in guessed.items()},
        **provenance("counted"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument("--size", choices=SIZES, default="small")
    default = ", ".join(f"{number} of {part}" for part, number in SEEDS.items())
    parser.add_argument("--seeds", type=int, help=f"of each part ({default})")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"), help="checkpoints, and data made")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {sorted(unknown)[0]}; parts are {', '.join(PARTS)}")
    rows = Rows(results_folder() / "evidence.json", ("size", "part", "variant", "seed"))
    folder = options.folder / options.size
    if not rows_of(rows, options.size, "data", "floors", 0):
        rows.save(of_data(options.size, folder))
    seeds = {part: options.seeds or SEEDS[part] for part in options.parts or PARTS}
    todo = [
        (options.size, part, name, seed)
        for seed in range(max(seeds.values()))  # one seed of everything first
        for part, number in seeds.items()
        if seed < number
        for name in PARTS[part]
        if not rows_of(rows, options.size, part, name, seed)
    ]
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(measured, *what, folder): what for what in todo}
        for job in track(as_completed(jobs), "runs", total=len(jobs)):
            print(time.strftime("%H:%M"), *jobs[job], "failed" if job.exception() else "done", flush=True)
            if error := job.exception():  # the others go on
                traceback.print_exception(error)
            else:
                rows.save(job.result())
    raise SystemExit(any(job.exception() for job in jobs))


def rows_of(rows: Rows, *key: Any) -> list[dict[str, Any]]:
    return [row for row in rows.kept() if rows.of(row) == key]


if __name__ == "__main__":
    main()
