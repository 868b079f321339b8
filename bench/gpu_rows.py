"""The rows that a benchmark on a GPU keeps in a file of its own, saved as they are measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Rows:
    """path: where the file is, asked when it is needed, as only a GPU has a name for it; None keeps nothing (a dry
    run). key: names of what tells a row from another; a row of equal values takes the old one's place."""

    path: Callable[[], Path | None]
    key: tuple[str, ...]

    def of(self, row: dict) -> tuple:
        return tuple(row[name] for name in self.key)

    def kept(self) -> list[dict]:
        path = self.path()
        return [] if path is None or not path.exists() else json.loads(path.read_text())

    def save(self, row: dict) -> None:
        if (path := self.path()) is not None:
            rows = [old for old in self.kept() if self.of(old) != self.of(row)] + [row]
            path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
