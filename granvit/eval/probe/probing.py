"""The probe: several frozen encoders on the regions of one data set, side by side."""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from granvit.data.loader import GranDataset
from granvit.eval.intervals import bootstrap
from granvit.eval.metrics import Score
from granvit.eval.probe import measures
from granvit.eval.probe.encoders import GRIDS, Pixels, check_names, load
from granvit.eval.probe.features import fit, read_features
from granvit.eval.probe.labels import Labels, Regions, classes, numbers, read_regions
from granvit.machine import commit, device_name

QUERIES, SHOWN = 4, 5
"""Regions whose nearest are in the result, and how many of these."""

SHOWN_GRID = "7x7"


@dataclass(frozen=True)
class Target:
    """What regions are told apart by. classes: {label: training regions}, the most frequent first. train and test:
    int64 [R], the class of each of the split's regions, -1 where it has none."""

    name: str
    classes: dict[str, int]
    train: np.ndarray
    test: np.ndarray


def probe(
    encoders: Sequence[str],
    train: GranDataset,
    test: GranDataset,
    limit: int | None = None,
    min_regions: int = 20,
    max_patches: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Linear probe, nearest neighbours and retrieval of the encoders' features of regions, and of plain pixels.

    encoders: see encoders.load. limit: images of each split, at most. min_regions: training regions that a label needs
    to be a class. max_patches: of an image, the same for all encoders; None: each its own.

    Returns what --json writes: counts, classes, chance, rows of metrics (fractions) by encoder, grid and target, and
    the nearest of some regions. Raises ValueError for encoders that are not there, two of one name, and where fewer
    than two classes are left.
    """
    check_names(encoders)
    frozen = [load(spec, device, max_patches) for spec in encoders]
    splits = {"train": read_regions(train, limit), "test": read_regions(test, limit)}
    labels = Labels.of(splits["train"])
    told = {name: labels.targets(regions) for name, regions in splits.items()}
    _targets(told, min_regions, train)  # an error before the work

    # The floor comes first: what it can't read, no encoder is asked about.
    unreadable = {}
    datasets = {"train": train, "test": test}
    floor = Pixels()
    reductions = fit(floor, train, splits["train"])
    for name, regions in splits.items():
        _, read = read_features(floor, datasets[name], regions, reductions)
        unreadable[name] = int((~read).sum())
        splits[name] = regions.where(read)
    told = {name: labels.targets(regions) for name, regions in splits.items()}
    targets = _targets(told, min_regions, train)
    for name in splits:
        known = np.any([getattr(target, name) >= 0 for target in targets], axis=0)
        splits[name] = splits[name].where(known)
        targets = [_where(target, name, known) for target in targets]

    queries = _queries(splits["test"])
    result: dict[str, Any] = {
        "data": train.path, "split": test.split, "limit": limit, "min_regions": min_regions,
        "device": device_name(device), "commit": commit(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "counts": {
            name: {
                "images": len(np.unique(regions.rows)), "regions": len(regions), "text_left_out": regions.ocr,
                "unreadable_left_out": unreadable[name],
            }
            for name, regions in splits.items()
        },
        "targets": {
            t.name: {"classes": t.classes, "train": int((t.train >= 0).sum()), "test": int((t.test >= 0).sum())}
            for t in targets
        },
        "chance": {target.name: chance(target, splits["test"]) for target in targets},
        "encoders": [],
        "rows": [],
        "nearest": {
            "grid": SHOWN_GRID, "queries": [_shown(place, targets, splits["test"]) for place in queries],
            "by_encoder": {},
        },
    }  # fmt: skip
    for encoder in (floor, *frozen):
        reductions = fit(encoder, train, splits["train"])
        x = {name: read_features(encoder, datasets[name], splits[name], reductions)[0] for name in splits}
        kept = {name: round(reduction.kept, 4) for name, reduction in reductions.items()}
        result["encoders"].append({"name": encoder.name, **encoder.about(), "variance_kept": kept})
        for target in targets:
            for grid in GRIDS:
                measured = measure(x["train"][grid].to(device), x["test"][grid].to(device), target, splits)
                result["rows"].append({"encoder": encoder.name, "grid": grid, "target": target.name, **measured})
        shown = nearest(x["test"][SHOWN_GRID], queries, targets, splits["test"])
        result["nearest"]["by_encoder"][encoder.name] = shown
    return result


def _targets(told: dict[str, dict[str, list[str | None]]], min_regions: int, train: GranDataset) -> list[Target]:
    """The targets with two classes or more that test regions have too. ValueError where there are none."""
    targets = []
    for name, own in told["train"].items():
        known = classes(own, min_regions)
        test = numbers(told["test"].get(name, []), known)
        if len(known) >= 2 and (test >= 0).any():
            targets.append(Target(name, known, numbers(own, known), test))
    if not targets:
        most = [
            f"{name}: " + ", ".join(f"{label} {n}" for label, n in list(classes(own, 1).items())[:3])
            for name, own in told["train"].items()
        ]
        raise ValueError(
            f"too few classes in {train.path}: a target needs two labels of at least {min_regions} training regions "
            f"(--min-regions) that test regions have too; the most frequent are {'; '.join(most) or 'none'}"
        )
    return targets


def _where(target: Target, split: str, kept: np.ndarray) -> Target:
    parts = {"train": target.train, "test": target.test}
    parts[split] = parts[split][kept]
    return Target(target.name, target.classes, **parts)


def measure(train: Tensor, test: Tensor, target: Target, splits: dict[str, Regions]) -> dict[str, Any]:
    """Metrics of a target by features [R, d] of the training and the test regions, also by source (prefix SOURCE/), the
    95 % intervals of those over all, and the linear probe's penalty.

    linear_top1, knn_top1 and, of more than five classes, _top5: shares of test regions. retrieval_r1, _r5, _map: see
    measures.retrieval; among the test regions that have a class.
    """
    known, asked = target.train >= 0, target.test >= 0
    x, y = train[torch.from_numpy(known)], torch.from_numpy(target.train[known]).to(train.device)
    queries, truth = test[torch.from_numpy(asked)], torch.from_numpy(target.test[asked]).to(test.device)
    images = splits["test"].rows[asked]
    number = len(target.classes)
    weights, penalty = measures.linear_probe(x, y, splits["train"].rows[known], number)
    scored = {
        "linear": measures.scores(weights, queries), "knn": measures.knn_scores(queries, x, y, number)
    }  # fmt: skip
    values = {
        f"{name}_top{k}": measures.is_among(by_class, truth, k).astype(float)
        for name, by_class in scored.items()
        for k in (1, 5)
        if k < number
    }
    retrieved = measures.retrieval(queries, truth, images)
    values |= {f"retrieval_{name}": value for name, value in retrieved.items()}
    sources = np.array([splits["test"].sources[i] for i in np.flatnonzero(asked)])
    metrics, intervals = {}, {}
    for name, value in values.items():
        defined = ~np.isnan(value)
        if defined.any():
            metrics[name] = float(value[defined].mean())
            scores = map(Score, images[defined].tolist(), value[defined].tolist())
            intervals[name] = bootstrap(list(scores))
        for source in np.unique(sources):
            if (own := defined & (sources == source)).any():
                metrics[f"{source}/{name}"] = float(value[own].mean())
    return {"penalty": penalty, "metrics": metrics, "intervals": intervals}


def chance(target: Target, test: Regions) -> dict[str, float]:
    """Metrics without a look: the most frequent training class, the five most frequent, and regions in random order."""
    asked = target.test >= 0
    truth = target.test[asked]
    number = len(target.classes)
    top = {f"{name}_top{k}": float((truth < k).mean()) for name in ("linear", "knn") for k in (1, 5) if k < number}
    by_lot = measures.random_retrieval(truth, test.rows[asked])
    return top | {f"retrieval_{name}": value for name, value in by_lot.items()}


def _queries(test: Regions) -> np.ndarray:
    """Places of QUERIES test regions of different images, drawn by lot (seeded)."""
    places = list(range(len(test)))
    random.Random(0).shuffle(places)
    by_image: dict[int, int] = {}
    for place in places:
        by_image.setdefault(int(test.rows[place]), place)
    return np.array(list(by_image.values())[:QUERIES])


def nearest(x: Tensor, queries: np.ndarray, targets: list[Target], test: Regions) -> list[list[dict[str, Any]]]:
    """For each query the SHOWN regions of other images that are nearest by features x [R, d]."""
    order = measures.neighbours(queries, x, test.rows)
    others = (test.rows[None] != test.rows[queries][:, None]).sum(1)
    return [
        [_shown(place, targets, test) for place in row[: min(SHOWN, n)].tolist()]
        for row, n in zip(order, others.tolist(), strict=True)
    ]


def _shown(place: int, targets: list[Target], test: Regions) -> dict[str, Any]:
    """A test region as the result names it: its image's row, its box and its labels."""
    labels = {t.name: list(t.classes)[t.test[place]] for t in targets if t.test[place] >= 0}
    return {"row": int(test.rows[place]), "box": test.boxes[place].tolist(), "labels": labels}
