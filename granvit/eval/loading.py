"""From a path that somebody typed to a model: a run's folder, or a model's own."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError

from granvit.model.granvit import GranViT
from granvit.model.processing import GranViTProcessor

ACCEPTED = "a run's folder (with export/ in it) or a model's (written by GranViT.save_pretrained)"


def find_model(path: str | Path) -> Path:
    """The folder of the model that `path` means: itself, or a run's export/.

    ValueError saying what is there instead: nothing, an unfinished run, several seeds, another kind of model.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"no model at {folder}: it is {'a file' if folder.exists() else 'not there'}; give {ACCEPTED}"
        )
    for candidate in (folder, folder / "export"):
        config = candidate / "config.json"
        if not config.is_file():
            continue
        try:
            kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{config} is not readable as a model's configuration: {error}") from error
        if kind != GranViT.config_class.model_type:
            raise ValueError(f"{candidate} holds a model of type {kind!r}, not a GranViT; give {ACCEPTED}")
        return candidate
    if seeds := sorted(str(seed.parent) for seed in folder.glob("seed-*/export")):
        raise ValueError(f"{folder} is a run of several seeds; choose one of {', '.join(seeds)}")
    if (folder / "config.yaml").is_file():
        raise ValueError(f"the run {folder} has no export/ yet: it is not finished")
    names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise ValueError(f"no model in {folder}: found {names}; give {ACCEPTED}")


def load_model(path: str | Path, device: str = "cpu") -> tuple[GranViT, GranViTProcessor]:
    """The model that `path` means (`find_model`), in eval mode on `device`, and its processor.

    ValueError where its files are damaged or lack weights.
    """
    folder = find_model(path)
    try:
        model = GranViT.from_pretrained(folder)
        processor = GranViTProcessor.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} can't be loaded: {error}") from error
    return model.eval().to(device), processor
