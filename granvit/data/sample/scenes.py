"""Generated scenes: objects with attributes on many backgrounds, each with a sentence of its own.

A picture often holds two objects that are alike but for one attribute or for their place, so that finding a
box from its sentence needs perception. Some combinations of attributes are held out: they are never in train,
and "scenes-heldout" shows no others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
from PIL import Image

from granvit.data.sample.backgrounds import background
from granvit.data.sample.sprites import COLOURS, KINDS, PATTERNS, sprite

LARGE, SMALL = 0.38, 0.27
"""An object is large or small where its mean side, relative to the picture's mean side, is past these."""

PLACES = ("on the left", "on the right", "at the top", "at the bottom")
_CORNERS = tuple(f"at the {v} {h}" for v, h in product(("top", "bottom"), ("left", "right")))
PATTERN_PHRASES = {
    "striped": "with stripes",
    "checked": "with checks",
    "dotted": "with dots",
    "halved": "in halves",
    "plain": "without pattern",
}


@dataclass(frozen=True)
class SceneConfig:
    """How many attributes there are, and what pictures look like. Fewer attributes are learned faster.

    kinds, patterns, colours: how many of `sprites.KINDS`, `PATTERNS` and `COLOURS` are used.
    held_out: how many (kind, colour) and (pattern, colour) pairs, in turns, are never in train.
    objects: fewest and most in a picture; each further object is `more_objects` times as likely.
    size: an object's smallest and largest side, relative to the picture's mean side; log-uniform.
    twins: how often the last object is another one's like but for one attribute or its place.
    fixed_wording: how often a sentence has the one most frequent wording.
    photographic: how often the background is a photograph.
    long_side: of a picture, in pixels.
    """

    kinds: int = 6
    patterns: int = 5
    colours: int = 6
    held_out: int = 8
    objects: tuple[int, int] = (2, 8)
    more_objects: float = 0.7
    size: tuple[float, float] = (0.2, 0.5)
    twins: float = 0.5
    fixed_wording: float = 0.7
    photographic: float = 0.5
    long_side: int = 192

    def __post_init__(self) -> None:
        for name, most in (("kinds", len(KINDS)), ("patterns", len(PATTERNS)), ("colours", len(COLOURS))):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be in 1..{most}, got {getattr(self, name)}")
        if not 2 <= self.objects[0] <= self.objects[1] <= 12:
            raise ValueError(f"objects must be (fewest, most) in 2..12, got {self.objects}")
        if not 0 < self.size[0] <= self.size[1] <= 0.7:
            raise ValueError(f"size must be (smallest, largest) in (0, 0.7], got {self.size}")
        if self.long_side < 32:
            raise ValueError(f"long_side must be >= 32, got {self.long_side}")
        for split in (False, True):
            if not combinations(self, split) and (self.held_out or not split):
                raise ValueError(
                    f"held_out={self.held_out} leaves no combination {'held out' if split else 'to train'}"
                )


@dataclass(frozen=True)
class Thing:
    """An object of a scene. `box` is xyxy relative to the picture, of its visible pixels once it is drawn."""

    pattern: str
    colour: str
    kind: str
    box: tuple[float, float, float, float]

    @property
    def combination(self) -> tuple[str, str, str]:
        return self.pattern, self.colour, self.kind

    @property
    def side(self) -> float:
        return math.sqrt((self.box[2] - self.box[0]) * (self.box[3] - self.box[1]))

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """A drawn scene. `owner` is int8 [H, W]: which object a pixel shows, -1 for the background."""

    image: Image.Image
    things: tuple[Thing, ...]
    sentences: tuple[str, ...]
    caption: str
    owner: np.ndarray


def held_out_pairs(config: SceneConfig) -> tuple[tuple[str, str], ...]:
    """The (kind, colour) and (pattern, colour) pairs that are never in train, taken in turns.

    Each is of another kind or pattern and of another colour, so every one is in train all the same.
    """
    colours = tuple(COLOURS)[: config.colours]
    pairs = []
    for index in range(config.held_out):
        step = index // 2
        if index % 2 == 0:
            pairs.append((KINDS[step % config.kinds], colours[step % config.colours]))
        else:
            pairs.append((PATTERNS[step % config.patterns], colours[(step + 3) % config.colours]))
    return tuple(dict.fromkeys(pairs))


