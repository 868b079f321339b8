"""Captions from labels: a class's name as what one would say of the one thing in its box."""

from __future__ import annotations

import re
import unicodedata

_LETTERS_SAID_AN = frozenset("AEFHILMNORSX")
"""Letters whose English names begin with a vowel."""
_VOWEL_LETTER_SAID_A = re.compile(r"(uni(?![dmn])|us[aeu]|ut[eio]|ub[io]|ufo|uk|ur[aei]|eu|ewe|one\b|once|onesie)")
"""Beginnings that are written with a vowel and said without: "unicycle", "utensil", "European", "one-way sign"."""
_CONSONANT_SAID_AN = re.compile(r"(hour|hono|honest|heir)")
_NUMBER_SAID_AN = re.compile(r"(8|1[18](?!\d))")
_ACRONYMS = {"SUV": "an", "UFO": "a", "LED": "an", "UTV": "a"}
"""Read by letters, though they could be read as words."""


def article(phrase: str) -> str | None:
    """What English says before the phrase, "a" or "an"; None where that can't be known: another script, a number or a
    sign first, capitals that may be read as a word or letter by letter ("NATO", "MRI")."""
    word = re.split(r"[\s-]", phrase, maxsplit=1)[0]
    plain = "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))
    latin = all("LATIN" in unicodedata.name(c, "") for c in phrase if c.isalpha())
    if not latin or not re.match("[A-Za-z0-9]", plain) or phrase.split()[0].isdigit():
        return None
    if plain[0].isdigit():
        return "an" if _NUMBER_SAID_AN.match(plain) else "a"
    by_letters = "an" if plain[0].upper() in _LETTERS_SAID_AN else "a"
    if len(plain) == 1:  # "T-shirt", "X-ray"
        return by_letters
    lower = plain.lower()
    if lower[0] in "aeiou":
        as_word = "a" if _VOWEL_LETTER_SAID_A.match(phrase.lower() if lower == "one" else lower) else "an"
    else:
        as_word = "an" if _CONSONANT_SAID_AN.match(lower) else "a"
    if not plain.isupper():
        return as_word
    if plain in _ACRONYMS:
        return _ACRONYMS[plain]
    if not set(lower) & set("aeiouy"):
        return by_letters
    return as_word if as_word == by_letters else None


def class_phrase(name: str, articles: bool = True) -> str:
    """A class's name as what one would say of the one thing in its box: "person" is "a person", "potted_plant" is "a
    potted plant", "hourglass" is "an hourglass"; what looks like a plural ("skis"), what has an article or more than
    three words ("the man on the left") and what `article` can't know stays as it is. Without `articles`, all stay."""
    words = name.replace("_", " ").split()
    phrase = " ".join(words)
    if not articles or not words or len(words) > 3 or words[0].lower() in ("a", "an", "the"):
        return phrase
    if words[-1].endswith("s") and not words[-1].endswith(("ss", "us")):
        return phrase
    first = article(phrase)
    return phrase if first is None else f"{first} {phrase}"
