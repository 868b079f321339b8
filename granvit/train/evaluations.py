"""What a run measures before and after its stages: answers about the test splits, and the encoder's features."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from granvit.data.loader import GranDataset, spread
from granvit.eval.answers import draw_answers
from granvit.eval.chat import score_chat
from granvit.eval.evaluation import evaluate, readable
from granvit.metrics_log import MetricsLog, read_json, write_aside
from granvit.model import GranViT
from granvit.train.console import RunConsole
from granvit.train.distill import feature_moments, feature_statistics
from granvit.train.loop import autocast
from granvit.train.parallel.compiling import eager
from granvit.train.parallel.in_step import compute, in_step
from granvit.train.presets import TrainConfig
from granvit.train.stages import Stage
from granvit.train.trackers import Trackers
from granvit.world import World

if TYPE_CHECKING:
    from granvit.model import GranViTProcessor

WHEN = {
    "before": "before {}",
    "after": "after {}",
    "other_image": "after {}, shown another image",
    "text_only": "after {}, shown no image",
}
"""What the console calls an evaluation of a stage."""


class Evaluations:
    """The evaluations of one seed of a run. Each is done once: it is read from metrics.jsonl if it is there.

    All ranks call the methods together. root: what computes with the model where it is in pieces, as in `compute`.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        processor: GranViTProcessor,
        splits: Mapping[str, GranDataset],
        world: World,
        device: torch.device,
        console: RunConsole,
        metrics: MetricsLog,
        trackers: Trackers,
    ) -> None:
        self.config, self.folder, self.processor, self.splits = config, folder, processor, splits
        self.world, self.device, self.console = world, device, console
        self.metrics, self.trackers = metrics, trackers
        self._rows: list[int] | None = None

    def rows(self) -> list[int]:
        """The test images that are asked about, looked for once."""
        if self._rows is None:
            test = self.splits["test"]
            self._rows = readable(test, spread(len(test), self.config.data.eval_images), self.world)
        return self._rows

    def measure(
        self,
        model: GranViT,
        root: nn.Module | None,
        stage: Stage,
        step: int,
        when: str,
        blind: str | None = None,
        known: dict[str, float] | None = None,
        title: str | None = None,
    ) -> dict[str, float]:
        """Metrics of the model as it is, over the test splits, written to metrics.jsonl (or read from it). known: those
        of the regions, if they are. title: what the run's console calls it."""
        title = title or WHEN[when].format(stage.name)
        metrics = self.world.first(lambda: self._written(stage.name, step, when))
        if metrics is None:
            began = time.perf_counter()
            metrics, predictions = self._ask(model, root, stage, blind, known, title)
            seconds = time.perf_counter() - began
            if self.world.leads:
                if predictions is not None:  # first, as what has its line is not done again
                    names = {"before": "before", "after": stage.name}
                    self._keep_predictions(names.get(when, f"{stage.name} {when}"), predictions)
                    if when == "after":
                        test = self.splits["test"]
                        self.trackers.show(stage.name, step, "answers", lambda: draw_answers(predictions, test))
                self.metrics.write(stage=stage.name, step=step, evaluation=when, **metrics, seconds=seconds)
        if metrics != known:  # else they were said at the end of the stage before
            self.console.evaluated(title, metrics)
        return metrics

    def _ask(
        self, model: GranViT, root: nn.Module | None, stage: Stage, blind: str | None, known: dict[str, float] | None,
        title: str,
    ) -> tuple[dict[str, float], list[dict] | None]:  # fmt: skip
        """The metrics, and the answers about regions, if they were asked for."""
        limit, world = self.config.data.eval_images, self.world
        metrics, predictions = dict(known or {}), None
        with autocast(self.config, self.device), eager():
            if known is None and "test" in self.splits:
                rows = self.rows()
                with self.console.evaluation(title) as answered:
                    evaluated = in_step(root, model, world, lambda world: evaluate(
                        model, self.processor, self.splits["test"], blind=blind, world=world, progress=answered,
                        rows=rows,
                    ))  # fmt: skip
                metrics, predictions = evaluated.metrics, evaluated.predictions
            if stage.name == self.config.sft.name and "chat_test" in self.splits and blind != "text":
                with self.console.evaluation(f"{title}, conversations"):
                    metrics |= in_step(root, model, world, lambda world: score_chat(
                        model, self.processor, self.splits["chat_test"], self.config.data.capacity, blind, limit, world,
                    ))  # fmt: skip
        return metrics, predictions

    def _written(self, stage: str, step: int, when: str) -> dict[str, float] | None:
        """The metrics of the evaluation that metrics.jsonl holds under these names, or None."""
        names = {"stage": stage, "step": step, "evaluation": when}
        for line in self.metrics.evaluations():
            if all(line.get(name) == value for name, value in names.items()):
                return {name: value for name, value in line.items() if name not in names and name != "seconds"}
        return None

    def _keep_predictions(self, name: str, predictions: list[dict]) -> None:
        """name: the stage that has just ended, or "before" the first one; with how the model was blinded."""
        path = self.folder / "report" / "predictions.json"
        path.parent.mkdir(exist_ok=True)
        kept = read_json(path) if path.exists() else {}
        write_aside(path, json.dumps(kept | {name: predictions}, indent=1))

    @torch.no_grad()
    def features(self, model: GranViT, root: nn.Module | None, when: str) -> dict[str, float]:
        """Effective rank and standard deviation of the encoder's features of test images; when: a suffix of their
        names."""
        model.eval()
        test = self.splits["test"]
        samples = [test[i] for i in range(min(64, len(test)))]
        images = [s.image.to(self.device) for s in samples if s is not None and s.image.numel()]
        with eager():
            features, _ = compute(root, lambda: model.encode(images))
        statistics = feature_statistics(feature_moments(features))
        return {f"{name}_{when}": float(value) for name, value in statistics.items()}
