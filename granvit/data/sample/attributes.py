"""The words by which sentences of generated scenes name attributes of objects, for `granvit.eval.metrics`."""

from __future__ import annotations

from granvit.data.sample.scenes import PATTERN_PHRASES
from granvit.data.sample.sprites import COLOURS, KINDS, PATTERNS

_SCENES = {
    "colour": {colour: colour for colour in COLOURS},
    "pattern": {pattern: pattern for pattern in PATTERNS}
    | {phrase.split()[-1]: pattern for pattern, phrase in PATTERN_PHRASES.items()},
    "kind": {kind: kind for kind in KINDS},
    "size": {size: size for size in ("large", "small")},
}

ATTRIBUTES = {"scenes": _SCENES, "scenes-heldout": _SCENES}
"""{source: {attribute: {word: what it names}}}. Each of the things named is one of the words."""
