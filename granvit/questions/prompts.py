"""Questions and answers about a sample, in the paper's sentences, and boxes as text or as location tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .schema import Sample

Box = tuple[float, float, float, float]

GLOBAL_CAPTION = "global_caption"
BBOX2CAPTION = "bbox2caption"
CAPTION2BBOX = "caption2bbox"
CHAT = "chat"
TASKS = (GLOBAL_CAPTION, BBOX2CAPTION, CAPTION2BBOX, CHAT)

REGION = "<region>"  # in a prompt: region tokens of the next asked box stand here
IMAGE = "<image>"

DESCRIBE_IMAGE = "Describe in detail what is shown in the image in one paragraph"
DESCRIBE_BOX = (
    "Describe the content contained within the normalized bounding box coordinates ",
    " in no more than 10 words.",
)
FIND_BOX = "Please provide the bounding box coordinate of the region this sentence describes: "

_NUMBER = r"\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*"
_TEXT_BOX = re.compile(r"\[" + ",".join([_NUMBER] * 4) + r"\]")
_BINS_BOX = re.compile(r"\s*".join([r"<loc_(\d+)>"] * 4))
# Ours, and the usual names of special tokens: which ones an LLM has, only its tokenizer knows.
_MARKER = re.compile(r"<(image|region|loc_\d+|/?s|bos|eos|pad|unk|mask|cls|sep|\|[^<>]*\|)>")


@dataclass(frozen=True)
class Question:
    """One question about one image, with its answer; or a conversation, whose first turn they are.

    boxes: the boxes (relative xyxy) whose `<region>` markers stand in the prompt, in their order.
    region: index into the sample's regions of the region that is asked about or for; None: the whole image.
    later: (prompt, answer) of each further turn, which sees those before it.
    """

    task: str
    prompt: str
    answer: str
    boxes: tuple[Box, ...] = ()
    region: int | None = None
    later: tuple[tuple[str, str], ...] = ()

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """(prompt, answer) of every turn."""
        return ((self.prompt, self.answer), *self.later)


def questions(
    sample: Sample,
    tasks: Iterable[str],
    box_style: str = "text",
    box_format: str = "text",
    bins: int = 1000,
    shared: bool = False,
) -> list[Question]:
    """Every question of the given tasks that the sample can answer, task by task in the order given.

    global_caption asks once where there is a caption; bbox2caption asks of each region; caption2bbox asks for each
    region, without `shared` only where no other region of the image has its caption (nothing can be learnt from a
    sentence that fits two boxes); chat takes each of the sample's conversations, all of its turns. box_style: "text" |
    "tokens" | "both"; box_format: "text" | "bins", of `bins` an axis (see GranViTConfig).
    Raises ValueError for a task it does not know.
    """
    asked: list[Question] = []
    for task in tasks:
        if task == GLOBAL_CAPTION:
            if sample.caption:
                asked.append(Question(task, DESCRIBE_IMAGE, without_markers(sample.caption)))
        elif task == BBOX2CAPTION:
            for index, region in enumerate(sample.regions):
                asked.append(describe_box(region.box, region.caption, index, box_style, box_format, bins))
        elif task == CAPTION2BBOX:
            counts = Counter(region.caption for region in sample.regions)
            for index, region in enumerate(sample.regions):
                if shared or counts[region.caption] == 1:
                    asked.append(find_box(region.caption, format_box(region.box, box_format, bins), index))
        elif task == CHAT:
            for conversation in sample.conversations:
                (prompt, answer), *later = (tuple(map(without_markers, turn)) for turn in conversation)
                asked.append(Question(task, prompt, answer, later=tuple(later)))
        else:
            raise ValueError(f"tasks: got {task!r}, accepted are {', '.join(map(repr, TASKS))}")
    return asked


def describe_box(
    box: Box,
    answer: str = "",
    region: int | None = None,
    box_style: str = "text",
    box_format: str = "text",
    bins=1000,
) -> Question:
    """The bbox2caption question about a box, named in the prompt by coordinates, by region tokens, or by both.

    The form must be the model's: a processor's `ask_what` gives it, and a processor asks in no other.
    """
    if box_style not in ("text", "tokens", "both"):
        raise ValueError(f"box_style: got {box_style!r}, accepted are 'text', 'tokens' and 'both'")
    names = [] if box_style == "tokens" else [format_box(box, box_format, bins)]
    asked: tuple[Box, ...] = ()
    if box_style != "text":
        names.append(REGION)
        asked = (tuple(box),)
    prompt = " ".join(names).join(DESCRIBE_BOX)
    return Question(BBOX2CAPTION, prompt, without_markers(answer), asked, region)


def find_box(sentence: str, answer: str = "", region: int | None = None) -> Question:
    """The caption2bbox question for a sentence; answer: its box as format_box writes it."""
    return Question(CAPTION2BBOX, FIND_BOX + without_markers(sentence), answer, (), region)


def form_fault(question: Question, box_style: str, box_format: str, bins: int) -> str | None:
    """How the form in which a bbox2caption question names its box differs from the one that a model was taught (None:
    it does not). The model would answer, only badly, and nobody would notice.

    Only describe_box's own wording has a form: any other prompt is free text, and no fault.
    """
    if not question.prompt.startswith(DESCRIBE_BOX[0]):
        return None
    forms = {REGION} if REGION in question.prompt else set()
    if _TEXT_BOX.search(question.prompt):
        forms.add("text")
    if match := _BINS_BOX.search(question.prompt):
        forms.add("bins" if max(map(int, match.groups())) < bins else "more bins")
    taught = {"text": {box_format}, "tokens": {REGION}, "both": {box_format, REGION}}[box_style]
    if forms == taught:
        return None
    words = {REGION: "region tokens", "text": "coordinates as text", "bins": "location tokens",
             "more bins": "location tokens of more bins"}  # fmt: skip
    named, wanted = (" and ".join(words[form] for form in sorted(names)) for names in (forms, taught))
    return f"names its box by {named}, but the model was taught {wanted}"


def without_markers(text: str) -> str:
    """The text with the angle brackets removed of anything that a tokenizer would read as a marker or, by its
    usual name, as a special token: a caption is data, and "<region>" in it must not ask for a box, nor "<eos>"
    end it."""
    text = _MARKER.sub(r"\1", text)
    # "<<region>>" has become a marker only now. Another pass could make the next one; no marker lacks its "<".
    return text.replace("<", "") if _MARKER.search(text) else text


def format_box(box: Sequence[float], box_format: str = "text", bins: int = 1000) -> str:
    """A relative xyxy box as "[0.123, 0.456, 0.789, 0.950]" or as four location tokens "<loc_3><loc_14>...".

    A coordinate falls into bin floor(x * bins), 1 into the last one. What `parse_box` reads from it has an area and
    holds the box's centre, however thin the box is.
    """
    if box_format == "text":
        (x1, x2), (y1, y2) = (_thousandths(box[axis], box[axis + 2]) for axis in (0, 1))
        return "[" + ", ".join(f"{value / 1000:.3f}" for value in (x1, y1, x2, y2)) + "]"
    if box_format == "bins":
        return "".join(f"<loc_{min(int(value * bins), bins - 1)}>" for value in box)
    raise ValueError(f"box_format: got {box_format!r}, accepted are 'text' and 'bins'")


def _thousandths(low: float, high: float) -> tuple[int, int]:
    """Two edges rounded to thousandths; where they fall together, those of the thousandth that holds their centre."""
    first, last = (round(1000 * round(float(edge), 3)) for edge in (low, high))
    if first < last:
        return first, last
    cell = min(int((low + high) * 500), 999)
    return cell, cell + 1


def parse_box(text: str, box_format: str = "text", bins: int = 1000) -> Box | None:
    """The first box in the text, relative xyxy; None where there is none, or none of positive area within the
    image.

    Bins are read as their centres; where both edges of an axis share a bin, the box is that whole bin.
    """
    if box_format == "text":
        match = _TEXT_BOX.search(text)
        if match is None:
            return None
        x1, y1, x2, y2 = map(float, match.groups())
    elif box_format == "bins":
        match = _BINS_BOX.search(text)
        if match is None:
            return None
        places = [int(group) for group in match.groups()]
        if max(places) >= bins:
            return None
        (x1, x2), (y1, y2) = (_edges(places[axis], places[axis + 2], bins) for axis in (0, 1))
    else:
        raise ValueError(f"box_format: got {box_format!r}, accepted are 'text' and 'bins'")
    box = (x1, y1, x2, y2)
    return box if box_fault(box) is None else None


def _edges(low: int, high: int, bins: int) -> tuple[float, float]:
    if low == high:
        return low / bins, (low + 1) / bins
    return (low + 0.5) / bins, (high + 0.5) / bins


def box_fault(box: Sequence[float]) -> str | None:
    """What is wrong with a relative xyxy box (None: nothing): it must be finite, in [0, 1] and of positive
    area."""
    if len(box) != 4:
        return f"has {len(box)} numbers, not 4"
    x1, y1, x2, y2 = box
    if not all(map(isfinite, box)):
        return "is not finite"
    if min(box) < 0 or max(box) > 1:
        pixels = ": pixels? Divide x by the image's width and y by its height" if max(box) > 2 else ""
        return f"reaches outside the image ([0, 1]){pixels}"
    if x1 >= x2 or y1 >= y2:
        return "has no area (x1 < x2 and y1 < y2 are needed)"
    return None


def check_box(box: Sequence[float]) -> None:
    """ValueError for a box that can't be asked about (see box_fault)."""
    if fault := box_fault(box):
        raise ValueError(f"box {list(box)} {fault}; it takes x1 y1 x2 y2 relative to the image, in [0, 1]")


def check_sentence(sentence: str) -> None:
    """ValueError for a sentence that nothing can be found by: an empty one, or no string."""
    if not isinstance(sentence, str):
        raise ValueError(f"sentence: got {sentence!r:.60}, accepted is a string: what to find in the picture")
    if not sentence.strip():
        raise ValueError("the sentence to find is empty; describe one thing in the picture")
