"""The checkpoints in a run's `checkpoints/`: how a new one appears there whole, and which of the old ones stay."""

from __future__ import annotations

import logging
import math
import re
import shutil
from contextlib import suppress
from pathlib import Path

from granvit.train.manifest import read_manifest, sync

log = logging.getLogger(__name__)

NAME = re.compile(r"(?P<phase>[a-z][a-z0-9_]*)-(?P<step>\d{7,})(?P<final>-final)?")
LOSS = "held_out_loss"
"""The value of a checkpoint by which it is the best of its phase: the lowest."""


def checkpoints_of(folder: Path, phase: str) -> list[Path]:
    """The checkpoints of `phase` in a run's `checkpoints/`, the newest last."""
    checkpoints = []
    for path in folder.iterdir():
        match = NAME.fullmatch(path.name)
        if match and match["phase"] == phase and path.is_dir() and not path.is_symlink():
            checkpoints.append((int(match["step"]), match["final"] is not None, path))
    return [path for _, _, path in sorted(checkpoints)]


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(NAME.fullmatch(checkpoint.name)["step"])


def best_of(checkpoints: list[Path]) -> Path | None:
    """The checkpoint with the lowest LOSS among its values; None where none has one."""
    losses = {}
    for path in checkpoints:
        with suppress(ValueError):  # a damaged one is not the best
            losses[path] = read_manifest(path).values.get(LOSS, math.inf)
    best = min(losses, key=losses.get, default=None)
    return best if losses.get(best, math.inf) < math.inf else None


def aside(folder: Path, name: str) -> Path:
    """Where the checkpoint `name` is written, and removed: a crash leaves nothing there that is taken for one."""
    return folder / f".{name}.tmp"


def publish(folder: Path, name: str) -> None:
    """Give the checkpoint that was written aside its name."""
    path, old = folder / name, folder / f".{name}.old"
    if path.exists():  # saved twice (then it is as good), or damaged, so that the run has gone back
        path.rename(old)
    try:
        aside(folder, name).rename(path)
    finally:
        restore(folder)
    sync(folder)
    shutil.rmtree(old, ignore_errors=True)


def restore(folder: Path) -> None:
    """Put back what a crash left between the two renames of `publish`."""
    for old in folder.glob(".*.old"):
        if not (folder / old.stem[1:]).exists():
            old.rename(folder / old.stem[1:])


def clear(folder: Path) -> None:
    """Remove what crashes left."""
    for path in folder.iterdir():
        if path.name.startswith(".") and path.suffix in (".tmp", ".old") and NAME.fullmatch(path.stem[1:]):
            shutil.rmtree(path)


def prune(folder: Path, name: str, keep: int, keep_every: int) -> None:
    """Remove what is not to be kept now that the checkpoint `name` is there, and let the link PHASE-best lead to the
    best of its phase. What fails is logged."""
    new, step = NAME.fullmatch(name), step_of(folder / name)
    steps = {path: step_of(path) for path in checkpoints_of(folder, new["phase"])}
    # a final one is no longer the last where the stage was given more steps
    running = [path for path in steps if not path.name.endswith("-final") or steps[path] < step]
    # later ones: the run could not go on from them and went back, so they are none of its past
    past = [path for path in running if steps[path] <= step]
    kept = {path for path in past if keep_every and steps[path] % keep_every == 0}
    kept |= set() if new["final"] else set(past[-keep:])
    if best := best_of([path for path in steps if path in past or path not in running]):
        kept.add(best)
        _link(folder / f"{new['phase']}-best", best.name)
    for path in running:
        if path not in kept:
            try:
                shutil.rmtree(path.rename(aside(folder, path.name)))
            except OSError as error:
                log.warning("the checkpoint %s, no longer needed, could not be removed: %s", path, error)


def _link(link: Path, target: str) -> None:
    """Let `link` lead to `target`, another name in its folder; at every moment it leads to this or the one before."""
    new = link.with_name(f".{link.name}")
    try:
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        if link.is_dir() and not link.is_symlink():  # somebody copied the run, and what the link led to with it
            shutil.rmtree(link)
        new.replace(link)
    except OSError as error:
        log.warning("%s can't become a link to %s, the best checkpoint so far: %s", link, target, error)
