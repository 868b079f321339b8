"""metrics.jsonl: one JSON object a line, appended as the run goes."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
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

    def lines(self) -> list[dict]:
        """All complete lines; one that a crash cut short is left out."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        lines = []
        for line in [*text.splitlines(), *self._waiting.splitlines()]:
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return lines

    def drop(self, unwanted: Callable[[dict], bool]) -> None:
        """Rewrite the file without the lines that `unwanted` names: those past the checkpoint a run goes on from."""
        kept = [line for line in self.lines() if not unwanted(line)]
        write_aside(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._waiting = ""


def write_aside(path: Path, text: str) -> None:
    """Write a file such that, whenever a process is killed, it holds what it held or what it is to hold."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _append(path: Path, text: str) -> None:
    """All of the text on lines of its own, or none of it."""
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        cut = end and os.pread(file.fileno(), 1, end - 1) != b"\n"  # by a crash, in the middle of a line
        data = b"\n" * bool(cut) + text.encode()
        if file.write(data) < len(data):  # a disk that fills up takes a part, and refuses the next
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
