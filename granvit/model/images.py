"""Pictures as users have them, PIL images, arrays, tensors or files, to uint8 tensors [H, W, 3]."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image

from granvit.questions.pictures import decode_image

ACCEPTED = "uint8 [H, W, 3] (a tensor or an array), a PIL image or a file's path"


def is_single(images: Any) -> bool:
    """Whether it is a picture by itself, not a list or a batch [B, H, W, 3] of them."""
    return isinstance(images, Image.Image | str | bytes | os.PathLike) or getattr(images, "ndim", 4) < 4


def read_images(images: Any) -> list[torch.Tensor]:
    """A picture or a list of them, each as `as_pixels` reads it."""
    if not is_single(images) and not isinstance(images, Iterable):
        raise ValueError(f"images: got {type(images).__name__}, accepted is {ACCEPTED}, or a list of these")
    return [as_pixels(image, i) for i, image in enumerate([images] if is_single(images) else images)]


def as_pixels(image: Any, index: int = 0) -> torch.Tensor:
    """An image as a uint8 tensor [H, W, 3]: a tensor or array of that form, or a PIL image or file, read as data sets'
    images are (`decode_image`). ValueError, naming images[index], for anything else."""
    name = f"images[{index}]"
    if isinstance(image, str | os.PathLike):
        path = os.fspath(image)
        if not os.path.isfile(path):
            raise ValueError(f"{name}: got {type(image).__name__} {path!r}, and no such file; accepted is {ACCEPTED}")
        name, image = f"{name}, {path}", {"path": path}
    if isinstance(image, Image.Image | dict):
        try:
            image = np.array(decode_image(image))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        image = torch.from_numpy(np.ascontiguousarray(image))
    if (
        not isinstance(image, torch.Tensor)
        or image.dtype != torch.uint8
        or image.dim() != 3
        or image.shape[2] != 3
    ):
        got = f"{image.dtype} {list(image.shape)}" if hasattr(image, "dtype") else type(image).__name__
        raise ValueError(f"{name}: got {got}, accepted is {ACCEPTED}")
    if 0 in image.shape:
        raise ValueError(f"{name}: got an empty image {list(image.shape)}")
    return image
