"""Captions from labels: a class's name as what one would say of the one thing in its box."""

from __future__ import annotations

import re
import unicodedata

_LETTERS_SAID_AN = frozenset("AEFHILMNORSX")
"""Letters whose English names begin with a vowel."""
_VOWEL_LETTER_SAID_A = re.compile(
    r"(uni(?![dn]|m[ap])|us[aeu]|ut[aeio]|ub[io]|uga|ufo|uk|ur[aeiu]|eu|ewe|oui|one\b|once|onesie)"
)
"""Beginnings that are written with a vowel and said without: "unicycle", "utensil", "European", "one-way sign"."""
_CONSONANT_SAID_AN = re.compile(r"(hour(?!i)|honou?r|honest|heir|hors$)")
_NUMBER_SAID_AN = re.compile(r"(8|1[18](?!\d))")
_ACRONYMS = {"SUV": "an", "RV": "an", "UFO": "a", "LED": "an", "UTV": "a", "USB": "a", "UAV": "a"}
"""Read by letters, though they could be read as words."""
_NO_ARTICLE_BEFORE = frozenset(
    "a an the some any no each every both two three four five six seven eight nine ten many several another this that "
    "these those my your his her its our their mr mrs ms "
    "der das ein eine le la les un une el il una uno het een".split()
)
"""First words that leave no room for one: articles, of other languages too, numbers, words in an article's place."""
_PLURAL = re.compile(r".*(women|children|people|teeth|feet|geese|mice)|(.*[^aeiouy]|police|fire)?men|.*(?<![su])s")
"""Last words that look like plurals: "skis", "firemen"; not "glass", "bus" or "specimen"."""
_MASS = re.compile(
    r"water|ice|snow|sand|mud|dirt|gravel|grass|vegetation|foliage|terrain|rice|flour|sugar|salt|butter|milk|juice|oil|"
    r"food|seafood|clothing|.*wear|.*ware|furniture|luggage|baggage|equipment|machinery|garbage|trash|litter|rubbish|"
    r"hair|fur|jewell?e?ry|cutlery|traffic|scenery"
)
"""Last words of what is not counted."""


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
    if plain.upper() in _ACRONYMS:
        return _ACRONYMS[plain.upper()]
    if not set(lower) & set("aeiouy") and (plain.isupper() or plain.islower() and len(plain) > 2):  # not "St"
        return by_letters
    return as_word if not plain.isupper() or as_word == by_letters else None


def class_phrase(name: str, articles: bool = True) -> str:
    """A class's name as what one would say of the one thing in its box: "person" is "a person", "potted_plant" is "a
    potted plant", "hourglass" is "an hourglass". What looks like a plural ("skis") or is not counted ("water"), what
    has an article or more than three words ("the man on the left") and what `article` can't know stays as it is.
    Without `articles`, all stay."""
    words = name.replace("_", " ").split()
    phrase = " ".join(words)
    if not articles or not words or len(words) > 3 or words[0].lower().rstrip(".") in _NO_ARTICLE_BEFORE:
        return phrase
    last = re.sub(r"\s*\(.*", "", phrase).rpartition(" ")[2].lower()  # "overalls (clothing)"
    if _PLURAL.fullmatch(last) or _MASS.fullmatch(last):
        return phrase
    first = article(phrase)
    return phrase if first is None else f"{first} {phrase}"
