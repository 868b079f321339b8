"""What rules for data and metrics of answers both count by: words, and the overlap of boxes."""

from __future__ import annotations

import re
import unicodedata

import numpy as np

# Scripts without spaces between words, a character a word: kana and Chinese characters with their extensions.
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Accents and vowel signs, which belong to their letter and are no \w: else "कि" and "का" were one word.
_MARKS = "".join(mark for mark in map(chr, range(0x300, 0x11FFF)) if unicodedata.category(mark) in ("Mn", "Mc"))
_WORD = re.compile(rf"(?!\W)[{_CJK}]|[^\W_{_CJK}](?:[^\W_{_CJK}]|[{_MARKS}])*")


def words(text: str) -> list[str]:
    """Lower-case words of any script without punctuation, which ROUGE-L, CIDEr and the exact match compare."""
    return _WORD.findall(text.lower())


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of xyxy boxes [..., 4], broadcast to [...]; inverted and empty boxes give 0."""
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    corner = np.maximum(first[..., :2], second[..., :2])
    sides = np.clip(np.minimum(first[..., 2:], second[..., 2:]) - corner, 0, None)
    intersection = sides[..., 0] * sides[..., 1]
    areas = [np.clip(b[..., 2:] - b[..., :2], 0, None).prod(axis=-1) for b in (first, second)]
    union = areas[0] + areas[1] - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
