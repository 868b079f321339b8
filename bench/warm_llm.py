"""Makes the tiny LLM of granvit/toy/llm, which the preset quick starts with: "llm-toy" to `--llm`.

    python bench/warm_llm.py [--steps 1000]

A Llama-type LM from scratch is warmed up on text alone (granvit/toy/warmup.py: captions and boxes of the sample set's
training pictures, no pixel) and written with its tokenizer. What its projectors and location tokens learn is left
behind. made.json says from what and how.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from statistics import fmean

import torch

from granvit.data.sample import cached_sample
from granvit.machine import commit, device_name
from granvit.model.llm import TOY_FOLDER
from granvit.toy.tiny import train_tokenizer
from granvit.train.build import training_text
from granvit.train.guard import Termination
from granvit.train.presets import PRESETS
from granvit.train.run import Run
from granvit.world import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    smoke = PRESETS["smoke"]
    path = str(cached_sample(smoke.data.images, pages=smoke.data.pages))
    config = dataclasses.replace(
        smoke,
        warmup=dataclasses.replace(smoke.warmup, steps=options.steps, eval_every=0),
        model=dataclasses.replace(smoke.model, llm=None),
        data=dataclasses.replace(smoke.data, path=path, workers=0),
        threads=options.threads,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, Path(folder), World(), torch.device("cpu"), Termination())
        run.phase(config.warmup)
        lines = list(run.metrics.lines())
    made = {
        "command": f"python bench/warm_llm.py --steps {options.steps}", "commit": commit(), "device": device_name(),
        "warmup": dataclasses.asdict(config.warmup), "model": dataclasses.asdict(config.model),
        "data": {"images": config.data.images, "pages": config.data.pages},
        "loss": fmean(line["loss"] for line in lines[-100:] if "loss" in line),
        "seconds": sum(line["seconds"] for line in lines),
    }  # fmt: skip
    run.model.llm.half().save_pretrained(TOY_FOLDER)
    train_tokenizer(training_text(run.splits["train"]), config.model.vocabulary).save_pretrained(TOY_FOLDER)
    (TOY_FOLDER / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    print(f"{TOY_FOLDER}: loss {made['loss']:.3f} over the last 100 of {options.steps} steps")


if __name__ == "__main__":
    main()
