"""Which encoder a checkpoint or a configuration means: ours for SigLIP and SigLIP2, the adapter for other families."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig, Siglip2VisionConfig

from .adapter import FAMILIES, WHOLE, AdaptedEncoder, adapted_config
from .vision import CHECKPOINTS, VisionEncoder, siglip2_config

Encoder = VisionEncoder | AdaptedEncoder


def load_encoder(name_or_path: str | Path, **kwargs) -> Encoder:
    """The encoder with a checkpoint's weights (hub name or folder; kwargs go to the vision model's from_pretrained), by
    its model type. Raises ValueError, which lists what is accepted, for another type, and where weights are missing."""
    kind = VisionEncoder.from_siglip2 if _model_type(name_or_path) in CHECKPOINTS else AdaptedEncoder.from_pretrained
    return kind(name_or_path, **kwargs)


def random_encoder(config: PretrainedConfig) -> Encoder:
    """An encoder with random weights."""
    return (VisionEncoder if isinstance(config, Siglip2VisionConfig) else AdaptedEncoder)(config)


def checkpoint_config(name_or_path: str | Path) -> PretrainedConfig:
    """The configuration that `load_encoder` gives an encoder. Raises ValueError where it would."""
    native = _model_type(name_or_path) in CHECKPOINTS
    return (siglip2_config if native else adapted_config)(name_or_path)


def _model_type(name_or_path: str | Path) -> str | None:
    kind = PretrainedConfig.get_config_dict(name_or_path)[0].get("model_type")
    if kind not in CHECKPOINTS | FAMILIES | WHOLE:
        raise ValueError(
            f"name_or_path: {name_or_path} is of model type {kind!r}, accepted are {', '.join(CHECKPOINTS)} (native) "
            f"and {', '.join(FAMILIES | WHOLE)} (through an adapter)"
        )
    return kind
