"""Annotations in one JSON file of hundreds of megabytes, an element at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from granvit.data.files import open_file

CHUNK = 1 << 20
MAX_VALUE = 64_000_000
"""One element may have as many characters."""

_SPACE = re.compile(r"[ \t\n\r]*")
_ENDS = tuple(" \t\n\r,:]}")
_DECODER = json.JSONDecoder()


def elements(location: str) -> Iterator[tuple[str, Any]]:
    """(key, element) for the elements of every list that is a value of the file's object, in the file's order; key is
    "" where the file is a list itself. Other values are read over.

    Memory is bounded by the largest element. Raises ValueError that names the file where it is no JSON, has an
    element of more than MAX_VALUE characters or one nested too deeply.
    """
    with open_file(location) as file:
        try:
            yield from _Reader(file).elements()
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)  # a JSONDecodeError adds a position, but one in our window
            raise ValueError(f"{location} is not readable as JSON: {reason}") from None


class _Reader:
    """The standard library's decoder over a window of the file: fast, and a nesting that is too deep is an error to
    it, while ijson 3.6 keeps every path: "[" 200,000 times takes all of a machine's memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at = "", 0

    def elements(self) -> Iterator[tuple[str, Any]]:
        opened = self._next("{[")
        if opened == "[":
            yield from (("", element) for element in self._list())
        elif self._peek() == "}":
            self._next("}")
        else:
            while True:
                key = self._value()
                if not isinstance(key, str):
                    raise ValueError(f"a key must be a string, got {key!r:.40}")
                self._next(":")
                if self._peek() == "[":
                    self._next("[")
                    yield from ((key, element) for element in self._list())
                else:
                    self._value()
                if self._next(",}") == "}":
                    break
        if self._peek():
            raise ValueError("something follows its end")

    def _list(self) -> Iterator[Any]:
        if self._peek() == "]":
            self._next("]")
            return
        while True:
            yield self._value()
            if self._next(",]") == "]":
                return

    def _peek(self) -> str:
        """The next character but white space, "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # it matches "" too
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _next(self, accepted: str) -> str:
        character = self._peek()
        if not character or character not in accepted:
            raise ValueError(f"expected one of {' '.join(accepted)}, got {character or 'its end'!r}")
        self._at += 1
        return character

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError:  # cut off by the window's end, or no JSON: more text tells
                if not self._more():
                    raise
                continue
            length = end - self._at
            if self._text[end : end + 1] in _ENDS or not self._more():  # 12 may be the beginning of 12.3
                self._at += length
                return value

    def _more(self) -> bool:
        """Read on, as much again as is unread, so that a long value costs linear time. False at the end."""
        left = len(self._text) - self._at
        if left > MAX_VALUE:
            raise ValueError(f"an element has more than {MAX_VALUE} characters, or is no JSON")
        chunk = self._file.read(max(CHUNK, left))
        self._text, self._at = self._text[self._at :] + self._decode(chunk, final=not chunk), 0
        return bool(chunk)
