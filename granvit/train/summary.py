"""report/summary.json: what a run measured, with everything that a reader needs to believe it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from granvit.data.loader import GranDataset, spread
from granvit.data.mixture import shares
from granvit.eval import floors
from granvit.eval.evaluation import readable
from granvit.metrics_log import read_json, write_aside
from granvit.train.presets import TrainConfig
from granvit.world import World


def known_floors(
    folder: Path, splits: dict[str, GranDataset], limit: int, world: World
) -> dict[str, dict[str, float]]:
    """{floor: metrics} of the test images that a run is evaluated on, measured once and kept in folder/floors.json.
    Nothing where there is no test split. All ranks call it."""
    path = folder / "floors.json"
    known = world.first(lambda: read_json(path) if path.exists() else None)
    if known is not None:
        return known
    rows = readable(splits["test"], spread(len(splits["test"]), limit), world) if "test" in splits else []

    def measure() -> dict[str, dict[str, float]]:
        measured = floors(splits["train"], splits["test"], rows=rows) if "test" in splits else {}
        write_aside(path, json.dumps(measured, indent=1))
        return measured

    return world.first(measure)


def keep_example(folder: Path, test: GranDataset) -> dict[str, Any] | None:
    """The first test picture with a region, as folder/report/example.png, and the region's box: something to ask the
    model about. A region that is no text is preferred. None where there is none."""
    for kinds in (("natural",), ("ocr",)):
        for row in range(len(test)):
            sample = test.annotations(row)
            region = next((region for region in sample.regions if region.kind in kinds), None) if sample else None
            if region is not None and (sample := test[row]) is not None:
                path = folder / "report" / "example.png"
                Image.fromarray(sample.image.numpy()).save(path)
                return {"image": str(path.relative_to(folder)), "box": list(region.box)}
    return None


def write_summary(
    folder: Path,
    config: TrainConfig,
    splits: dict[str, GranDataset],
    floors_of_test: dict[str, dict[str, float]],
    results: list[dict],
    seconds: float,
) -> Path:
    """Write folder/report/summary.json from the results of one or several seeds, and return its path. splits: what the
    run read (`splits.open_splits`); floors_of_test: `known_floors`."""
    path = folder / "report" / "summary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    summary = {
        "preset": config.preset,
        **{name: results[0][name] for name in ("commit", "device", "versions")},
        "seconds": seconds,
        "peak_memory_mb": max(result["peak_memory_mb"] for result in results),
        "data": {
            "path": config.data.path,
            **{name: len(split) for name, split in splits.items()},
            **_mixture(splits, config.data.weights),
            "evaluated": config.data.eval_images,
        },
        "config": asdict(config),
        "floors": floors_of_test,
        "example": keep_example(folder, splits["test"]) if "test" in splits else None,
        "runs": results,
        "mean": mean([{key: run[key] for key in ("stages", "features")} for run in results]),
    }
    path.write_text(json.dumps(summary, indent=1))
    return path


def _mixture(splits: dict[str, GranDataset], weights: Sequence[float] | None) -> dict[str, dict[str, float]]:
    """{"shares": {dataset: the share of images that are drawn from it}}; nothing where none are mixed."""
    train = splits.get("train")
    if train is None or len(train.parts) == 1:
        return {}
    return {"shares": dict(zip(train.names, shares(train.sizes, weights), strict=True))}


def mean(trees: list[Any]) -> Any:
    """The trees' mean, leaf by leaf, over the leaves that each of them has."""
    if isinstance(trees[0], dict):
        shared = [key for key in trees[0] if all(key in tree for tree in trees)]
        return {key: mean([tree[key] for tree in trees]) for key in shared}
    return fmean(trees)
