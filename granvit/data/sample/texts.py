"""Texts for generated pages, split so that no text of test is ever in train."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

_ADJECTIVES = (
    "amber ancient autumn bitter blue bright broken calm careful central clear cold common curious daily "
    "dark deep distant double early eastern empty exact famous final first fresh gentle golden grand green "
    "heavy hidden honest hollow inner late light little local lonely loud lower main minor modern narrow "
    "native new noble northern old open outer pale plain polar private proper public quick quiet rapid "
    "rare red royal rural secret sharp short silent silver simple slow small soft solar southern spare "
    "steady still strong sudden sweet tall tender thin tidal upper urban vast warm western white wide wild "
    "winter wise wooden young"
).split()
_NOUNS = (
    "account answer apple archive arrow autumn bakery balance bank basket bell bicycle board boat book "
    "border bottle branch bread bridge butter button camera canal candle castle chapter cheese cherry "
    "church circle city clock cloud coast coffee column copper corner cotton county court cousin crane "
    "crown desert dinner doctor dragon drawer engine evening factory farmer feather ferry field finger "
    "fire flower forest fountain garden gate glass glove grain guest hammer harbour harvest hill honey "
    "horse hotel house island journey kettle kitchen ladder lamp lantern letter library market meadow "
    "message minute mirror money moon morning mountain museum needle number office onion orange orchard "
    "paper parcel pencil pepper piano picture planet platform pocket potato powder prince quarter question "
    "rabbit railway record report ribbon river road rocket roof school season shadow shelter shoulder "
    "signal silver spoon spring square stable station statue stone storm street student summer supper "
    "surface table teacher theatre thread ticket timber tomato tower traffic tunnel valley vessel village "
    "violin wagon water weather wheel window winter wonder workshop yellow"
).split()
_VERBS = (
    "answers asks balances begins breaks builds buys calls carries changes closes covers crosses draws "
    "drives enters fills finds follows gathers gives guards helps holds joins keeps knows leaves lifts "
    "likes makes marks measures meets moves needs offers opens orders owns paints passes plants prints "
    "pulls reaches reads repairs returns saves sees sells sends shows signs sorts starts stops takes tells "
    "turns visits warms washes watches writes"
).split()
_LINKS = "a and at before behind by for from in near of on over the this to under with without your".split()
_MONTHS = "January February March April May June July August September October November December".split()

TEST_SHARE = 0.15


def text_split(text: str) -> str:
    """Which split a text belongs to: "train" or "test", whatever its letters' case and its spaces are."""
    key = " ".join(text.casefold().split())
    return "test" if zlib.crc32(key.encode()) % 1000 < 1000 * TEST_SHARE else "train"


def draw_text(
    make: Callable[[np.random.Generator], str], split: str, taken: set[str], rng: np.random.Generator
) -> str:
    """A text of `make` that belongs to `split` and is not in `taken`, which it is added to."""
    while True:
        text = make(rng)
        if text_split(text) == split and text not in taken:
            taken.add(text)
            return text


def _one(words: list[str], rng: np.random.Generator) -> str:
    return words[rng.integers(len(words))]


def sentence(rng: np.random.Generator) -> str:
    """2 to 6 words of running text."""
    words = []
    for _ in range(rng.integers(1, 3)):
        words += [(_LINKS, _VERBS)[rng.integers(2)], _ADJECTIVES, _NOUNS]
    chosen = [_one(pool, rng) for pool in words[rng.integers(2) :]]
    return " ".join(chosen) + ("", "", ",", ".")[rng.integers(4)]


def heading(rng: np.random.Generator) -> str:
    """Two or three words, capitalised or in capitals."""
    text = " ".join(_one(pool, rng) for pool in (_ADJECTIVES, _NOUNS, _NOUNS)[: rng.integers(2, 4)])
    return text.upper() if rng.random() < 0.5 else text.title()


def sign(rng: np.random.Generator) -> str:
    """One or two words as on a sign, sometimes with a number."""
    text = _one(_NOUNS, rng) if rng.random() < 0.5 else f"{_one(_ADJECTIVES, rng)} {_one(_NOUNS, rng)}"
    return (f"{text} {rng.integers(1, 100)}" if rng.random() < 0.3 else text).upper()


def price(rng: np.random.Generator) -> str:
    return f"{rng.integers(0, 200)}.{rng.integers(0, 100):02d}"


def item(rng: np.random.Generator) -> str:
    """A line of a receipt."""
    return f"{_one(_NOUNS, rng).capitalize()} x{rng.integers(1, 10)}  {price(rng)}"


def date(rng: np.random.Generator) -> str:
    return f"{rng.integers(1, 29)} {_one(_MONTHS, rng)} {rng.integers(1950, 2051)}"


def cell(rng: np.random.Generator) -> str:
    """A number or a word of a table."""
    draw = rng.integers(3)
    if draw == 0:
        return f"{rng.integers(100, 10000)}"
    return price(rng) if draw == 1 else _one(_NOUNS, rng).capitalize()
