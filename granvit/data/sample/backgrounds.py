"""Backgrounds of generated scenes, of moderate contrast so that objects stand out."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from granvit.data.sample.photographs import FOLDER, photographs

FREE = ("CC0-1.0", "public domain")
"""Licences of photographs that backgrounds are cropped from: a crop must need no name beside it."""

_LONG_SIDE = 512  # photographs are kept in memory at this size


def background(
    width: int, height: int, photographic: float, split: str, rng: np.random.Generator
) -> Image.Image:
    """An RGB picture [height, width]: with probability `photographic` a crop of a photograph of `split`."""
    if rng.random() < photographic:
        return _calm(_photograph_crop(width, height, split, rng), rng)
    make = (_gradient, _noise, _tiles)[rng.integers(3)]
    return make(width, height, rng)


def _photograph_crop(width: int, height: int, split: str, rng: np.random.Generator) -> Image.Image:
    pictures = _photographs(split)
    picture = pictures[rng.integers(len(pictures))]
    scale = rng.uniform(0.5, 1.0) * min(picture.width / width, picture.height / height)
    x = rng.uniform(0, picture.width - scale * width)
    y = rng.uniform(0, picture.height - scale * height)
    return picture.resize(
        (width, height), Image.Resampling.BILINEAR, (x, y, x + scale * width, y + scale * height)
    )


def _calm(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture with its contrast reduced and its brightness moved."""
    gain, middle = rng.uniform(0.35, 0.7), rng.uniform(90, 165)
    means = np.asarray(image.resize((1, 1), Image.Resampling.BOX))[0, 0].mean()
    table = np.clip((np.arange(256) - means) * gain + middle, 0, 255).astype(np.uint8)
    return image.point(list(table) * 3)


def _gradient(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Four muted colours in the corners, blended between."""
    corners = np.stack([_muted(rng) for _ in range(4)]).reshape(2, 2, 3)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC, (0.5, 0.5, 1.5, 1.5))


def _noise(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Smooth noise around a muted colour, its grain between fine and cloudy."""
    cell = int(rng.integers(2, 32))
    shape = (height // cell + 2, width // cell + 2, 1)
    noise = np.clip(_muted(rng) + rng.normal(0, 26, shape) + rng.normal(0, 8, (*shape[:2], 3)), 0, 255)
    return Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def _tiles(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Tiles of nearly one muted colour."""
    cell = int(rng.integers(24, 64))
    shape = (height // cell + 1, width // cell + 1, 1)
    tiles = np.clip(_muted(rng) + rng.normal(0, 14, shape), 0, 255).astype(np.uint8)
    return (
        Image.fromarray(tiles)
        .resize((shape[1] * cell, shape[0] * cell), Image.Resampling.NEAREST)
        .crop((0, 0, width, height))
    )


def _muted(rng: np.random.Generator) -> np.ndarray:
    """A colour of low saturation, uint8 [3]."""
    return np.clip(rng.uniform(80, 175) + rng.uniform(-28, 28, 3), 0, 255).astype(np.uint8)


@cache
def _photographs(split: str) -> tuple[Image.Image, ...]:
    pictures = []
    for row in photographs(split):
        if row["licence"] in FREE:
            picture = Image.open(FOLDER / row["image"]["path"]).convert("RGB")
            picture.thumbnail((_LONG_SIDE, _LONG_SIDE))
            pictures.append(picture)
    return tuple(pictures)
