"""Whether a long run grows: memory and open files of 10,000 steps of stage 1, with its teacher, a reading process and a
checkpoint every 500 steps, on a model so small that this takes minutes.

    python bench/soak.py [STEPS]          writes bench/results/soak.json; with STEPS it is printed alone
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from granvit.data.sample import build_sample
from granvit.machine import commit, device_name
from granvit.train.guard import Termination
from granvit.train.presets import PRESETS, Data, Model, TrainConfig
from granvit.train.run import Run
from granvit.world import World

RESULTS = Path(__file__).parent / "results" / "soak.json"
STEPS = 10_000
SAMPLES = 100


def tiny(data: Path, output: Path, steps: int) -> TrainConfig:
    smoke = PRESETS["smoke"]
    return replace(
        smoke,
        output=str(output),
        data=Data(path=str(data), capacity=96, workers=1),
        model=Model(
            encoder_width=32, encoder_layers=1, encoder_heads=2, llm_width=32, llm_layers=1, llm_heads=2,
            vocabulary=400, max_image_tokens=9, bins=8,
        ),
        pretrain=replace(smoke.pretrain, steps=steps, packs=1, eval_every=0),
        checkpoint_every=max(1, steps // 20),
        control=False,
        threads=1,
        device="cpu",
    )  # fmt: skip


def soak(folder: Path, steps: int) -> dict[str, Any]:
    """Train that many steps in `folder`, and look at the process and its reader at a hundred of them."""
    build_sample(folder / "data", images=60, seed=0, workers=1)
    config = tiny(folder / "data", folder / "run", steps)
    run = Run(config, folder / "run", World(), torch.device("cpu"), Termination())
    seen: list[tuple[int, float, float, int]] = []

    def look(line: dict[str, Any]) -> None:
        if line["step"] % (steps // SAMPLES) == 0:
            reader = children()
            memory = (resident(os.getpid()), sum(map(resident, reader)))
            seen.append((line["step"], *memory, sum(map(open_files, [os.getpid(), *reader]))))

    run.metrics.listeners.append(look)
    began = time.perf_counter()
    run.phase(config.pretrain)
    seconds = time.perf_counter() - began
    at, ours, readers, files = (np.array(column, float) for column in zip(*seen, strict=True))
    assert len(at) == SAMPLES
    return {
        "steps": steps,
        "seconds": round(seconds, 1),
        "checkpoints": steps // config.checkpoint_every,
        "memory_mb": growth(at, ours),
        "reader_memory_mb": growth(at, readers),
        "open_files": growth(at, files),
        "losses": [line["loss"] for line in list(run.metrics.lines())[:: steps - 1]],
    }


def growth(at: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """The second half's slope, and what it is to be compared with."""
    half = slice(len(at) // 2, None)
    slope = np.polyfit(at[half], values[half], 1)[0]
    return {
        "first": round(values[0], 2),
        "middle": round(values[half][0], 2),
        "last": round(values[-1], 2),
        "second_half_range": round(float(np.ptp(values[half])), 2),
        "second_half_slope_per_1000_steps": round(slope * 1000, 4),
    }


def resident(process: int) -> float:
    """MB of memory in use. A reader's include what it shares with its parent."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def children() -> list[int]:
    own = os.getpid()
    return [int(child) for child in Path(f"/proc/{own}/task/{own}/children").read_text().split()]


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    if steps <= 0 or steps % SAMPLES:
        raise SystemExit(f"STEPS is {steps}; accepted are multiples of {SAMPLES}")
    with tempfile.TemporaryDirectory() as folder:
        measured = soak(Path(folder), steps)
    measured = {"commit": commit(), "device": device_name(), "torch": torch.__version__} | measured
    print(json.dumps(measured, indent=1))
    if steps == STEPS:
        RESULTS.write_text(json.dumps(measured, indent=1) + "\n")
