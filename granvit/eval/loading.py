"""From a path that somebody typed to a model: a run's folder, or a model's own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from granvit.data.sample import cached_sample
from granvit.model.granvit import GranViT
from granvit.model.processing import GranViTProcessor

PRECISIONS = ("float32", "bfloat16")
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
    if seeds := sorted(map(str, folder.glob("seed-*"))):
        raise ValueError(f"{folder} is a run of several seeds; choose one of {', '.join(seeds)}")
    if (folder / "config.yaml").is_file():
        raise ValueError(f"the run {folder} has no export/ yet: it is not finished")
    names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise ValueError(f"no model in {folder}: found {names}; give {ACCEPTED}")


def find_encoder(path: str | Path) -> Path | str:
    """What load_encoder takes for the encoder that `path` means: a run's or an export's, else `path` as
    it is (a folder of a checkpoint, or a hub name).

    ValueError for a run without one encoder: an unfinished one, or one of several seeds.
    """
    folder = Path(path)
    if any((folder / name).exists() for name in ("config.yaml", "export", "encoder")):
        early = folder / "export" / "encoder"  # written when stage 1 ended
        folder = early if (early / "config.json").is_file() else find_model(folder) / "encoder"
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no encoder: there is no config.json")
        return folder
    return path


def own_data(path: str | Path) -> list[str]:
    """The datasets of the run that `path` is or lies in, an export of it, say; the sample set, drawn if need be, where
    the run named none. ValueError for a path outside a run."""
    folder = Path(path).absolute()
    configs = [place / "config.yaml" for place in (folder, *folder.parents[:2]) if (place / "config.yaml").is_file()]
    if not configs:
        raise ValueError(f"{path} is no run (no config.yaml in it or above), so it has no test set; give --data DIR")
    try:
        data = yaml.safe_load(configs[0].read_text(encoding="utf-8"))["data"]
        named, sample = data["path"], (data["images"], data["pages"])
    except (yaml.YAMLError, ValueError, RecursionError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{configs[0]} does not say which data the run had ({why}); give --data DIR") from error
    if named is None:
        images, pages = sample
        return [str(cached_sample(images, seed=0, pages=pages))]
    return [named] if isinstance(named, str) else list(named)


def load_model(
    path: str | Path, device: str | torch.device = "cpu", precision: str | None = None
) -> tuple[GranViT, GranViTProcessor]:
    """The model that `path` means (`find_model`), in eval mode on `device`, and its processor. precision: "float32" or
    "bfloat16"; None: as its weights were saved.

    ValueError for another precision, for files that are damaged, lack weights or don't belong together, and for a
    device that isn't there.
    """
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision: got {precision!r}, accepted are {', '.join(map(repr, PRECISIONS))}")
    check_device(device)
    folder = find_model(path)
    try:
        if not (folder / "processor_config.json").is_file():  # transformers would take defaults for what stands in it
            raise ValueError("processor_config.json is missing")
        processor = GranViTProcessor.from_pretrained(folder)
        processor.check_config(GranViT.config_class.from_pretrained(folder))
        model = GranViT.from_pretrained(folder)
    except Exception as error:  # on damaged files the libraries raise whatever the damage leads to
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{folder} can't be loaded: {kind}{error}") from error
    return model.eval().to(device=device, dtype=None if precision is None else getattr(torch, precision)), processor


def check_device(device: str | torch.device) -> None:
    """ValueError for what torch can't compute on: no device's name, one that is not here, or "meta"."""
    try:
        torch.zeros((), device=device).item()
    except Exception as error:  # each backend raises its own
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: got {str(device)!r}, accepted is 'cpu', or 'cuda' with a GPU: {reason}") from error
