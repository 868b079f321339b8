"""The objects of generated scenes: silhouettes, patterns and colours, drawn as RGB sprites with a mask.

They are made for a very small ViT that sees a picture at about 100 pixels: silhouettes that fill their box
(so that a box's shape says nothing about what is in it), patterns of few, thick elements in a second tone far
from the first, and colours far apart. All names are single words that stand in the captions as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

_SIDE = 256  # silhouettes are drawn once at this size and scaled down for each object


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    angles = np.pi / 5 * np.arange(10) - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
    return _polygon(u, v, np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1))


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return _polygon(u, v, np.stack([x, y], axis=1))


def _arrow(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _polygon(u, v, np.array([(-1, -0.4), (0, -0.4), (0, -1), (1, 0), (0, 1), (0, 0.4), (-1, 0.4)]))


def _polygon(u: np.ndarray, v: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Even-odd test of points against a polygon that is stretched to fill [-1, 1] x [-1, 1] first."""
    low, high = corners.min(axis=0), corners.max(axis=0)
    corners = (corners - low) / (high - low) * 2 - 1
    inside = np.zeros(u.shape, bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y1 != y2:
            inside ^= ((y1 > v) != (y2 > v)) & (u < (x2 - x1) * (v - y1) / (y2 - y1) + x1)
    return inside


# In the order in which a tiny ViT learned them (700 steps): fewer kinds are the easier ones.
_SILHOUETTES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "box": lambda u, v: np.ones(u.shape, bool),
    "star": _star,
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.2),
    "ball": lambda u, v: u**2 + v**2 <= 1,
    "ramp": lambda u, v: u <= v,
    "arch": lambda u, v: (abs(u) >= 0.4) | (v <= -0.2),
    "heart": _heart,
    "cone": lambda u, v: abs(u) <= (v + 1) / 2,
    "arrow": _arrow,
    "cross": lambda u, v: (abs(u) <= 0.34) | (abs(v) <= 0.34),
}

_PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "striped": lambda u, v: np.floor((v + 1) * 2.5) % 2 == 1,
    "checked": lambda u, v: (np.floor((u + 1) * 2) + np.floor((v + 1) * 2)) % 2 == 1,
    "dotted": lambda u, v: (((u + 1) * 1.5) % 1 - 0.5) ** 2 + (((v + 1) * 1.5) % 1 - 0.5) ** 2 <= 0.3**2,
    "halved": lambda u, v: u > 0,
    "plain": lambda u, v: np.zeros(u.shape, bool),
}

KINDS = tuple(_SILHOUETTES)
PATTERNS = tuple(_PATTERNS)
_WHITE, _BLACK = (250, 250, 250), (20, 20, 28)
COLOURS = {  # name: (first tone, second tone)
    "red": ((215, 30, 35), _WHITE),
    "yellow": ((252, 220, 30), _BLACK),
    "green": ((30, 145, 55), _WHITE),
    "cyan": ((70, 220, 230), _BLACK),
    "blue": ((35, 55, 205), _WHITE),
    "pink": ((252, 120, 205), _BLACK),
}


def sprite(
    kind: str, pattern: str, colour: str, width: int, height: int, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """An object that fills width x height pixels: (RGB image, L mask). Its tones vary a little with `rng`."""
    silhouette, tones, outline = (
        mask.resize((width, height), Image.Resampling.BOX) for mask in _masks(kind, pattern)
    )
    first, second = (_vary(tone, rng) for tone in COLOURS[colour])
    image = Image.composite(
        Image.new("RGB", (width, height), second), Image.new("RGB", (width, height), first), tones
    )
    image.paste(_BLACK, mask=outline)
    return image, silhouette


def _vary(tone: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = np.clip(
        np.array(tone) * rng.uniform(0.88, 1.06) + rng.uniform(-10, 10, 3), 0, 255
    ).astype(int)
    return int(red), int(green), int(blue)


@cache
def _masks(kind: str, pattern: str) -> tuple[Image.Image, Image.Image, Image.Image]:
    """(silhouette, second tone, outline) of a kind with a pattern as L images [_SIDE, _SIDE]."""
    axis = (np.arange(_SIDE) + 0.5) / _SIDE * 2 - 1
    u, v = np.meshgrid(axis, axis)
    inside = _SILHOUETTES[kind](u, v)
    outline = inside & ~_eroded(inside, 0.03)
    masks = (inside, _PATTERNS[pattern](u, v), outline)
    return tuple(Image.fromarray((mask * 255).astype(np.uint8)) for mask in masks)


def _eroded(inside: np.ndarray, share: float) -> np.ndarray:
    """`inside` without the points nearer to its edge than a share of the side."""
    steps = round(share * _SIDE)
    image = Image.fromarray((np.pad(inside, steps + 1) * 255).astype(np.uint8))
    eroded = np.asarray(image.filter(ImageFilter.MinFilter(2 * steps + 1))) > 0
    return eroded[steps + 1 : -steps - 1, steps + 1 : -steps - 1]
