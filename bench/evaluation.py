"""A finished run measured from start to end, as docs/evaluation.md says it: the probe, granvit.eval and lmms-eval,
beside its control (stage 2 on a random encoder) and the untrained model (before stage 1).

    python bench/evaluation.py RUN --python PYTHON    writes bench/results/evaluation.json and docs/figures/probe.png

PYTHON: that of an environment with granvit[lmms-eval]. Some minutes of one core for the preset smoke. Nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import refcoco
import torch
from rows import results_folder
from safetensors.torch import load_file

from granvit.data.loader import GranDataset
from granvit.eval.evaluation import evaluate
from granvit.eval.loading import load_model
from granvit.eval.probe.picture import draw
from granvit.eval.probe.probing import probe
from granvit.export import find_source
from granvit.machine import commit, device_name
from granvit.model.formats import save
from granvit.train.presets import TrainConfig, load_config
from granvit.train.retention import checkpoints_of
from granvit.train.splits import open_splits, with_data

PICTURE = Path(__file__).parents[1] / "docs" / "figures" / "probe.png"
TRAINED, CONTROL, UNTRAINED = "trained", "control", "untrained"
PROBED = 1500  # images of either split
PACKAGES = ("lmms-eval", "torch", "transformers", "datasets")


def models_of(run: Path, config: TrainConfig, folder: Path) -> dict[str, Path]:
    """{name: folder of save_pretrained's} of the run's three models, written into `folder`.

    ValueError for a run without a control or without a warm-up: it has not got all three.
    """
    sources = {TRAINED: run}
    places = {CONTROL: (run / "control", config.adapt), UNTRAINED: (run, config.warmup)}
    for name, (place, stage) in places.items():
        checkpoints = place / "checkpoints"
        written = checkpoints_of(checkpoints, stage.name) if checkpoints.is_dir() else []
        if not written:
            raise ValueError(f"{place} has no checkpoint of the stage {stage.name}: {name} can't be measured")
        sources[name] = written[-1]
    for name, source in sources.items():
        save(*find_source(source).load(), folder / name, "granvit")
    return {name: folder / name for name in sources}


def same_encoder(*models: Path) -> bool:
    first, second = (load_file(model / "encoder" / "model.safetensors") for model in models)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def measure(model: Path, python: str, data: GranDataset, images: int, folder: Path) -> dict[str, Any]:
    """Figures by granvit.eval, and a row a task of lmms-eval's, on the same images. folder: one to be made."""
    folder.mkdir()
    evaluation = evaluate(*load_model(str(model)), data, limit=images)
    return {
        "figures": evaluation.metrics,
        "tasks": refcoco.compare(python, str(model), evaluation, data, images, folder),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", help="a finished run's folder", type=Path)
    parser.add_argument("--python", required=True, help="of an environment with granvit[lmms-eval]")
    parser.add_argument("--images", type=int, default=60, help="of the test split, that are asked about (60)")
    options = parser.parse_args()
    at = commit()  # before the picture is written over
    config = with_data(load_config(options.run / "config.yaml"))
    splits = open_splits(config)
    with tempfile.TemporaryDirectory() as folder:
        models = models_of(options.run, config, Path(folder))
        measured = {
            name: measure(model, options.python, splits["test"], options.images, Path(folder, f"{name}-lmms-eval"))
            for name, model in models.items()
        }
        if same_encoder(models[CONTROL], models[UNTRAINED]):  # of a run from random weights
            del models[CONTROL]
        probed = probe([f"{name}={model}" for name, model in models.items()], splits["train"], splits["test"], PROBED)
        probed["commit"] = at
    draw(probed, splits["test"]).savefig(PICTURE, dpi=100)
    del probed["nearest"]
    listing = f"import importlib.metadata as m; print(*map(m.version, {PACKAGES}))"
    listed = subprocess.run([options.python, "-c", listing], check=True, capture_output=True, text=True).stdout
    result = {
        "run": f"{config.preset}, seed {config.seed}",
        "images": options.images,
        "models": measured,
        "probe": probed | {"data": "the sample set"},
        "device": device_name(),
        "versions": dict(zip(PACKAGES, listed.split(), strict=True)),
        "commit": at,
    }
    (results_folder() / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
