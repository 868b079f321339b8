"""Benchmarks' prompts in the words that a GranViT was taught, and its answers in the form that benchmarks read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from granvit.model import GranViTProcessor
from granvit.questions.prompts import DESCRIBE_BOX, FIND_BOX, IMAGE, Box, Question, parse_box, without_markers

Form = Literal["text", "relative", "per mille"]

DESCRIBE_REGION = "Provide a short description for this region."
"""lmms-eval's prompt for a region that is marked in the picture, and named in the row only."""

_FIND = re.compile(re.escape(FIND_BOX.strip()) + r"\s*(.*)", re.DOTALL)
_LOCATE = re.compile(r'Locate every object that matches the description "(.*)" in the image\. Report bbox', re.DOTALL)
_DESCRIBE = re.compile("(.*)".join(map(re.escape, DESCRIBE_BOX)), re.DOTALL)
_REF = re.compile(r"</?ref>")  # with which InternVL's prompts, among others, enclose what is to be found
_LOCATIONS = re.compile(r"<loc_\d+>(?:\s*<loc_\d+>){3}")


@dataclass(frozen=True)
class Wording:
    """A question in the model's words, and the form of its answer: "text": as it is, but for location tokens;
    "relative": the box as [x1, y1, x2, y2] in [0, 1]; "per mille": JSON, [{"bbox_2d": [x1, y1, x2, y2]}] of 1000."""

    question: Question
    form: Form = "text"


def read_prompt(prompt: str, processor: GranViTProcessor) -> Wording:
    """A benchmark's prompt, asked as the model was taught.

    The sentence that asks for a sentence's box, and the one that asks what is in a box, become the processor's own
    questions; several descriptions of an object are asked for as one, separated by commas. Any other prompt stays as it
    is, without the markers of images in it. ValueError for an empty prompt or description, and for a box that can't be
    asked about.
    """
    if match := _LOCATE.search(prompt):
        return Wording(processor.ask_where(", ".join(match[1].split('", "'))), "per mille")
    if match := _FIND.search(prompt):
        return Wording(processor.ask_where(_REF.sub("", match[1])), "relative")
    if match := _DESCRIBE.search(prompt):
        box = parse_box(match[1])
        if box is None:
            raise ValueError(f"prompt: got {prompt!r:.200}, accepted is a box [x1, y1, x2, y2] relative to the image")
        return Wording(processor.ask_what(box))
    text = without_markers(prompt.replace(IMAGE, "")).strip()
    if not text:
        raise ValueError(f"prompt: got {prompt!r}, accepted is a text that is not empty")
    return Wording(Question("", text, ""))


def region_question(bbox: Sequence[float], width: int, height: int, processor: GranViTProcessor) -> Wording:
    """The question what is in a box that is given in COCO's form: x, y, width, height in pixels of a picture of
    width x height. What reaches past the picture's edge is cut off. ValueError where nothing is left, or for another
    number of values."""
    if len(bbox) != 4:
        raise ValueError(f"bbox: got {bbox!r:.60}, accepted are four numbers: x, y, width, height in pixels")
    x, y, w, h = map(float, bbox)
    edges = (x / width, y / height, (x + w) / width, (y + h) / height)
    return Wording(processor.ask_what(tuple(min(max(edge, 0.0), 1.0) for edge in edges)))


def write_answer(answer: str, form: Form, processor: GranViTProcessor) -> str:
    """The model's answer as its benchmark reads it (see Wording). An answer that should hold a box and holds none is
    "[]", which benchmarks count as wrong."""
    if form == "text":
        return _LOCATIONS.sub(lambda match: _located(match[0], processor), answer)
    (box,) = processor.parse_boxes([answer])
    if box is None:
        return "[]"
    if form == "relative":
        return _in_brackets(box)
    return f'[{{"bbox_2d": [{", ".join(f"{round(1000 * edge, 3):g}" for edge in box)}]}}]'


def cut(answer: str, until: str | Sequence[str]) -> str:
    """The answer up to the first of the texts that are to end it."""
    for end in filter(None, [until] if isinstance(until, str) else until):
        answer = answer.partition(end)[0]
    return answer.strip()


def _located(tokens: str, processor: GranViTProcessor) -> str:
    (box,) = processor.parse_boxes([tokens])
    return tokens if box is None else _in_brackets(box)


def _in_brackets(box: Box) -> str:
    """Plain decimals: an exponent, or a point without a digit before it, is not read."""
    return "[" + ", ".join(f"{edge:.6f}" for edge in box) + "]"
