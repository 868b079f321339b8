"""A whole run: data, model, warm-up, both stages, their evaluations and controls, export and report."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from granvit.data.loader import GranDataset
from granvit.data.prompts import BBOX2CAPTION, CAPTION2BBOX
from granvit.data.sample import cached_sample
from granvit.eval import evaluate
from granvit.eval.report import write_report
from granvit.machine import commit, device_name
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
QUESTION_ROOM = 64  # tokens that a packed sequence has beside its image, at least: a question and its answer


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
        _need_regions(GranDataset(data, split, config.data.fault_budget))
    found = dataclasses.replace(config, data=dataclasses.replace(config.data, path=data))
    folders = {folder: found}
    if config.seeds > 1:
        seeds = range(config.seed, config.seed + config.seeds)
        folders = {
            folder / f"seed-{seed}": dataclasses.replace(found, seed=seed, seeds=1, output=str(folder / f"seed-{seed}"))
            for seed in seeds
        }
    results = []
    for path, one in folders.items():
        run = Run(one, path)
        if not started:  # only now: a setting that can't be built must not claim the folder
            save_config(config, folder / "config.yaml")
            started = True
        results.append(run.finish())
    write_summary(folder, found, results, max(time.perf_counter() - began, sum(one["seconds"] for one in results)))
    console.print(f"report: [bold]{write_report(folder)}[/bold]")
    return folder


# Where and how fast a run goes, not what comes out of it: these may differ when it is gone on with.
FREE = {"output", "device", "threads", "checkpoint_every", "keep_checkpoints", "log_every", "data.workers"}


def resumes(folder: Path, config: TrainConfig) -> bool:
    """Whether `folder` holds this very run; False if it is free. Raises ValueError where it holds something else."""
    path = folder / "config.yaml"
    if path.exists():
        ours, theirs = (dict(_flat(dataclasses.asdict(one))) for one in (config, load_config(path)))
        differing = [name for name in ours if name not in FREE and ours[name] != theirs[name]]
        if differing:
            shown = "; ".join(f"{name}: {theirs[name]} there, {ours[name]} now" for name in differing)
            raise ValueError(f"{folder} holds a run of another configuration ({shown}); choose another --output")
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder and holds no run (no config.yaml); choose another --output")
    return False


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """("stage.field", value) of every field of nested configurations."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _need_regions(data: GranDataset) -> None:
    if not any(sample is not None and sample.regions for sample in map(data.annotations, range(len(data)))):
        raise ValueError(f"{data.path}: its split {data.split} has no region, so nothing can be asked about one")


