"""python bench/gpu_train.py: trains a model of the compact preset's shape through both stages, and evaluates it.

On the generated sample set, within --seconds (230 by default): a first run of a few steps tells what a step and the
evaluations take, the second has as many steps as fit. The LLM is as wide and deep as SmolLM2-135M and made from
scratch, with the text-only warm-up that this wants, so nothing is downloaded. Rows go to DEVICE-run.json: one for each
evaluation, for each phase's speed and for each floor. A dry run (GRANVIT_BENCH_DEVICE=cpu) does the same at tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rows import Rows, gpu_file, gpu_name, provenance

NEEDED = ("datasets", "tyro", "pydantic", "yaml", "rouge_score", "jiwer")
DRY = os.environ.get("GRANVIT_BENCH_DEVICE") == "cpu"
PHASES = {"warmup": 0.25, "pretrain": 0.45, "adapt": 0.3}
"""What each phase gets of the time for training."""
TRIAL = 2 if DRY else 8
"""Steps of each phase in the first run; the second half of them is timed."""
FEW, MANY = (2, 4) if DRY else (16, 64)
"""Test images of an evaluation, in the first run and at most in the second."""
EVALUATING = 0.4
"""Of the time, at most."""
FIGURES = ("bbox2caption_rouge_l", "bbox2caption_cider", "caption2bbox_acc50", "caption2bbox_miou")
"""Of an evaluation, for the table."""


def configuration(folder: Path, steps: dict[str, int], eval_images: int):
    from granvit.train.presets import PRESETS, Data, Model

    compact, smoke = PRESETS["compact"], PRESETS["smoke"]
    data = Data(images=4000, capacity=1024, eval_images=eval_images, workers=min(8, os.cpu_count() or 1))
    model = Model(
        encoder_width=compact.model.encoder_width, encoder_layers=compact.model.encoder_layers,
        encoder_heads=compact.model.encoder_heads, max_image_tokens=compact.model.max_image_tokens,
        llm_width=576, llm_layers=30, llm_heads=9, vocabulary=2048,
    )  # fmt: skip
    rates = {"warmup": 6e-4, "pretrain": 6e-4, "adapt": 3e-4}  # a deep LLM from scratch bears less than a tiny one
    packs = {"warmup": 16, "pretrain": compact.pretrain.packs, "adapt": compact.adapt.packs}
    if DRY:
        data = Data(images=40, capacity=256, eval_images=eval_images, workers=1)
        model = Model(encoder_width=32, encoder_layers=2, llm_width=32, llm_layers=2, vocabulary=400)
        packs = dict.fromkeys(packs, 2)
    stages = {
        name: replace(
            getattr(smoke, name), steps=steps[name], packs=packs[name], learning_rate=rates[name],
            warmup_steps=max(steps[name] // 20, 1), eval_every=0,
        )
        for name in PHASES
    }  # fmt: skip
    return replace(
        compact, output=str(folder), data=data, model=model, control=False, checkpoint_every=10**6,
        precision="float32" if DRY else "bfloat16", device="cpu" if DRY else "cuda", **stages,
    )  # fmt: skip


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def step_seconds(folder: Path) -> dict[str, float]:
    """{phase: the median step} of what was trained in a folder, without the first half."""
    seconds: dict[str, list[float]] = {}
    for line in lines(folder):
        if "evaluation" not in line:
            seconds.setdefault(line["stage"], []).append(line["seconds"])
    return {name: float(np.median(taken[len(taken) // 2 :])) for name, taken in seconds.items()}


def rows_of(folder: Path, steps: dict[str, int]) -> list[dict[str, Any]]:
    """What a run left, however far it came."""
    medians = step_seconds(folder)
    rows = [
        {"stage": name, "when": "training", "steps": steps[name], "median_step_seconds": seconds}
        for name, seconds in medians.items()
    ]
    for line in lines(folder):
        if "evaluation" in line:
            rows.append({"stage": line["stage"], "when": line["evaluation"], **{
                name: value for name, value in line.items() if name not in ("stage", "evaluation")
            }})  # fmt: skip
    summary = folder / "report" / "summary.json"
    floors = json.loads(summary.read_text())["floors"] if summary.exists() else {}
    return rows + [{"stage": "floor", "when": name, **figures} for name, figures in floors.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60 if DRY else 230)
    seconds = parser.parse_args().seconds
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"training lacks {', '.join(missing)}: `make gpu-wheels` where there is a network, then again")
    from granvit.train.run import train

    began, work = time.perf_counter(), Path(tempfile.mkdtemp(prefix="granvit-run-"))
    rows, about = Rows(gpu_file("run"), ("stage", "when")), provenance(gpu_name())
    train(configuration(work / "trial", dict.fromkeys(PHASES, TRIAL), FEW))
    each = step_seconds(work / "trial")
    spent = time.perf_counter() - began
    an_image = sum(line["seconds"] for line in lines(work / "trial") if "evaluation" in line) / FEW
    images = max(FEW, min(MANY, int(EVALUATING * seconds / an_image)))
    left = max(seconds - spent - an_image * images, 0)
    steps = {name: max(int(left * share / each[name]), 2 * TRIAL) for name, share in PHASES.items()}
    print(f"a trial of {spent:.0f} s; {images} test images, steps {steps}", flush=True)
    try:
        train(configuration(work / "run", steps, images))
    finally:
        for row in rows_of(work / "run", steps):
            rows.save({**row, **about})
            told = [f"{name} {row[name]:.3f}" for name in FIGURES if name in row]
            if row["when"] == "training":
                told = [f"{row['steps']} steps of {1e3 * row['median_step_seconds']:.0f} ms"]
            print(f"= {row['stage']} {row['when']}: {', '.join(told)}")


if __name__ == "__main__":
    main()
