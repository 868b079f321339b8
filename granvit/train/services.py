"""What a run can tell its metrics to: TensorBoard, Weights & Biases, MLflow, or a function of one's own."""

from __future__ import annotations

import hashlib
import importlib
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from granvit.train.changes import flat
from granvit.train.presets import TrainConfig

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds that the end of a run waits for what is still to be sent."""
PROJECT = "granvit"
"""The project or experiment, where WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says no other."""


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run. config: its stages' steps are counted. name: the folder's, with the seed's or
    the control's; group: the first part of it."""

    config: TrainConfig
    folder: Path
    name: str
    group: str


class Service(Protocol):
    """A tracker. `open` comes first, all else from a thread of its own. What is raised leaves it out of the rest."""

    def open(self, about: About, known: str | None) -> str:
        """Begin a run, or go on with the one of the id `known`; its id."""

    def write(self, step: int, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl, at the step that counts through all stages."""

    def show(self, step: int, name: str, picture: Image.Image) -> None: ...

    def close(self, done: bool) -> None:
        """done: whether the run has come to its end, else it was stopped or has failed."""


def _scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line as STAGE/NAME, those of an evaluation as STAGE_EVALUATION/NAME."""
    of = line["stage"] + (f"_{line['evaluation']}" if "evaluation" in line else "")
    return {
        f"{of}/{name}": float(value)
        for name, value in line.items()
        if name not in ("step", "seconds") and isinstance(value, (int, float)) and math.isfinite(value)
    }


class _TensorBoard:
    """Event files in FOLDER/tensorboard."""

    def __init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make, self._writer = SummaryWriter, None

    def open(self, about: About, known: str | None) -> str:
        self._about, self._new = about, known is None
        return "tensorboard"

    def _at(self, step: int) -> Any:
        """The writer, whose first step is this one: what a run had written past the checkpoint is taken away."""
        if self._writer is None:
            self._writer = self._make(str(self._about.folder / "tensorboard"), purge_step=step)
            if self._new:
                rows = (f"| {name} | {value} |" for name, value in flat(asdict(self._about.config)))
                self._writer.add_text("config", "\n".join(["| field | value |", "|---|---|", *rows]), 0)
        return self._writer

    def write(self, step: int, line: dict[str, Any]) -> None:
        evaluation = "evaluation" in line
        writer = self._at(step + evaluation)  # the step that is evaluated may be written already
        for name, value in _scalars(line).items():
            writer.add_scalar(name, value, step)
        if evaluation or step % 100 == 0:
            writer.flush()

    def show(self, step: int, name: str, picture: Image.Image) -> None:
        self._at(step + 1).add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self, done: bool) -> None:
        if self._writer is not None:
            self._writer.close()


class _Wandb:
    """A run of Weights & Biases. Its own variables say where to: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, ..."""

    def __init__(self) -> None:
        import wandb

        self._wandb = wandb

    def open(self, about: About, known: str | None) -> str:
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=about.name, group=about.group, id=known,
            resume="allow" if known else None, dir=os.environ.get("WANDB_DIR", about.folder),
            config=asdict(about.config), reinit="create_new",  # the run's and the control's are open at once
            settings=self._wandb.Settings(finish_timeout=PATIENCE),
        )  # fmt: skip
        # Not wandb's own step, which can't go back to a checkpoint's.
        self._run.define_metric("global_step", hidden=True)
        self._run.define_metric("*", step_metric="global_step")
        return self._run.id

    def write(self, step: int, line: dict[str, Any]) -> None:
        self._run.log({"global_step": step, **_scalars(line)})

    def show(self, step: int, name: str, picture: Image.Image) -> None:
        self._run.log({"global_step": step, name: self._wandb.Image(picture)})

    def close(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


def _mlflow_name(name: str) -> str:
    """The name as MLflow accepts it: a relative path of letters, digits and "_.- :", at most 250 in all. Sources of
    data stand in names. What is changed bears its hash, so that different names stay different."""

    def accepted(part: str) -> str:
        plain = "none" if part in ("", ".", "..") else re.sub(r"[^\w.\- :]", "_", part)
        return plain if plain == part else f"{plain}-{_hash(part)}"

    path = "/".join(map(accepted, name.split("/")))
    return path if len(path) <= 250 else f"{path[:120]}-{_hash(path)}-{path[-120:]}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


class _MLflow:
    """A run of MLflow. Its own variables say where: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ..."""

    def __init__(self) -> None:
        import mlflow

        self._mlflow, self._client = mlflow, mlflow.MlflowClient()

    def open(self, about: About, known: str | None) -> str:
        self._id = known if known and self._reopened(known) else self._begin(about)
        return self._id

    def _reopened(self, known: str) -> bool:
        try:
            self._client.update_run(known, status="RUNNING")
        except self._mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            log.warning("mlflow: %s has no run %s; a new one begins", self._mlflow.get_tracking_uri(), known)
            return False
        return True

    def _begin(self, about: About) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run = self._client.create_run(number, run_name=about.name, tags={"group": about.group}).info.run_id
        values = [self._mlflow.entities.Param(key, str(value)) for key, value in flat(asdict(about.config))]
        for first in range(0, len(values), 100):  # the most that a request may have
            self._client.log_batch(run, params=values[first : first + 100])
        return run

    def write(self, step: int, line: dict[str, Any]) -> None:
        now, metric = int(time.time() * 1000), self._mlflow.entities.Metric
        metrics = [metric(_mlflow_name(name), value, now, step) for name, value in _scalars(line).items()]
        self._client.log_batch(self._id, metrics=metrics)

    def show(self, step: int, name: str, picture: Image.Image) -> None:
        self._client.log_image(self._id, picture, key=name, step=step)

    def close(self, done: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if done else "KILLED")


class _Function:
    """Somebody's function of (config, folder), which returns what takes each line."""

    def __init__(self, make: Callable[[TrainConfig, Path], Callable[[dict[str, Any]], object]]) -> None:
        self._make = make

    def open(self, about: About, known: str | None) -> str:
        self._track = self._make(about.config, about.folder)
        if not callable(self._track):
            raise TypeError(f"it gave {type(self._track).__name__}, which can't be called with a line")
        return ""

    def write(self, step: int, line: dict[str, Any]) -> None:
        self._track(line)

    def show(self, step: int, name: str, picture: Image.Image) -> None:
        pass

    def close(self, done: bool) -> None:
        pass


SERVICES: dict[str, Callable[[], Service]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _MLflow}


def make_service(name: str) -> Service:
    """The tracker of this name, not yet opened. Raises ValueError where the name leads to none, or its package is not
    installed."""
    if name in SERVICES:
        try:
            return SERVICES[name]()
        except ImportError as error:
            raise ValueError(f"trackers: {name} is not installed (pip install 'granvit[{name}]'): {error}") from error
    module, separator, function = name.partition(":")
    try:
        if not separator:
            raise ValueError("it has no colon")
        return _Function(getattr(importlib.import_module(module), function))
    except Exception as error:  # somebody else's code
        raise ValueError(
            f"trackers: {name!r} can't be made ({type(error).__name__}: {error}); accepted: {', '.join(SERVICES)}, or "
            "module:function for a function of (config, folder) that returns what takes each line"
        ) from error
