"""A run's folder: whether it is free or holds this very run, has room, and that one process at a time trains in it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from granvit.errors import byte_size
from granvit.metrics_log import MetricsLog, read_json, write_aside
from granvit.train.changes import differences, refused
from granvit.train.presets import PHASES, TrainConfig, load_config, save_config

if TYPE_CHECKING:
    from granvit.data.loader import GranDataset

log = logging.getLogger(__name__)
LOCK = ".lock"


def same_data(path: Path, splits: dict[str, GranDataset]) -> None:
    """Write down at `path` which data a run is trained on. Raises ValueError where that says something else already;
    conversations may come to it, for a stage sft that was added."""
    ours = {}
    for name, split in splits.items():
        if len(split.parts) == 1:
            ours[name] = {"rows": len(split), "fingerprint": split.fingerprint}
        else:  # in their order: it is the rows'
            parts = zip(split.names, split.parts, strict=True)
            ours[name] = [{"name": own, "rows": len(part), "fingerprint": part.fingerprint} for own, part in parts]
    if not path.exists():
        write_aside(path, json.dumps(ours, indent=1))
        return
    theirs = read_json(path)
    if "chat" not in theirs:
        theirs |= {name: ours[name] for name in ("chat", "chat_test") if name in ours}
        write_aside(path, json.dumps(theirs, indent=1))
    differing = [name for name in ours if ours[name] != theirs.get(name)]
    if differing:
        shown = "; ".join(f"{name}: {theirs.get(name)} there, {ours[name]} now" for name in differing)
        raise ValueError(
            f"the dataset is not the one that the run in {path.parent} began with ({shown}); a run on it "
            "takes another --output"
        )


def config_folder(run: Path) -> Path:
    """Where the configuration of a run lies: in it, or above the folder of a seed or of the control. Raises ValueError
    where there is none."""
    for folder in (run, run.parent, run.parent.parent):
        if (folder / "config.yaml").is_file():
            return folder
    raise ValueError(f"{run} is no run: there is no config.yaml in it")


def config_of(run: Path) -> TrainConfig:
    """The configuration of a run, or of the run that a seed or a control belongs to. Raises ValueError as
    `config_folder` and `load_config` do."""
    return load_config(config_folder(run) / "config.yaml")


def resumes(folder: Path, config: TrainConfig) -> bool:
    """Whether `folder` holds a run that goes on under this configuration (`changes`); False if it is free. Raises
    ValueError where it holds something else."""
    path = folder / "config.yaml"
    if path.exists():
        if lines := refused(folder, load_config(path), config):
            raise ValueError(
                f"{folder} holds a run of another configuration ({'; '.join(lines)}); choose another --output"
            )
        return True
    if folder.exists() and (not folder.is_dir() or any(map(_foreign, folder.rglob("*")))):
        raise ValueError(f"{folder} is not an empty folder and holds no run (no config.yaml); choose another --output")
    return False


def finished(folder: Path, config: TrainConfig) -> bool:
    """Whether `folder` holds this very run, and its report. Raises ValueError where it holds something else."""
    if not resumes(folder, config) or differences(load_config(folder / "config.yaml"), config):
        return False
    return (folder / "report" / "index.html").is_file()


def adopt(folder: Path, config: TrainConfig) -> None:
    """Let the run in `folder` go on under this configuration, which `resumes` takes. What said that it is finished goes
    where there is more to do now: the results are gathered anew, of evaluations that stand in its metrics. So do lines
    of steps that a stage no longer has, whose checkpoint a kill prevented."""
    path = folder / "config.yaml"
    changed = {name.partition(".")[0] for name in differences(load_config(path), config)}
    for pattern in ("report/index.html", "result.json", "seed-*/result.json") if changed else ():
        for file in folder.glob(pattern):
            file.unlink()
    for pattern in ("counts.json", "seed-*/counts.json") if changed else ():
        for file in folder.glob(pattern):
            counts = read_json(file)
            write_aside(file, json.dumps({name: counts[name] for name in counts.keys() - changed}, indent=1))
    for run in (folder, *folder.glob("control"), *folder.glob("seed-*"), *folder.glob("seed-*/control")):
        for stage in (getattr(config, name) for name in changed & set(PHASES)):
            if stage.steps is not None:
                MetricsLog(run / "metrics.jsonl").go_back(stage.name, stage.steps)
    save_config(config, path)


def _foreign(path: Path) -> bool:
    """Whether a path in a folder without config.yaml is none of what a run leaves that was killed before it wrote one.
    """
    return not path.is_dir() and path.name not in (LOCK, "config.yaml.tmp")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process trains in `folder`: two would take each other's checkpoints away. Raises ValueError
    where one does. It may have been killed at any moment: what holds is a lock, and no file that would be left."""
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a child doesn't hold it, as it would flock's
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(
                f"another process trains in {folder} just now; wait for its end, or choose another --output"
            ) from error
        except OSError as error:
            log.warning("%s can't be locked (%s): see that no other process trains there", folder, error)
        yield


def check_room(folder: Path, bytes_needed: int, keep: int) -> None:
    """Before training: that checkpoints of `bytes_needed` can be written to `folder`.

    Raises ValueError where it can't be written to, or where not one more fits. Logs a warning where `keep` of them and
    the one that is being written don't fit.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
        held = sum(path.stat().st_size for path in folder.glob("*/*") if path.is_file())
    except OSError as error:
        raise ValueError(f"{folder} can't be written to ({error}), and the checkpoints belong there") from error
    if free < bytes_needed:
        raise ValueError(f"{folder}: a checkpoint takes {byte_size(bytes_needed)}, and only {byte_size(free)} are free")
    if free + held < bytes_needed * (keep + 1):
        log.warning(
            "%s: keeping %d checkpoints takes %s while another is written, and %s are free or held by checkpoints",
            folder, keep, byte_size(bytes_needed * (keep + 1)), byte_size(free + held),
        )  # fmt: skip
