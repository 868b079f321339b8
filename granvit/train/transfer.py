"""The commands adapt (stage 2 with another LLM, on the encoder of a run) and sft (conversations, on a whole model).

Here is what their configurations are before any flag, and what they can't do without. Both are runs as any other.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from granvit.lora import Lora
from granvit.train.presets import PHASES, PRESETS, Model, TrainConfig, load_config

SFT_STEPS = 5000
"""Of the command sft, where no run says another number."""


def adapt_config(encoder: str | None) -> TrainConfig:
    """Stage 2 alone, on this encoder, which stays frozen.

    Data, seed and precision are those of the encoder's run, and so are the forms of questions and sizes of images that
    it learnt with. The stage is the run's, too, where its LLM was a pretrained one, as this one is; else, and where
    there is no run, the preset compact's.
    """
    config = _run_config(encoder, "adapt")
    if encoder is None:
        return config
    values = _export(encoder)
    shape = {field.name: values[field.name] for field in fields(Model) if field.name in values}
    if config.model.llm is None:  # it had no template to choose
        shape["chat_template"] = Model.chat_template
    model = replace(config.model, whole=None, encoder=encoder, llm=None, lora=Lora(), **shape)
    return replace(config, model=model)


def sft_config(model: str | None) -> TrainConfig:
    """The stage sft alone, on this model: data (conversations come by data.chat), seed and precision are its run's."""
    config = _run_config(model, "sft")
    sft = config.sft if config.sft.runs else replace(config.sft, steps=SFT_STEPS)
    return replace(config, model=Model(whole=model), sft=sft)


def check_adapt(config: TrainConfig, flags: Collection[str]) -> None:
    """Raises ValueError where the flags named no encoder or no LLM, or a path where nothing is: before data is made."""
    if not config.model.encoder or not config.model.llm:
        raise ValueError("adapt takes --encoder RUN (or an export, or a checkpoint) and --llm NAME_OR_FOLDER")
    for flag, path in (("encoder", config.model.encoder), ("llm", config.model.llm)):
        if path.startswith(("/", ".", "~")) and not Path(path).exists():  # else it may be a name on the hub
            raise ValueError(f"--{flag} {path}: there is nothing")


def check_sft(config: TrainConfig, flags: Collection[str]) -> None:
    """Raises ValueError where the flags named no model or no conversations; what they name may be what the model's run
    had."""
    if not config.model.whole or (config.data.chat is None and "data.path" not in flags):
        raise ValueError(
            "sft takes --model RUN_OR_EXPORT and a Gran dataset with conversations: --data.path DIR, or --data.chat "
            "DIR to be evaluated on the regions of the model's own run besides"
        )


def _run_config(path: str | None, name: str) -> TrainConfig:
    """The configuration of the run at `path`, or else of the preset compact, with the one stage `name` left."""
    compact, run = PRESETS["compact"], PRESETS["compact"]
    folder = Path(path or "")
    for file in (folder / "config.yaml", folder.parent / "config.yaml"):
        if path is not None and file.is_file() and (file.parent == folder or folder.name.startswith("seed-")):
            run = load_config(file)
            break
    pretrained = run.model.llm not in (None, PRESETS["quick"].model.llm) or run.model.whole is not None
    off = {"steps": 0, "epochs": None}
    stages = {other: replace(getattr(run, other), **off) for other in PHASES}
    stages[name] = getattr(run if pretrained or name == "sft" else compact, name)
    return replace(run, preset=name, output=f"runs/{name}", control=False, seeds=1, **stages)


def _export(path: str) -> dict[str, Any]:
    """The configuration of the GranViT that lies at `path`, a run's folder or an export; {} where there is none."""
    for folder in (Path(path), Path(path) / "export"):
        try:
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(values, dict) and values.get("model_type") == "granvit":
            return values
    return {}
