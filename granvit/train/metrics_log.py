"""metrics.jsonl: one JSON object a line, appended as the run goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path


class MetricsLog:
    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **values: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")

    def lines(self) -> list[dict]:
        """All complete lines; a last one that a crash cut short is left out."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def drop(self, unwanted: Callable[[dict], bool]) -> None:
        """Rewrite the file without the lines that `unwanted` names: those past the checkpoint a run goes on from."""
        kept = [line for line in self.lines() if not unwanted(line)]
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        aside.replace(self.path)
