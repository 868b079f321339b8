"""report/summary.json: what a run measured, with everything that a reader needs to believe it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from granvit.data.loader import GranDataset
from granvit.eval import floors
from granvit.train.presets import TrainConfig


def write_summary(
    folder: Path, config: TrainConfig, splits: dict[str, GranDataset], results: list[dict], seconds: float
) -> Path:
    """Write folder/report/summary.json from the results of one or several seeds, and return its path. splits: what the
    run read (`run.open_splits`)."""
    train, test = splits.get("train"), splits.get("test")
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
            "evaluated": config.data.eval_images,
        },
        "config": asdict(config),
        "floors": floors(train, test, limit=config.data.eval_images) if test else {},
        "runs": results,
        "mean": mean([{key: run[key] for key in ("stages", "features")} for run in results]),
    }
    path.write_text(json.dumps(summary, indent=1))
    return path


def mean(trees: list[Any]) -> Any:
    """The trees' mean, leaf by leaf, over the leaves that each of them has."""
    if isinstance(trees[0], dict):
        shared = [key for key in trees[0] if all(key in tree for tree in trees)]
        return {key: mean([tree[key] for tree in trees]) for key in shared}
    return fmean(trees)