@cache
def combinations(config: SceneConfig, held_out: bool) -> tuple[tuple[str, str, str], ...]:
    """All (pattern, colour, kind) that hold a held-out pair, or all that hold none."""
    pairs = set(held_out_pairs(config))
    every = product(PATTERNS[: config.patterns], tuple(COLOURS)[: config.colours], KINDS[: config.kinds])

    def is_held_out(combination: tuple[str, str, str]) -> bool:
        pattern, colour, kind = combination
        return (pattern, colour) in pairs or (kind, colour) in pairs

    return tuple(combination for combination in every if is_held_out(combination) == held_out)


def draw_scene(config: SceneConfig, split: str, held_out: bool, rng: np.random.Generator) -> Scene:
    """A picture with `config.objects` things, each sentence true of one of them only.

    split: whose photographs the background is cropped from. held_out: every object is of a held-out
        combination, else none is.
    """
    while True:
        width, height = _picture_size(config.long_side, rng)
        planned = _plan(config, width, height, held_out, rng)
        # A cheap check before drawing; visible boxes differ a little from planned ones, so sentences wait.
        if planned is None or any(_qualifier(thing, planned, rng) is None for thing in planned):
            continue
        image = background(width, height, config.photographic, split, rng)
        owner = np.full((height, width), -1, np.int8)
        drawn = []
        for index, thing in enumerate(planned):
            left, top, right, bottom = _pixels(thing.box, width, height)
            picture, mask = sprite(thing.kind, thing.pattern, thing.colour, right - left, bottom - top, rng)
            image.paste(picture, (left, top), mask)
            solid = np.asarray(mask) >= 128
            drawn.append(solid.sum())
            owner[top:bottom, left:right][solid] = index
        things = [_seen(thing, owner == index, drawn[index]) for index, thing in enumerate(planned)]
        if any(thing is None for thing in things):
            continue
        qualifiers = [_qualifier(thing, things, rng) for thing in things]
        if any(qualifier is None for qualifier in qualifiers):
            continue
        sentences = tuple(
            _sentence(thing, qualifier, config.fixed_wording, rng)
            for thing, qualifier in zip(things, qualifiers, strict=True)
        )
        caption = _global_caption([_fixed(thing, *q) for thing, q in zip(things, qualifiers, strict=True)])
        return Scene(image, tuple(things), sentences, caption, owner)


def _picture_size(long_side: int, rng: np.random.Generator) -> tuple[int, int]:
    short = round(long_side * 3 / 4)
    return ((long_side, long_side), (long_side, short), (short, long_side))[rng.integers(3)]


def _plan(
    config: SceneConfig, width: int, height: int, held_out: bool, rng: np.random.Generator
) -> list[Thing] | None:
    """Things in places that overlap little, or None where they find no room."""
    choices = combinations(config, held_out)
    counts = np.arange(config.objects[0], config.objects[1] + 1)
    weights = config.more_objects ** (counts - counts[0])
    number = int(rng.choice(counts, p=weights / weights.sum()))
    things: list[Thing] = []
    for index in range(number):
        combination = choices[rng.integers(len(choices))]
        side = None
        if index == number - 1 and rng.random() < config.twins:
            combination, side = _twin(things[rng.integers(index)], choices, config, rng)
        box = _room(things, side, number, config.size, width, height, rng)
        if box is None:
            return None
        things.append(Thing(*combination, box))
    order = rng.permutation(number)  # the twin must not always lie on top
    return [things[index] for index in order]


def _twin(
    thing: Thing, choices: tuple[tuple[str, str, str], ...], config: SceneConfig, rng: np.random.Generator
) -> tuple[tuple[str, str, str], float | None]:
    """The thing's combination and side, changed in one attribute or in the side, or not (another place)."""
    what = rng.integers(5)
    if what < 3:
        twins = [
            choice
            for choice in choices
            if sum(a != b for a, b in zip(choice, thing.combination, strict=True)) == 1
            and choice[what] != thing.combination[what]
        ]
        if twins:
            return twins[rng.integers(len(twins))], thing.side
    if what == 3:
        return thing.combination, config.size[0] if thing.side >= LARGE else config.size[1]
    return thing.combination, thing.side


