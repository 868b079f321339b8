"""metrics.jsonl: one JSON object a line, appended as the run goes, and whatever else wants to know."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Tracker = Callable[[dict[str, Any]], None]
"""Takes each line of metrics.jsonl as it is written: stage, step, and numbers by name (see docs/training.md)."""


class MetricsLog:
    """The file, and the trackers that get a copy of each line. A tracker that raises is left out from then on, with a
    warning: no run ends because somebody's server does. Nor does it for a full disk, as far as this file goes: its
    lines wait for the next one that can be written."""

    def __init__(self, path: Path, trackers: Sequence[Tracker] = ()) -> None:
        self.path, self.trackers = path, list(trackers)
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
        for tracker in list(self.trackers):
            try:
                tracker(values)
            except Exception as error:
                log.warning("a tracker failed and is told no more: %s: %s", type(error).__name__, error)
                self.trackers.remove(tracker)

    def lines(self) -> list[dict]:
        """All complete lines; one that a crash cut short is left out."""
        text = self.path.read_text() if self.path.exists() else ""
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
    aside.write_text(text)
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


def make_trackers(names: Sequence[str], config: Any, folder: Path) -> list[Tracker]:
    """The trackers of these names: "tensorboard", or "module:function" for function(config, folder) -> Tracker, any
    importable one. config: the run's TrainConfig. Raises ValueError for a name that leads to none."""
    return [_make(name, config, folder) for name in names]


def _make(name: str, config: Any, folder: Path) -> Tracker:
    if name == "tensorboard":
        return _tensorboard(folder)
    module, separator, function = name.partition(":")
    try:
        if not separator:
            raise ValueError("it has no colon")
        made = getattr(importlib.import_module(module), function)(config, folder)
    except Exception as error:  # somebody else's code
        raise ValueError(
            f"trackers: {name!r} can't be made ({type(error).__name__}: {error}); accepted: tensorboard, or "
            "module:function for a function of (config, folder) that returns what takes each line"
        ) from error
    if not callable(made):
        raise ValueError(f"trackers: {name!r} gave {type(made).__name__}, which can't be called with a line")
    return made


def _tensorboard(folder: Path) -> Tracker:
    """Every number of a line as STAGE/NAME at its step, in folder/tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"trackers: tensorboard is not installed (pip install tensorboard): {error}") from error
    writer = None

    def track(line: dict[str, Any]) -> None:
        nonlocal writer
        writer = writer or SummaryWriter(str(folder / "tensorboard"))  # it makes the folder, which only a run may
        of = line["stage"] + (f"_{line['evaluation']}" if "evaluation" in line else "")
        for name, value in line.items():
            if name not in ("step", "seconds") and isinstance(value, (int, float)):
                writer.add_scalar(f"{of}/{name}", value, line["step"])
        if "evaluation" in line or line["step"] % 100 == 0:
            writer.flush()

    return track
