"""What the small presets perceive, and what each change bought: attributes that captions of scenes name right.

    python bench/perception.py [CHANGE ...]

Trains warm-up and both stages of each change (all of CHANGES) on one thread, without control or report, and measures
after each stage on the same test scenes, 150 at most. Every change is one back from the preset smoke, or quick, as it
is. One seed is a lead, no proof: --seed gives more rows.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from rows import Rows, provenance, results_folder

from granvit.data.loader import GranDataset, open_dataset
from granvit.data.sample import cached_sample
from granvit.eval import evaluate
from granvit.eval.metrics import is_attribute
from granvit.machine import device_name
from granvit.train.__main__ import parse
from granvit.train.guard import Termination
from granvit.train.run import Run
from granvit.train.stages import Stage
from granvit.world import World

SCENES = 150
ADAMW = (
    "--warmup.optimizer adamw --pretrain.optimizer adamw --pretrain.learning-rate 1e-3 --adapt.optimizer adamw "
    "--adapt.learning-rate 1e-3"
)
SIXTEEN = "--model.patch-size 16 --model.max-image-tokens 36 --model.pixel-shuffle 1"
CHANGES = {
    "smoke": "smoke",
    "smoke, 36 patches of 16 pixels": f"smoke {SIXTEEN}",
    "smoke, AdamW": f"smoke {ADAMW}",
    "smoke, both": f"smoke {SIXTEEN} {ADAMW}",
    "smoke, stage 2 by AdamW": "smoke --adapt.optimizer adamw --adapt.learning-rate 1e-3",
    "quick": "quick",
    "quick, no cell positions": "quick --model.no-cell-positions",
    "quick, AdamW": f"quick {ADAMW}",
}
"""{name: arguments of `python -m granvit.train`}."""


def scenes(path: str) -> GranDataset:
    """The test split's scenes, of all of whose combinations there are some in train."""
    rows = open_dataset(path)["test"]
    return GranDataset(rows.select([i for i, source in enumerate(rows["source"][:]) if source == "scenes"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("changes", nargs="*", metavar="CHANGE", help=f"of {', '.join(CHANGES)}; none: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := set(options.changes) - set(CHANGES):
        parser.error(f"there is no {sorted(unknown)[0]}; changes are {', '.join(CHANGES)}")
    rows = Rows(results_folder() / "perception.json", ("change", "seed", "stage"))
    for change in options.changes or CHANGES:
        config = parse([*CHANGES[change].split(), "--threads", "1", "--seed", str(options.seed)])
        path = str(cached_sample(config.data.images, pages=config.data.pages))
        stages = {name: replace(getattr(config, name), eval_every=0) for name in ("warmup", "pretrain", "adapt")}
        config = replace(config, data=replace(config.data, path=path, workers=0), **stages)
        with tempfile.TemporaryDirectory() as folder:
            run = Run(config, Path(folder), World(), torch.device("cpu"), Termination())
            for stage in (config.warmup, *config.stages):
                run.phase(stage)
                if stage is not config.warmup:
                    rows.save(row(run, stage, change))


def row(run: Run, stage: Stage, change: str) -> dict:
    """What the run's model tells after the stage."""
    asked = scenes(run.config.data.path)
    metrics = evaluate(run.model, run.processor, asked, limit=SCENES).metrics
    own = {name: round(value, 3) for name, value in metrics.items() if name.startswith(("bbox2", "caption2"))}
    steps = [line["seconds"] for line in run.metrics.lines() if line["stage"] == stage.name]
    made = {"change": change, "flags": CHANGES[change], "seed": run.config.seed, "stage": stage.name}
    made["scenes"] = min(SCENES, len(asked))
    made |= own | {"steps": len(steps), "seconds_a_step": round(median(steps), 3)}
    print(change, stage.name, {name.partition("_")[2]: value for name, value in own.items() if is_attribute(name)})
    return {**made, **provenance(device_name())}


if __name__ == "__main__":
    main()