def _device(name: str) -> torch.device:
    """The device of that name, or for "auto" CUDA's if there is one. Raises ValueError where it can't be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} can't be used here ({str(error).splitlines()[0]})") from error


class Run:
    """One seed of a run: its model, its data, and the phases that are done or still to do.

    `folder` holds checkpoints/, metrics.jsonl, export/ and result.json. A phase that ended, and an evaluation that was
    written down, is not done again.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = _device(config.device)
        budget = config.data.fault_budget
        self.data = GranDataset(config.data.path, "train", budget)
        self.test = GranDataset(config.data.path, "test", budget)
        torch.manual_seed(config.seed)
        self.model, self.processor = build(config.model, self.data)
        self._need_room()
        self.model.to(self.device)
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints)
        self.metrics = MetricsLog(folder / "metrics.jsonl")

    def _need_room(self) -> None:
        """Raises ValueError where a packed sequence can't hold the largest image and a short question."""
        most, merged = self.model.config.max_image_tokens, self.model.config.pixel_shuffle
        largest = max(-(-h // merged) * -(-(most // h) // merged) for h in range(1, most + 1))
        least = len(self.processor.image_part(largest)) + QUESTION_ROOM
        if self.config.data.capacity < least:
            raise ValueError(
                f"data.capacity is {self.config.data.capacity}; an image takes up to {largest} tokens and its "
                f"questions some more, so it is at least {least}"
            )

    def finish(self) -> dict:
        """Everything that is still to do. Returns the run's result: seed, stages, features, peak memory, what it was
        measured with, and the seconds that training and evaluations took, of all the pieces it was run in."""
        config, path = self.config, self.folder / "result.json"
        if path.exists():
            return json.loads(path.read_text())
        pretrain, adapt = config.pretrain, config.adapt
        if config.warmup.steps:
            self.phase(config.warmup)
        stages: dict[str, dict] = {pretrain.name: {"before": self.evaluation(pretrain.name, 0, "before")}}
        features = {pretrain.name: self._features("before")}
        self.phase(pretrain)
        features[pretrain.name] |= self._features("after")
        for when, blind in (("after", None), ("other_image", "other_image"), ("text_only", "text")):
            stages[pretrain.name][when] = self.evaluation(pretrain.name, pretrain.steps, when, blind)
        stages[adapt.name] = {"before": stages[pretrain.name]["after"]}
        if self._written(adapt.name, 0, "before") is None:
            before = stages[adapt.name]["before"]
            self.metrics.write(stage=adapt.name, step=0, evaluation="before", **before, seconds=0.0)
        self.phase(adapt)
        for when, blind in (("after", None), ("other_image", "other_image"), ("text_only", "text")):
            stages[adapt.name][when] = self.evaluation(adapt.name, adapt.steps, when, blind)
        self._export()
        if config.control:
            stages[adapt.name]["control"] = run_control(config, self.folder)
        logs = [self.metrics] + ([MetricsLog(self.folder / "control" / "metrics.jsonl")] if config.control else [])
        peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        result = {
            "seed": config.seed,
            "stages": stages,
            "features": features,
            "seconds": sum(line["seconds"] for log_file in logs for line in log_file.lines()),
            "peak_memory_mb": peak / 1024,
            "commit": commit(),
            "device": device_name(self.device.type),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "datasets")},
            "faults": {"train": self.data.faults.summary(), "test": self.test.faults.summary()},
        }
        path.write_text(json.dumps(result, indent=1))
        return result

    def phase(self, stage: Stage, title: str | None = None) -> None:
        """Train `stage` to its end, from its newest checkpoint if there is one. title: of its progress bar."""
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
            title=title or stage.name,
        )  # fmt: skip

    def evaluation(self, stage: str, step: int, when: str, blind: str | None = None) -> dict[str, float]:
        """Metrics of the model as it is, over the test split, written to metrics.jsonl (or read from it)."""
        known = self._written(stage, step, when)
        if known is not None:
            return known
        began, limit = time.perf_counter(), self.config.data.eval_images
        with self._autocast():
            found = evaluate(self.model, self.processor, self.test, TASKS, blind=blind, limit=limit)
        seconds = time.perf_counter() - began
        self.metrics.write(stage=stage, step=step, evaluation=when, **found.metrics, seconds=seconds)
        if when == "after":
            self._keep_predictions(stage, found.predictions)
        return found.metrics

    def _written(self, stage: str, step: int, when: str) -> dict[str, float] | None:
        """The metrics of the evaluation that metrics.jsonl holds under these names, or None."""
        names = {"stage": stage, "step": step, "evaluation": when}
        for line in self.metrics.lines():
            if all(line.get(name) == value for name, value in names.items()):
                return {name: value for name, value in line.items() if name not in names and name != "seconds"}
        return None

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

    def _export(self) -> None:
        folder = self.folder / "export"
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        self.model.encoder.save_siglip2(folder / "encoder")


def run_control(config: TrainConfig, folder: Path) -> dict[str, float]:
    """Metrics of stage 2 alone, from the warm LLM of the run in `folder` and an encoder with random weights: what
    stage 1 has to beat. It lies in folder/control, and goes on where it was as the run does."""
    run = Run(config, folder / "control")
    warm = Checkpoints(folder / "checkpoints", config.keep_checkpoints).final("warmup")
    if warm is not None:
        run.model.load_state_dict(load(warm, run.device)["model"])
    run.phase(config.adapt, title="control")
    return run.evaluation(config.adapt.name, config.adapt.steps, "after")
