"""preprocessor_config.json: the pixels that an encoder was trained on, read from a checkpoint, or written for one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

FILE = "preprocessor_config.json"
ROUND = "image_round"
"""GranViTConfig's field, which no processor of transformers knows and which all of them hand on."""

_RESAMPLES = {int(Image.Resampling.BILINEAR): "bilinear", int(Image.Resampling.BICUBIC): "bicubic"}
_FAMILIES = {
    **dict.fromkeys(("clip_vision_model", "aimv2_vision_model"), (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)),
    **dict.fromkeys(
        ("dinov2", "dinov2_with_registers", "dinov3_vit", "internvl_vision"),
        (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    ),
}


def read_pixels(name_or_path: str | Path) -> dict[str, Any]:
    """image_mean, image_std, image_resample and image_round (GranViTConfig's fields) of a checkpoint's preprocessor;
    none of them where it has no preprocessor.

    transformers' processors resize 8-bit images, so image_round is "pil" (which Pillow's versions before 13 are, with
    which most models were trained), unless the file is of a run of ours, which says what that run did.
    Raises ValueError for a file that can't be read, and for pixels that pack_patches can't make.
    """
    if (values := _read(name_or_path)) is None:
        return {}
    try:
        return _pixels(values)
    except (AttributeError, ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{name_or_path}: {FILE} has pixels that can't be made: {error}") from error


def read_budget(name_or_path: str | Path, patch_size: int) -> int | None:
    """How many patches an image may have, by a checkpoint's preprocessor: its max_num_patches, or those of the square
    that it cuts or squeezes images to. None where it says neither. Raises ValueError for a file that can't be read, and
    for sizes that are no positive integers."""
    values = _read(name_or_path) or {}
    size = values.get("crop_size" if values.get("do_center_crop") else "size")
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    number = values.get("max_num_patches", size)
    if number is None:
        return None
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"{name_or_path}: {FILE} has images of {number!r}, accepted are positive integers")
    return number if "max_num_patches" in values else max(1, number // patch_size) ** 2


def _read(name_or_path: str | Path) -> dict[str, Any] | None:
    """What the file holds; None where there is none."""
    try:
        values = ImageProcessingMixin.get_image_processor_dict(name_or_path)[0]
    except (OSError, RecursionError) as error:
        if (Path(name_or_path) / FILE).exists():
            raise ValueError(f"{name_or_path}: {FILE} can't be read: {error}") from error
        return None
    if not isinstance(values, dict):
        raise ValueError(f"{name_or_path}: {FILE} has pixels that can't be made: it is no object of settings")
    return values


def _pixels(values: dict[str, Any]) -> dict[str, Any]:
    resample = values.get("resample", int(Image.Resampling.BICUBIC))
    if resample not in _RESAMPLES:
        raise ValueError(f"resample is {resample!r}, accepted are {_RESAMPLES}")
    # A pixel becomes (x * scale - mean) / std; ours are scaled to [0, 1].
    scale = 255 * values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 255.0
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    mean, std = ([0.0] * 3, [1.0] * 3) if not values.get("do_normalize", True) else (
        values.get("image_mean", [0.5] * 3), values.get("image_std", [0.5] * 3)
    )  # fmt: skip
    return {
        "image_mean": [value / scale for value in mean],
        "image_std": [value / scale for value in std],
        "image_resample": _RESAMPLES[resample],
        "image_round": values.get(ROUND, "pil"),
    }


def family_pixels(model_type: str) -> dict[str, Any]:
    """What a family's own processor does, of an encoder that comes without one; none for SigLIP2, whose pixels are
    GranViTConfig's own."""
    if model_type not in _FAMILIES:
        return {}
    mean, std = _FAMILIES[model_type]
    return {
        "image_mean": list(mean), "image_std": list(std), "image_resample": "bicubic", "image_round": "pil"
    }  # fmt: skip


def write_preprocessor(
    directory: str | Path,
    processor: dict[str, Any],
    image_mean: Sequence[float],
    image_std: Sequence[float],
    image_resample: str,
    image_round: str | None,
) -> None:
    """Write a preprocessor_config.json for AutoImageProcessor. processor: which one, and its sizes."""
    settings = {
        **processor,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": int(Image.Resampling[image_resample.upper()]),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image_mean),
        "image_std": list(image_std),
        ROUND: image_round,
    }
    (Path(directory) / FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
