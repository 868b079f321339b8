"""Generated pictures of text: pages, signs, receipts and tables, with the exact box of every line's ink."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from PIL.ImageFont import FreeTypeFont

from granvit.data.sample import texts
from granvit.data.sample.fonts import FONTS, MONOSPACED, font

INK = 96
"""A pixel with at least this much of 255 of a line's ink belongs to the line's box."""

LAYOUTS = ("page", "sign", "receipt", "table")
_Placed = tuple[str, float, float, FreeTypeFont]


@dataclass(frozen=True)
class Line:
    """A line of text and the box of its ink, xyxy relative to the picture."""

    text: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Page:
    """A drawn page. `owner` is int8 [H, W]: which line's ink a pixel holds, -1 for none."""

    image: Image.Image
    lines: tuple[Line, ...]
    owner: np.ndarray


def draw_page(split: str, rng: np.random.Generator, long_side: int = 384) -> Page:
    """A picture of one of `LAYOUTS` whose texts all belong to `split`, with one line at least."""
    while True:
        page = _draw(split, rng, long_side)
        if page.lines:
            return page


def _draw(split: str, rng: np.random.Generator, long_side: int) -> Page:
    layout = LAYOUTS[rng.integers(len(LAYOUTS))]
    short = round(long_side * 3 / 4)
    shapes = {
        "page": ((short, long_side), (long_side, long_side), (long_side, short)),
        "sign": ((long_side, short), (long_side, long_side)),
        "receipt": ((short, long_side), (long_side // 2, long_side)),
        "table": ((long_side, short), (long_side, long_side)),
    }[layout]
    width, height = shapes[rng.integers(len(shapes))]
    paper, ink = _paper_and_ink(layout, rng)
    image = _paper(width, height, paper, rng)
    angle = rng.normal(0, 1.5) if rng.random() < 0.7 else 0.0
    owner = np.full((height, width), -1, np.int8)
    lines: list[Line] = []
    if layout == "table":
        _rules(image, ink, angle, rng)
    for text, x, y, face in _LAYOUT[layout](width, height, split, rng):
        _write(image, owner, lines, text, (x, y), face, ink, angle)
    return Page(_aged(image, rng), tuple(lines), owner)


def _write(
    image: Image.Image,
    owner: np.ndarray,
    lines: list[Line],
    text: str,
    at: tuple[float, float],
    face: FreeTypeFont,
    ink: tuple[int, int, int],
    angle: float,
) -> None:
    """Draw a line with its upper left corner at `at`, the page turned by `angle` degrees about its centre.

    A line that would leave the picture or touch another one is not drawn.
    """
    width, height = image.size
    left, top, right, bottom = face.getbbox(text)
    mask = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(mask).text((2 - left, 2 - top), text, 255, font=face)
    turn = math.radians(angle)
    x, y = at[0] + mask.width / 2 - width / 2, at[1] + mask.height / 2 - height / 2
    x, y = (
        x * math.cos(turn) + y * math.sin(turn) + width / 2,
        y * math.cos(turn) - x * math.sin(turn) + height / 2,
    )
    if angle:
        mask = mask.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    x, y = round(x - mask.width / 2), round(y - mask.height / 2)
    solid = np.asarray(mask) >= INK
    if x < 0 or y < 0 or x + mask.width > width or y + mask.height > height or not solid.any():
        return
    columns, rows = np.flatnonzero(solid.any(axis=0)), np.flatnonzero(solid.any(axis=1))
    x1, y1, x2, y2 = x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1
    if (owner[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1] >= 0).any():
        return
    image.paste(ink, (x, y), mask)
    owner[y : y + mask.height, x : x + mask.width][solid] = len(lines)
    lines.append(Line(text, (float(x1 / width), float(y1 / height), float(x2 / width), float(y2 / height))))


def _page(width: int, height: int, split: str, rng: np.random.Generator) -> Iterator[_Placed]:
    """A heading and lines of running text in one column."""
    chosen, taken = FONTS[rng.integers(len(FONTS))], set()
    size = int(rng.integers(13, 27))
    left, y = width * rng.uniform(0.06, 0.14), height * rng.uniform(0.05, 0.12)
    if rng.random() < 0.6:
        yield texts.draw_text(texts.heading, split, taken, rng), left, y, font(*chosen, round(size * 1.35))
        y += size * 2.4
    spacing = size * rng.uniform(1.4, 1.9)
    while y < height * 0.92:
        text = texts.draw_text(texts.sentence, split, taken, rng)
        yield text, left, y, font(*chosen, size)
        y += spacing


def _sign(width: int, height: int, split: str, rng: np.random.Generator) -> Iterator[_Placed]:
    """One to three large words in the middle."""
    chosen, taken = FONTS[rng.integers(len(FONTS))], set()
    number = int(rng.integers(1, 4))
    words = [texts.draw_text(texts.sign, split, taken, rng) for _ in range(number)]
    size = int(rng.integers(30, 76))
    while size > 16 and max(font(*chosen, size).getlength(word) for word in words) > width * 0.86:
        size -= 4
    y = (height - number * size * 1.4) / 2
    for word in words:
        yield word, (width - font(*chosen, size).getlength(word)) / 2, y, font(*chosen, size)
        y += size * 1.4


def _receipt(width: int, height: int, split: str, rng: np.random.Generator) -> Iterator[_Placed]:
    """A shop's name, a date, items and a total, in a monospaced font."""
    chosen, taken = MONOSPACED[rng.integers(len(MONOSPACED))], set()
    size = int(rng.integers(12, 17))
    left, y = width * 0.07, height * 0.05
    makers = [texts.heading, texts.date] + [texts.item] * int(rng.integers(3, 9))
    makers.append(lambda rng: f"TOTAL {texts.price(rng)}")
    for make in makers:
        text = texts.draw_text(make, split, taken, rng)
        yield text, left, y, font(*chosen, size)
        y += size * 1.75


def _table(width: int, height: int, split: str, rng: np.random.Generator) -> Iterator[_Placed]:
    """Rows and columns of words and numbers."""
    chosen, taken = FONTS[rng.integers(len(FONTS))], set()
    columns, rows = int(rng.integers(2, 4)), int(rng.integers(2, 6))
    size = int(rng.integers(14, 24))
    for row in range(rows):
        for column in range(columns):
            text = texts.draw_text(texts.cell, split, taken, rng)
            x = width * (0.08 + 0.86 * column / columns)
            yield text, x, height * (0.1 + 0.82 * row / rows), font(*chosen, size)


_LAYOUT = {"page": _page, "sign": _sign, "receipt": _receipt, "table": _table}


def _paper_and_ink(layout: str, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Two colours at least 110 grey levels apart; signs are often light on dark and coloured."""
    while True:
        strong = layout == "sign"
        paper = rng.uniform(20, 250, 3) if strong else rng.uniform(205, 252) + rng.uniform(-12, 4, 3)
        ink = rng.uniform(0, 255, 3) if strong else rng.uniform(0, 90) + rng.uniform(0, 50, 3)
        grey = np.array((0.3, 0.59, 0.11))
        if abs(grey @ (paper - ink)) >= 110:
            red, green, blue = ink.astype(int)
            return paper, (int(red), int(green), int(blue))


def _paper(width: int, height: int, colour: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Nearly one colour, with a soft shade across."""
    corners = np.clip(colour + rng.normal(0, 7, (2, 2, 1)), 0, 255).astype(np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def _rules(image: Image.Image, ink: tuple[int, int, int], angle: float, rng: np.random.Generator) -> None:
    """Two horizontal lines that bound a table, turned as its text is."""
    if rng.random() < 0.5:
        return
    draw, slope = ImageDraw.Draw(image), math.tan(math.radians(angle))
    for share in (0.05, 0.95):
        y, run = image.height * share, image.width * 0.43
        middle = image.width / 2
        draw.line([(middle - run, y + slope * run), (middle + run, y - slope * run)], fill=ink, width=2)


def _aged(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Sometimes a little blur, sometimes grain."""
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    if rng.random() < 0.5:
        grain = rng.normal(0, rng.uniform(2, 9), (image.height, image.width, 1))
        image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
    return image
