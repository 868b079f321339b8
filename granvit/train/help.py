"""What `granvit train --help` prints: the flags that most runs need. --help-all has every one."""

from __future__ import annotations

from functools import reduce

from rich.console import Console
from rich.table import Table
from rich.text import Text

from granvit.train.presets import PRESETS, TrainConfig

COMMON = {
    "output": "the run's folder; the same command again goes on with it",
    "config FILE": "a run's config.yaml in place of a preset; flags change it",
    "data.path": "a Gran dataset, or several that are mixed; none: the sample set",
    "data.weights": "shares of the images drawn from each of several datasets",
    "data.capacity": "tokens of a packed sequence, of an image and its questions",
    "data.eval-images": "test images that each evaluation uses",
    "encoder": "a run, a folder or a hub name; none: a tiny one with random weights",
    "llm": "the same, or llm-toy, which comes with granvit; none: a tiny one",
    "model": "a run or an export whose whole model goes on learning",
    "llm.lora": "rank of the LLM's adapters; 0: all of its weights learn",
    "model.max-image-tokens": "patches of an image, at most",
    "pretrain.steps": "of stage 1 (boxes to captions); 0: without it",
    "pretrain.epochs": "in place of steps: passes over the data",
    "pretrain.packs": "sequences a step, over all ranks",
    "pretrain.images": "in place of packs: images a step",
    "pretrain.learning-rate": "of the encoder, and of the projector",
    "adapt.steps": "of stage 2 (captions to boxes); it has all of stage 1's flags",
    "precision": "float32 or bfloat16",
    "parallel": "auto, ddp, fsdp or hsdp, under torchrun",
    "seed": "of weights and of the order of the data",
    "seeds": "runs with so many seeds; the report shows their mean",
    "trackers": "metrics go there too: tensorboard, wandb, mlflow, module:function",
}
"""{flag: what it says}. The field of TrainConfig is the flag's, or as SHORT says."""

SHORT = {"encoder": "model.encoder", "llm": "model.llm", "model": "model.whole", "llm.lora": "model.lora.rank"}


def print_help(preset: str, config: TrainConfig, usage: str) -> None:
    """preset: the first word of the command. config: whose defaults are shown."""
    console = Console(markup=False, highlight=False, emoji=False)
    console.print(f"usage: granvit train [{' | '.join(PRESETS)} | adapt | sft | plan | rehearse | replay] [flags]\n")
    console.print(usage + "\n")
    console.print(f"Flags that most runs need, and what {preset} says; --help-all lists all of them.\n")
    table = Table.grid(padding=(0, 2))
    for flag, text in COMMON.items():
        path = SHORT.get(flag, flag).replace("-", "_")
        value = None if flag.startswith("config ") else reduce(getattr, path.split("."), config)
        shown = "" if value in (None, ()) else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        table.add_row(Text(f"--{flag}"), Text(f"{text} ({shown})" if shown else text))
    console.print(table)
