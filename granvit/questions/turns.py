"""How the turns of a conversation are written: as raw text, or as an LLM's own chat template writes them.

A template is never copied here. tokenizer.apply_chat_template renders conversations of markers, and what it puts
between the markers is what stands between our questions and answers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

log = logging.getLogger(__name__)

MODES = ("auto", "none")
_CHECKED = (("What is in [0.1, 0.25]?", "2 red balls."), ("Where?", "[0.123, 0.9]"), ("Grün?", "ja, <b>"))


@dataclass(frozen=True)
class Turns:
    """What stands around questions and answers.

        start <image>...<image> first QUESTION asked | lead ANSWER trail end | later QUESTION asked | ...

    start: ids before the image's, of beginning and system part. first, later, asked: text around the first question
    and around each later one. lead, trail: white space that belongs to an answer. end: id of the token with which an
    answer ends. strip: whether white space around a question or an answer is taken off.
    """

    start: tuple[int, ...]
    first: str
    later: str
    asked: str
    lead: str
    trail: str
    end: int
    strip: bool

    def question(self, text: str, first: bool = True) -> str:
        """What stands between the image, or the answer before, and the answer."""
        return (self.first if first else self.later) + (text.strip() if self.strip else text) + self.asked

    def answer(self, text: str) -> str:
        """What stands between a question and `end`."""
        return self.lead + (text.strip() if self.strip else text) + self.trail


def raw_turns(tokenizer: Any) -> Turns:
    """Questions between line breaks, after bos where there is one, and answers closed by eos."""
    start = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    return Turns(start, "\n", "\n", "\n", "", "", tokenizer.eos_token_id, strip=False)


def template_turns(tokenizer: Any) -> Turns:
    """The turns of the tokenizer's chat template; the image is the first thing that the user says.

    Raises ValueError where there is no template, where it refuses the conversation of a user and an assistant, or
    writes one that can't be cut into equal turns, and where the pieces' tokens are not those of the whole.
    """
    marks = [f"granvit{number}" for number in range(7)]
    conversation = messages([tuple(marks[i : i + 2]) for i in (1, 3, 5)], marks[0])
    places, text = [], _render(tokenizer, conversation)
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError(f"the chat template writes a message {text.count(mark)} times; accepted is once, as it is")
        places.append(text.index(mark))
    if places != sorted(places):
        raise ValueError("the chat template writes the messages in another order")
    ends = [place + len(mark) for place, mark in zip(places, marks, strict=True)]
    head, *between = [text[a:b] for a, b in zip([0, *ends], [*places, None], strict=True)]
    first, asked, later, *rest = between
    prompt = _render(tokenizer, conversation[:1], add_generation_prompt=True)
    generated = prompt[ends[1] :]
    lead = asked.removeprefix(generated)
    special = {str(token): id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    stops = [(later.index(token), token) for token in special if token in later]
    if rest[:3] != [asked, later, asked] or prompt[: ends[1]] != text[: ends[1]]:
        raise ValueError("the chat template writes the turns of a conversation differently from each other")
    if asked != generated + lead or lead.strip():
        raise ValueError("the chat template opens the answer that it has differently from one that is to be generated")
    if not stops:
        raise ValueError("the chat template ends an answer without a special token, so no answer would end")
    place, token = min(stops, key=lambda stop: (stop[0], -len(stop[1])))
    trail, later = later[:place], later[place + len(token) :]
    if trail.strip():
        raise ValueError(f"the chat template writes {trail!r} behind an answer")
    turns = Turns(tuple(_ids(tokenizer, head)), first, later, generated, lead, trail, special[token], strip=True)
    _check(tokenizer, turns)
    return turns


def end_of_turn(tokenizer: Any, chat_template: str) -> int | None:
    """The id with which answers end by the tokenizer's chat template, None for raw text: with "none", without a
    template, and with a warning where "auto" meets one that can't be used. ValueError for another word."""
    if chat_template not in MODES:
        raise ValueError(f"chat_template: got {chat_template!r}, accepted are 'auto' and 'none'")
    if chat_template == "none" or not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return template_turns(tokenizer).end
    except ValueError as error:
        log.warning("questions are written as raw text: %s (chat_template 'none' says so without a warning)", error)
        return None


def messages(turns: Sequence[tuple[str, str]], image: str = "") -> list[dict[str, str]]:
    """A conversation as apply_chat_template takes it; image: what stands for the image."""
    said = [text for turn in turns for text in turn]
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": (image if i == 0 else "") + text} for i, text in enumerate(said)]


def _render(tokenizer: Any, conversation: Sequence[dict[str, str]], **options: bool) -> str:
    def some_day(form: str) -> str:  # by a template that tells the date, a run would be another one tomorrow
        return datetime(2024, 7, 26).strftime(form)

    try:
        return tokenizer.apply_chat_template(conversation, tokenize=False, strftime_now=some_day, **options)
    except Exception as error:  # a template is a program of its own, and raises what it likes
        raise ValueError(f"the chat template refuses a conversation of a user and an assistant: {error}") from error


def _check(tokenizer: Any, turns: Turns) -> None:
    """Raises ValueError where the pieces of a conversation don't have the tokens of the whole."""
    image = tokenizer.eos_token  # as any special token, it is cut out before the text around it is read
    whole = _ids(tokenizer, _render(tokenizer, messages(_CHECKED, image)))
    pieces = [*turns.start, tokenizer.eos_token_id]
    for number, (prompt, answer) in enumerate(_CHECKED):
        pieces += _ids(tokenizer, turns.question(prompt, number == 0))
        pieces += [*_ids(tokenizer, turns.answer(answer)), turns.end]
    if whole[: len(pieces)] != pieces:
        raise ValueError("the chat template's turns have other tokens each alone than together")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
