"""Which encoder a checkpoint or a configuration means: ours for SigLIP and SigLIP2, the adapter for other families."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PretrainedConfig, Siglip2VisionConfig

from .adapter import FAMILIES, WHOLE, AdaptedEncoder, adapted_config
from .vision import CHECKPOINTS, VisionEncoder, siglip2_config

Encoder = VisionEncoder | AdaptedEncoder


def load_encoder(name_or_path: str | Path, **kwargs) -> Encoder:
    """The encoder with a checkpoint's weights (hub name or folder; kwargs go to the vision model's from_pretrained), by
    its model type. Raises ValueError, which lists what is accepted, for another type, and where weights are missing or
    files are damaged."""
    with _loading(name_or_path):
        native = _model_type(name_or_path) in CHECKPOINTS
        return (VisionEncoder.from_siglip2 if native else AdaptedEncoder.from_pretrained)(name_or_path, **kwargs)


def random_encoder(config: PretrainedConfig) -> Encoder:
    """An encoder with random weights."""
    return (VisionEncoder if isinstance(config, Siglip2VisionConfig) else AdaptedEncoder)(config)


def checkpoint_config(name_or_path: str | Path) -> PretrainedConfig:
    """The configuration that `load_encoder` gives an encoder. Raises ValueError where it is none."""
    with _loading(name_or_path):
        native = _model_type(name_or_path) in CHECKPOINTS
        return (siglip2_config if native else adapted_config)(name_or_path)


@contextmanager
def _loading(name_or_path: str | Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:  # on damaged files transformers raises whatever the damage leads to
        kind = type(error).__name__
        raise ValueError(f"name_or_path: {name_or_path} can't be loaded: {kind}: {error}") from error


def _model_type(name_or_path: str | Path) -> str | None:
    kind = PretrainedConfig.get_config_dict(name_or_path)[0].get("model_type")
    if kind not in CHECKPOINTS | FAMILIES | WHOLE:
        raise ValueError(
            f"name_or_path: {name_or_path} is of model type {kind!r}, accepted are {', '.join(CHECKPOINTS)} (native) "
            f"and {', '.join(FAMILIES | WHOLE)} (through an adapter)"
        )
    return kind
