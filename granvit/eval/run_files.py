"""The files of a finished run that its report is drawn from, read and checked: ValueError names a damaged file, and
what is wrong in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from granvit.eval.metrics import Prediction, is_share
from granvit.metrics_log import MetricsLog, read_json

BOX = [float] * 4
PREDICTION = dict.fromkeys(("id", "source", "task", "kind", "caption", "answer"), str) | {"box": BOX}
SUMMARY = {"floors": dict, "runs": list, "mean": {"stages": dict}, "data": {"path": (str, list)}, "versions": dict}
WORDS = {str: "text", int: "a whole number", float: "a finite number", dict: "an object", list: "a list"}
LARGEST = 1e300  # a number that is shown in per cent, too, is finite


def existing(run: Path, path: Path) -> Path:
    """A file that a finished run has. ValueError where it is missing."""
    if not path.is_file():
        raise ValueError(f"{run} is no finished run: {path.relative_to(run)} is missing")
    return path


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl, one after the other, since a long run has a million; one that a crash cut short is
    left out."""
    lines, end = MetricsLog(path).lines(), object()
    for number in count(1):
        if (line := _read(path, lambda: next(lines, end))) is end:
            return
        _check(path, f"line {number}", line, {"stage": str, "step": int})
        yield line


def read_summary(path: Path) -> dict[str, Any]:
    """A summary.json. Figures are finite, shares from 0 to 1, and every run has the states that the mean has."""
    summary = read_json(path)
    _check(path, "it", summary, SUMMARY)
    _check_figures(path, "floors", summary["floors"])
    stages = summary["mean"]["stages"]
    for stage, states in stages.items():
        _check_figures(path, f"mean.stages.{stage}", states)
    for number, run in enumerate(summary["runs"]):
        wanted = {stage: dict.fromkeys(states, dict) for stage, states in stages.items()}
        _check(path, f"runs[{number}]", run, {"stages": wanted})
        for stage, states in run["stages"].items():
            _check_figures(path, f"runs[{number}].stages.{stage}", states)
    return summary


def read_predictions(path: Path) -> dict[str, list[Prediction]]:
    """A predictions.json: {the stage that was over: the answers}."""
    predictions = read_json(path)
    _check(path, "it", predictions, dict)
    for name, several in predictions.items():
        _check(path, name, several, list)
        for number, prediction in enumerate(several):
            unparsed = isinstance(prediction, dict) and prediction.get("predicted_box", ...) is None
            box = {} if unparsed else {"predicted_box": BOX}
            _check(path, f"{name}[{number}]", prediction, PREDICTION | box)
    return predictions


def _read(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (ValueError, RecursionError) as error:  # no JSON, no text, too deep
        raise ValueError(f"{path} is damaged: {error}") from error


def _check(path: Path, name: str, value: Any, shape: Any) -> None:
    """shape: a type, a tuple of types, the shapes of keys that an object has, or those of all values of a list."""
    types = shape if isinstance(shape, tuple) else (shape,) if isinstance(shape, type) else (type(shape),)
    number = types == (float,) and isinstance(value, (int, float)) and abs(value) <= LARGEST
    if not number and (types == (float,) or not isinstance(value, types)):
        wanted = " or ".join(WORDS[kind] for kind in types)
        raise ValueError(f"{path} is damaged: {name} is {value!r:.80}, not {wanted}")
    if isinstance(shape, dict):
        if missing := shape.keys() - value.keys():
            raise ValueError(f"{path} is damaged: {name} has no {min(missing)}")
        for key, inner in shape.items():
            _check(path, f"{name}.{key}", value[key], inner)
    if isinstance(shape, list):
        if len(value) != len(shape):
            raise ValueError(f"{path} is damaged: {name} has {len(value)} values, not {len(shape)}")
        for place, (part, inner) in enumerate(zip(value, shape, strict=True)):
            _check(path, f"{name}[{place}]", part, inner)


def _check_figures(path: Path, name: str, several: Any) -> None:
    """several: {who answers: {metric: its value}}."""
    _check(path, name, several, dict)
    for who, metrics in several.items():
        _check(path, f"{name}.{who}", metrics, dict)
        for metric, value in metrics.items():
            _check(path, f"{name}.{who}.{metric}", value, float)
            if is_share(metric) and not 0 <= value <= 1:
                raise ValueError(f"{path} is damaged: {name}.{who}.{metric} is {value}, not from 0 to 1")
