"""A whole run: data, model, warm-up, both stages, their evaluations and controls, export and report."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing.connection
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from granvit.data.loader import GranDataset
from granvit.data.prompts import BBOX2CAPTION, CAPTION2BBOX
from granvit.data.sample import cached_sample
from granvit.eval import evaluate
from granvit.eval.report import write_report
from granvit.train.batches import batches
from granvit.train.build import build
from granvit.train.checkpoint import Checkpoints, load
from granvit.train.distill import feature_statistics
from granvit.train.loop import Phase, train_phase
from granvit.train.metrics_log import MetricsLog
from granvit.train.presets import TrainConfig, load_config, save_config
from granvit.train.stages import Stage
from granvit.train.step import stage_loss
from granvit.train.summary import write_summary
from granvit.train.warmup import warmup_loss

log = logging.getLogger(__name__)
console = Console()
TASKS = (BBOX2CAPTION, CAPTION2BBOX)


def train(config: TrainConfig) -> Path:
    """Run what `config` says, or go on with it. Returns the run's folder; report/index.html in it is there to look at.

    Raises ValueError where the folder holds another run, the dataset is none, or a name in the configuration is wrong.
    """
    folder = Path(config.output)
    began = time.perf_counter()
    started = resumes(folder, config)
    if config.data.path == "":
        raise ValueError(f"data.path: the preset {config.preset} has no data of its own; give --data.path DIR")
    if config.data.path is None:
        with console.status("building the sample set (once)"):
            data = str(cached_sample(config.data.images, seed=0))
    else:
        data = config.data.path
    for split in ("train", "test"):
        GranDataset(data, split)
    if not started:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=data))
    folders = {folder: config}
    if config.seeds > 1:
        seeds = range(config.seed, config.seed + config.seeds)
        folders = {
            folder / f"seed-{seed}": dataclasses.replace(
                config, seed=seed, seeds=1, output=str(folder / f"seed-{seed}")
            )
            for seed in seeds
        }
    results = [Run(one, path).finish() for path, one in folders.items()]
    write_summary(folder, config, results, time.perf_counter() - began)
    console.print(f"report: [bold]{write_report(folder)}[/bold]")
    return folder


def resumes(folder: Path, config: TrainConfig) -> bool:
    """Whether `folder` holds this very run; False if it is free. Raises ValueError where it holds something else."""
    path = folder / "config.yaml"
    if path.exists():
        ours, theirs = dataclasses.asdict(config), dataclasses.asdict(load_config(path))
        differing = [name for name in ours if name != "output" and ours[name] != theirs[name]]
        if differing:
            shown = "; ".join(f"{name}: {theirs[name]} there, {ours[name]} now" for name in differing)
            raise ValueError(f"{folder} holds a run of another configuration ({shown}); choose another --output")
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder and holds no run (no config.yaml); choose another --output")
    return False


class Run:
    """One seed of a run: its model, its data, and the phases that are done or still to do.

    `folder` holds checkpoints/, metrics.jsonl, export/ and result.json. A phase that ended, and an evaluation that was
    written down, is not done again.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        folder.mkdir(parents=True, exist_ok=True)
        if config.threads:
            torch.set_num_threads(config.threads)
        name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(name)
        budget = config.data.fault_budget
        self.data = GranDataset(config.data.path, "train", budget)
        self.test = GranDataset(config.data.path, "test", budget)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints)
        self.metrics = MetricsLog(folder / "metrics.jsonl")
        torch.manual_seed(config.seed)
        self.model, self.processor = build(config.model, self.data)
        self.model.to(self.device)
        self.random_encoder = {name: p.detach().clone() for name, p in self.model.encoder.state_dict().items()}

    def finish(self) -> dict:
        """Everything that is still to do. Returns the run's result: seed, stages, features, seconds, peak memory."""
        config, path = self.config, self.folder / "result.json"
        if path.exists():
            return json.loads(path.read_text())
        began = time.perf_counter()
        pretrain, adapt = config.pretrain, config.adapt
        if config.warmup.steps:
            self.phase(config.warmup)
        control = self._start_control() if config.control else None
        stages: dict[str, dict] = {pretrain.name: {"before": self.evaluation(pretrain.name, 0, "before")}}
        features = {pretrain.name: self._features("before")}
        self.phase(pretrain)
        features[pretrain.name] |= self._features("after")
        for when, blind in (("after", None), ("other_image", "other_image"), ("text_only", "text")):
            stages[pretrain.name][when] = self.evaluation(pretrain.name, pretrain.steps, when, blind)
        stages[adapt.name] = {"before": stages[pretrain.name]["after"]}
        self.phase(adapt)
        for when, blind in (("after", None), ("other_image", "other_image"), ("text_only", "text")):
            stages[adapt.name][when] = self.evaluation(adapt.name, adapt.steps, when, blind)
        self._export()
        if control is not None:
            control.join()
            if control.exitcode != 0:
                raise RuntimeError(f"the control run ended with exit code {control.exitcode}; its log is above")
            stages[adapt.name]["control"] = json.loads((self.folder / "control" / "result.json").read_text())
        peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        result = {
            "seed": config.seed,
            "stages": stages,
            "features": features,
            "seconds": time.perf_counter() - began,
            "peak_memory_mb": peak / 1024,
            "faults": {"train": self.data.faults.summary(), "test": self.test.faults.summary()},
        }
        path.write_text(json.dumps(result, indent=1))
        return result

    def phase(self, stage: Stage, progress: bool = True) -> None:
        """Train `stage` to its end, from its newest checkpoint if there is one, with a progress bar or without."""
        phase = Phase(self.model, stage, self.checkpoints, self.metrics, self.config.distill.alpha)
        if phase.resume(self.device):
            return
        self.metrics.drop(lambda line: line["stage"] == stage.name and line["step"] > phase.step)
        read: Callable = self.data.annotations if stage is self.config.warmup else self.data.__getitem__
        stream = batches(
            read, len(self.data), stage, self.config.seed, self.processor, self.config.data, phase.step + 1
        )

        def loss_of(step: int, batch):
            if stage is self.config.warmup:
                generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
                return warmup_loss(self.model, self.processor, batch, generator)
            return stage_loss(self.model, phase.teacher, batch, stage, self.config.distill)

        train_phase(
            phase, stream, loss_of, autocast=self._autocast(), device=self.device,
            checkpoint_every=self.config.checkpoint_every, log_every=self.config.log_every,
            progress=progress,
        )  # fmt: skip

    def evaluation(self, stage: str, step: int, when: str, blind: str | None = None) -> dict[str, float]:
        """Metrics of the model as it is, over the test split, written to metrics.jsonl (or read from it)."""
        for line in self.metrics.lines():
            if line["stage"] == stage and line.get("evaluation") == when:
                return line["metrics"]
        limit = self.config.data.eval_images
        with self._autocast():
            found = evaluate(self.model, self.processor, self.test, TASKS, blind=blind, limit=limit)
        self.metrics.write(stage=stage, step=step, evaluation=when, metrics=found.metrics, **found.metrics)
        if when == "after":
            self._keep_predictions(stage, found.predictions)
        return found.metrics

    def _keep_predictions(self, stage: str, predictions: list[dict]) -> None:
        path = self.folder / "report" / "predictions.json"
        path.parent.mkdir(exist_ok=True)
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(kept | {stage: predictions}, indent=1))

    @torch.no_grad()
    def _features(self, when: str) -> dict[str, float]:
        """Effective rank and standard deviation of the encoder's features of test images."""
        self.model.eval()
        samples = [self.test[i] for i in range(min(64, len(self.test)))]
        features, _ = self.model.encode([s.image.to(self.device) for s in samples if s is not None])
        return {f"{name}_{when}": value for name, value in feature_statistics(features).items()}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _start_control(self) -> multiprocessing.Process:
        """The control runs beside stage 1, in a process of its own: a smoke run leaves a core free."""
        process = multiprocessing.get_context("spawn").Process(target=run_control, args=(self.config,))
        process.start()
        return process

    def _export(self) -> None:
        folder = self.folder / "export"
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        self.model.encoder.save_siglip2(folder / "encoder")


def run_control(config: TrainConfig) -> None:
    """Stage 2 alone, from the warmed-up LLM and an encoder with random weights: what stage 1 has to beat."""
    logging.basicConfig(level=logging.WARNING)
    _end_with_parent()
    folder = Path(config.output)
    path = folder / "control" / "result.json"
    if path.exists():
        return
    run = Run(config, folder / "control")
    warm = Checkpoints(folder / "checkpoints", config.keep_checkpoints).final("warmup")
    if warm is not None:
        run.model.load_state_dict(load(warm, run.device)["model"])
    run.phase(config.adapt, progress=False)  # its bar would be drawn over stage 1's
    path.write_text(json.dumps(run.evaluation(config.adapt.name, config.adapt.steps, "after"), indent=1))


def _end_with_parent() -> None:
    """A parent that is killed can't end its child; a second control, started when the run goes on, must be alone."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
