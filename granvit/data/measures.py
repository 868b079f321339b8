"""What rules for data and metrics of answers both count by: words, and the overlap of boxes."""

from __future__ import annotations

import re
import unicodedata

import numpy as np

# Scripts without spaces between words, a character with its marks a word: kana, of half a width too, Bopomofo, Chinese
# characters with their extensions, Thai, Lao, Burmese, Khmer, Tai Le, New Tai Lue, Tai Tham, Balinese, Javanese.
_UNSPACED = (
    r"\u3040-\u312f\uff66-\uff9f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    r"\u0e01-\u0e4f\u0e81-\u0ecf\u0edc-\u0edf\u1000-\u103f\u1050-\u109f\uaa60-\uaa7f\u1780-\u17d3"
    r"\u1950-\u197f\u1980-\u19c9\u1a20-\u1a7f\u1b00-\u1b4b\ua980-\ua9c0"
)
# Accents, vowel signs and joiners, which belong to their letter and are no \w: else "कि" and "का" were one word.
_MARKS = "".join(mark for mark in map(chr, range(0x300, 0x11FFF)) if unicodedata.category(mark) in ("Mn", "Mc"))
_MARKS += "\u200c\u200d"
_WORD = re.compile(rf"(?!\W)[{_UNSPACED}][{_MARKS}\u0e33\u0eb3]*|[^\W_{_UNSPACED}](?:[^\W_{_UNSPACED}]|[{_MARKS}])*")
# Soft hyphens, byte order marks, zero-width spaces, marks of direction and variation; not the joiners, which some
# scripts spell with.
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe0e\ufe0f\ufeff]")


def nfc(text: str) -> str:
    """The text in Unicode's form NFC without what can't be seen, white space as single spaces: in it, letters that look
    the same are the same."""
    return " ".join(unicodedata.normalize("NFC", _INVISIBLE.sub("", text)).split())


def words(text: str) -> list[str]:
    """Lower-case words of any script without punctuation, as `nfc` writes them."""
    return _WORD.findall(nfc(text.lower()))


def tokens(text: str) -> list[str]:
    """What ROUGE-L, CIDEr and the exact match compare: the words; of text without any (an arrow, "!"), the signs."""
    return words(text) or list(nfc(text).replace(" ", ""))


def normalised(text: str) -> str:
    """A caption as repetitions are counted: its words, or what stands in place of words ("?!")."""
    return " ".join(words(text)) or nfc(text)


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of xyxy boxes [..., 4], broadcast to [...]; inverted and empty boxes give 0."""
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    corner = np.maximum(first[..., :2], second[..., :2])
    sides = np.clip(np.minimum(first[..., 2:], second[..., 2:]) - corner, 0, None)
    intersection = sides[..., 0] * sides[..., 1]
    areas = [np.clip(b[..., 2:] - b[..., :2], 0, None).prod(axis=-1) for b in (first, second)]
    union = areas[0] + areas[1] - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
