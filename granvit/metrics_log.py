"""metrics.jsonl: one JSON object a line, appended as the run goes."""

from __future__ import annotations

import errno
import json
import logging
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class MetricsLog:
    """The file. listeners: called with each line as it is written. No run ends for a full disk, as far as this file
    goes: its lines wait for the next one that can be written."""

    def __init__(self, path: Path, *listeners: Callable[[dict[str, Any]], object]) -> None:
        self.path, self.listeners = path, list(listeners)
        self._waiting = ""
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **values: object) -> None:
        late = bool(self._waiting)
        self._waiting += json.dumps(values, allow_nan=False) + "\n"
        try:
            _append(self.path, self._waiting)
            self._waiting = ""
        except OSError as error:
            if not late:
                log.warning("%s can't be written to, its lines wait until it can: %s", self.path, error)
        for listener in self.listeners:
            listener(values)

    def lines(self, containing: str = "") -> Iterator[dict]:
        """All complete lines, or those in whose text this stands; one that a crash cut short is left out."""
        with self.path.open(encoding="utf-8", errors="replace") if self.path.exists() else nullcontext(()) as file:
            for text in chain(file, self._waiting.splitlines()):
                if containing in text:
                    with suppress(ValueError):
                        yield json.loads(text)

    def evaluations(self) -> Iterator[dict]:
        """The lines of evaluations. Of a million lines of steps none is parsed."""
        return (line for line in self.lines('"evaluation"') if "evaluation" in line)

    def go_back(self, stage: str, step: int) -> None:
        """Take out the lines of a stage past the step of the checkpoint that it goes on from. Its steps rise from line
        to line, so only those past it are parsed, from the last."""
        if not self.path.exists() or not self.path.stat().st_size:
            return
        name, tail = f'"stage": {json.dumps(stage)}'.encode(), []
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = len(content)
            while (place := content.rfind(name, 0, end)) >= 0:
                first, past = content.rfind(b"\n", 0, place) + 1, content.find(b"\n", place) + 1 or len(content)
                with suppress(ValueError):  # what a crash cut short is taken out
                    if json.loads(content[first:past])["step"] <= step:
                        break
                tail.append(content[past:end])  # of other stages, after it
                end = first
            if any(tail):
                write_aside(self.path, content[:end] + b"".join(reversed(tail)))
        if not any(tail) and tail:
            os.truncate(self.path, end)


def read_json(path: Path) -> Any:
    """What a file of JSON holds. Raises ValueError that names it where it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # no JSON, no text, too deep
        raise ValueError(f"{path} is damaged: {error}") from error


def write_aside(path: Path, content: str | bytes) -> None:
    """Write a file such that, whenever a process is killed, it holds what it held or what it is to hold. Raises OSError
    that names it."""
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        aside.replace(path)
    except OSError as error:  # of a full disk the system does not say which file it was
        raise OSError(error.errno, error.strerror, str(path)) from error


def _append(path: Path, text: str) -> None:
    """All of the text on lines of its own, or none of it."""
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":  # a crash cut the last line short
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                end = content.rfind(b"\n") + 1
            file.truncate(end)
        data = text.encode()
        if file.write(data) < len(data):  # a disk that fills up takes a part, and refuses the next
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
