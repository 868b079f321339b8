"""The trackers of a run: where its metrics go besides metrics.jsonl.

Each gets every line at one step that counts through all stages, the configuration, and pictures. It works in a thread
of its own: a server that hangs holds nothing up, and a tracker that fails is told no more, with a warning. No run ends
because somebody's server does.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from granvit.metrics_log import write_aside
from granvit.train.folder import config_folder
from granvit.train.presets import TrainConfig, faults
from granvit.train.services import PATIENCE, About, Service, make_service

log = logging.getLogger(__name__)

KNOWN = "trackers.json"
"""In a run's folder: {tracker: {folder in it: the id of its run there}}."""
WAITING = 20_000
"""Lines and pictures that wait for a slow tracker; with more it is left out."""


class Trackers:
    """The trackers of a run's folder, or of a seed's or the control's in it. Raises ValueError for a name that leads to
    none, and for a package that is not installed."""

    def __init__(self, names: Sequence[str] = (), folder: Path = Path()) -> None:
        self.folder = folder
        self._services = {name: make_service(name) for name in names}
        self._workers: list[_Worker] = []
        self._starts: dict[str, int] = {}

    def open(self, config: TrainConfig) -> None:
        """Begin, or go on. Raises ValueError where a tracker can't, or KNOWN is damaged; but the run goes on without a
        tracker that it had before, in another seed too."""
        at = 0
        for stage in (config.warmup, *config.stages):
            self._starts[stage.name], at = at, at + stage.steps
        top = config_folder(self.folder)
        place = self.folder.resolve().relative_to(top.resolve()).as_posix()
        group = top.resolve().name
        about = About(config, self.folder, group if place == "." else f"{group}/{place}", group)
        known = _known(top) if self._services else {}
        for name, service in self._services.items():
            worker = _Worker(name, service)
            opening = partial(_open, service, about, name, top, place)
            if name in known:
                worker.tell(opening)
            else:
                try:
                    opening()
                except Exception as error:  # somebody else's code
                    raise ValueError(
                        f"trackers: {name!r} can't begin ({type(error).__name__}: {error}); the same command without "
                        "it goes on"
                    ) from error
            worker.start()
            self._workers.append(worker)

    def write(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        for worker in self._workers:
            worker.tell(partial(worker.service.write, self._step(line["stage"], line["step"]), dict(line)))

    def show(self, stage: str, step: int, name: str, draw: Callable[[], Image.Image]) -> None:
        """A picture as STAGE/NAME; drawn only where there is a tracker."""
        if not self._workers:
            return
        try:
            picture = draw()
        except Exception as error:  # a picture is not worth a run
            log.warning("no picture %s/%s for the trackers: %s: %s", stage, name, type(error).__name__, error)
            return
        for worker in self._workers:
            worker.tell(partial(worker.service.show, self._step(stage, step), f"{stage}/{name}", picture))

    def close(self, done: bool) -> None:
        """Wait for what is still to be sent, for PATIENCE seconds at most. done: as for `Service.close`."""
        for worker in self._workers:
            worker.tell(partial(worker.service.close, done))
            worker.tell(None)
        end = time.monotonic() + PATIENCE
        for worker in self._workers:
            worker.join(max(end - time.monotonic(), 0))
            if worker.is_alive() and not worker.failed:
                log.warning("the tracker %s has not sent everything after %.0f seconds", worker.name, PATIENCE)
        self._workers = []

    def _step(self, stage: str, step: int) -> int:
        return self._starts.get(stage, 0) + step


class _Worker(threading.Thread):
    """Does what a tracker is told, in order, until something of it fails."""

    def __init__(self, name: str, service: Service) -> None:
        super().__init__(name=name, daemon=True)  # one that hangs doesn't keep the process
        self.service, self.failed = service, False
        self._jobs: queue.Queue[Callable[[], object] | None] = queue.Queue(WAITING)

    def tell(self, job: Callable[[], object] | None) -> None:
        """None: there is no more."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._fail(f"it is {WAITING} lines behind")

    def run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self.failed:
                try:
                    job()
                except Exception as error:  # somebody else's code
                    self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        if not self.failed:
            self.failed = True
            log.warning("the tracker %s failed and is told no more: %s", self.name, why)


_recording = threading.Lock()


def _known(top: Path) -> dict[str, dict[str, str]]:
    """Raises ValueError where the file is damaged."""
    from pydantic import TypeAdapter, ValidationError

    path = top / KNOWN
    try:
        return TypeAdapter(dict[str, dict[str, str]]).validate_json(path.read_bytes()) if path.is_file() else {}
    except ValidationError as error:
        raise ValueError(f"{path} is damaged; without it the trackers begin new runs: {faults(error)}") from error


def _open(service: Service, about: About, name: str, top: Path, place: str) -> None:
    identity = service.open(about, _known(top).get(name, {}).get(place))
    with _recording:  # the trackers' threads share the file
        known = _known(top)
        known.setdefault(name, {})[place] = identity
        write_aside(top / KNOWN, json.dumps(known, indent=1))