def _room(
    things: list[Thing],
    side: float | None,
    number: int,
    size: tuple[float, float],
    width: int,
    height: int,
    rng: np.random.Generator,
) -> tuple[float, float, float, float] | None:
    """A free box, relative xyxy on whole pixels, of the given mean side or of a log-uniform one."""
    mean = math.sqrt(width * height)
    largest = max(size[0], min(size[1], 0.95 / math.sqrt(number)))
    for _ in range(25):
        pixels = mean * (
            min(side, largest) if side else math.exp(rng.uniform(math.log(size[0]), math.log(largest)))
        )
        stretch = math.exp(rng.uniform(-0.2, 0.2))
        w, h = round(pixels * stretch), round(pixels / stretch)
        if w > width - 2 or h > height - 2:
            continue
        x, y = int(rng.integers(1, width - w)), int(rng.integers(1, height - h))
        box = (x / width, y / height, (x + w) / width, (y + h) / height)
        if all(_overlap(box, thing.box) <= 0.04 for thing in things):
            return box
    return None


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Shared area as a share of the smaller box."""
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _pixels(box: tuple[float, ...], width: int, height: int) -> tuple[int, int, int, int]:
    return round(box[0] * width), round(box[1] * height), round(box[2] * width), round(box[3] * height)


def _seen(thing: Thing, visible: np.ndarray, drawn: int) -> Thing | None:
    """The thing with the tight box of its visible pixels, None where too much of it is hidden."""
    if visible.sum() < 0.85 * drawn:
        return None
    height, width = visible.shape
    columns, rows = np.flatnonzero(visible.any(axis=0)), np.flatnonzero(visible.any(axis=1))
    box = (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)
    return replace(thing, box=tuple(float(side) for side in box))


def size_word(thing: Thing) -> str:
    """ "large", "small" or nothing."""
    return "large" if thing.side >= LARGE else "small" if thing.side <= SMALL else ""


def is_at(thing: Thing, place: str) -> bool:
    """Whether a place phrase is true of a thing: its centre lies in that outer two fifths of the picture."""
    x, y = thing.centre
    words = place.split()
    true = {"left": x < 0.4, "right": x > 0.6, "top": y < 0.4, "bottom": y > 0.6}
    return all(true[word] for word in words if word in true)


def _qualifier(thing: Thing, things: list[Thing], rng: np.random.Generator) -> tuple[str, str] | None:
    """The (size, place) words that the sentence needs to be true of this thing only; None if none will do.

    A word sets two things apart only where they differ clearly: sides by a third, centres by 0.15 of the
    picture.
    """
    alike = [other for other in things if other is not thing and other.combination == thing.combination]
    if not alike:
        return "", ""
    qualifiers = []
    size = size_word(thing)
    if size and all(
        size_word(other) != size and max(thing.side / other.side, other.side / thing.side) >= 4 / 3
        for other in alike
    ):
        qualifiers.append((size, ""))
    qualifiers += [("", place) for place in PLACES if _sets_apart(place, thing, alike)]
    if not qualifiers:
        qualifiers = [("", place) for place in _CORNERS if _sets_apart(place, thing, alike)]
    return qualifiers[rng.integers(len(qualifiers))] if qualifiers else None


def _sets_apart(place: str, thing: Thing, alike: list[Thing]) -> bool:
    def clear(other: Thing) -> bool:
        return max(abs(a - b) for a, b in zip(thing.centre, other.centre, strict=True)) >= 0.15

    return is_at(thing, place) and all(not is_at(other, place) and clear(other) for other in alike)


def _fixed(thing: Thing, size: str, place: str) -> str:
    """The most frequent wording: "large striped red ball on the left", size and place only where needed."""
    return " ".join(word for word in (size, thing.pattern, thing.colour, thing.kind, place) if word)


def _sentence(
    thing: Thing, qualifier: tuple[str, str], fixed_wording: float, rng: np.random.Generator
) -> str:
    size, place = qualifier
    if rng.random() < fixed_wording:
        return _fixed(thing, size, place)
    wording = rng.integers(4)
    if wording == 0:
        words = ("a", size, thing.colour, thing.kind, PATTERN_PHRASES[thing.pattern], place)
    elif wording == 1:
        words = (size, thing.colour, thing.pattern, thing.kind, place)
    elif wording == 2:  # a size that isn't needed
        words = (size or size_word(thing), thing.pattern, thing.colour, thing.kind, place)
    else:  # a place that isn't needed
        true = [candidate for candidate in PLACES if is_at(thing, candidate)]
        more = place or (true[rng.integers(len(true))] if true else "")
        words = (size, thing.pattern, thing.colour, thing.kind, more)
    return " ".join(word for word in words if word)


def _global_caption(phrases: list[str]) -> str:
    with_articles = [f"a {phrase}" for phrase in phrases]
    return (", ".join(with_articles[:-1]) + " and " + with_articles[-1] + ".").capitalize()
