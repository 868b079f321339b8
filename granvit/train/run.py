"""A whole run: data, model, warm-up, both stages, their evaluations and controls, export and report."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from granvit.data.batches import PackLoader
from granvit.data.collate import Batch, collate
from granvit.data.loader import GranDataset
from granvit.data.mixture import described
from granvit.eval.answers import rendered
from granvit.eval.curves import draw_curves, panels
from granvit.eval.report import write_report
from granvit.lora import adapters, save_adapters
from granvit.machine import commit, device_name
from granvit.metrics_log import MetricsLog, read_json, write_aside
from granvit.model import GranViT
from granvit.model.formats import save
from granvit.questions.schema import Region, Sample
from granvit.train.build import hollow, read, settle
from granvit.train.card import write_card
from granvit.train.checkpoint import Checkpoints, load
from granvit.train.console import CONTROL, RunConsole, closing_words, hush
from granvit.train.counting import check_ranks, counted, needs_counting, order_arguments
from granvit.train.evaluations import Evaluations
from granvit.train.folder import adopt, check_room, locked, resumes, same_data
from granvit.train.guard import Termination, termination
from granvit.train.heldout import HeldOut
from granvit.train.loop import Phase, train_phase
from granvit.train.parallel.distributed import distribute, gathered
from granvit.train.parallel.sharing import choose, device_memory
from granvit.train.presets import TrainConfig, load_config, save_config
from granvit.train.retention import step_of
from granvit.train.splits import open_splits, with_data
from granvit.train.stages import Stage
from granvit.train.step import Share, stage_loss, warmup_loss
from granvit.train.summary import known_floors, write_summary
from granvit.train.tensors import beginning, model_tensors
from granvit.train.trackers import Trackers
from granvit.world import World, start, stop

COUNTING = "counting the sequences that the data fills (once)"
QUESTION_ROOM = 64  # tokens that a packed sequence has beside its image, at least: a question and its answer


def train(config: TrainConfig) -> Path:
    """Run what `config` says, or go on with it. Returns the run's folder; report/index.html in it is there to look at.

    Under torchrun every rank calls this. Raises ValueError where the folder holds another run or is another process's
    just now, the dataset is none or has changed since, or a name in the configuration is wrong; Terminated (a
    SystemExit of guard.STOPPED or INTERRUPTED) when SIGTERM or Ctrl-C came; Failed (NotFinite is one) as `train_phase`
    does, and on the ranks that did not fail themselves.
    """
    hush()
    world, device = start(config.device)
    try:
        with termination() as request, ExitStack() as held:
            return _train(config, world, device, request, held)
    finally:
        stop()


def _train(config: TrainConfig, world: World, device: torch.device, request: Termination, held: ExitStack) -> Path:
    folder = Path(config.output)
    began = time.perf_counter()
    started = world.first(lambda: resumes(folder, config))
    if not config.stages:
        raise ValueError("no stage has steps: align.steps, pretrain.steps, adapt.steps and sft.steps are 0")
    if config.data.path == "":
        raise ValueError(f"data.path: the preset {config.preset} has no data of its own; give --data.path DIR")
    console = RunConsole(config, world.leads)
    drawing = f"the sample set: {config.data.images:,} pictures, drawn once and kept"
    with console.waiting(drawing) if config.data.path is None else nullcontext():
        complete = world.first(lambda: with_data(config))
    splits = open_splits(complete)
    for name in ("train", "chat"):
        for line in described(splits[name], config.data.weights) if name in splits else ():
            console.say(f"{name}: {line}")
    folders = {folder: complete}
    if config.seeds > 1:
        seeds = range(config.seed, config.seed + config.seeds)
        folders = {
            path: dataclasses.replace(complete, seed=seed, seeds=1, output=str(path))
            for seed, path in ((seed, folder / f"seed-{seed}") for seed in seeds)
        }
    results = []

    def claim() -> None:
        held.enter_context(locked(folder))

    if started:
        world.first(claim)
    for path, seed_config in folders.items():
        run = Run(seed_config, path, world, device, request, console)
        if not started:  # only now: a setting that can't be built must not claim the folder
            world.first(claim)
            if not world.first(lambda: resumes(folder, config)):  # still: another process may have been faster
                world.first(lambda: save_config(config, folder / "config.yaml"))
            started = True
        elif config != world.first(lambda: load_config(folder / "config.yaml")):  # its data moved, say
            world.first(lambda: adopt(folder, config))
        world.first(lambda: same_data(folder / "data.json", splits))
        if not results:
            with console.waiting("measuring what guesses reach without the image (once)"):
                console.floors = known_floors(folder, splits, config.data.eval_images, world)
        run.count_steps()
        console.forecast.begin_seed(run.config)
        results.append(run.finish())
    seconds = max(time.perf_counter() - began, sum(result["seconds"] for result in results))
    if world.leads:
        write_summary(folder, complete, splits, console.floors, results, seconds)
        write_report(folder)
        for line in closing_words(folder):
            console.say(line)
    return folder


class Run:
    """One seed of a run: its model, its data, and the phases that are done or still to do.

    `folder` holds checkpoints/, metrics.jsonl, export/ and result.json. A phase that ended, and an evaluation that was
    written down, is not done again. fresh_encoder: draw an encoder at random in place of a trained one.

    root: what computes with the model where it is in pieces (see `compute`). It has others in each phase, and is in no
    memory whole.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        world: World,
        device: torch.device,
        request: Termination,
        console: RunConsole | None = None,
        fresh_encoder: bool = False,
    ) -> None:
        self.config, self.folder, self.world, self.device = config, folder, world, device
        self.request, self.console = request, console or RunConsole(config, world.leads)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.splits = open_splits(config)
        torch.manual_seed(config.seed)
        texts = self.splits["train"] if "train" in self.splits else self.splits["chat"]
        self.model, self.processor = read(config.model, texts, self.config.dtype)
        if fresh_encoder and (config.model.encoder or config.model.whole):  # else it is drawn at random
            torch.manual_seed(config.seed)
            for parameter in self.model.encoder.parameters():  # those of a file can't be written to
                parameter.data = torch.empty_like(parameter, dtype=torch.float32)
            self.model.encoder.reset_parameters()
        self.sharing = choose(config, self.model, world, device_memory(device, world))
        if world.ranks > 1:
            self.console.say(self.sharing.why)
        self._need_room()
        self.root: nn.Module | None = None
        if self.sharing.pieces:
            self.hollow = hollow(self.model, self.config.dtype)
            self._cut()
        else:
            settle(self.model, device, self.config.dtype)
        self.trackers = Trackers()  # the first rank's; they can't be sent
        world.first(self._make_trackers)
        kept = config.keep_checkpoints + any(stage.eval_every for stage in config.stages)  # the best one, too
        world.first(lambda: check_room(folder / "checkpoints", self._checkpoint_bytes(), kept))
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints, config.keep_every, world)
        self.metrics = MetricsLog(folder / "metrics.jsonl", self.trackers.write)
        self.evaluations = Evaluations(
            config, folder, self.processor, self.splits, world, device, self.console, self.metrics, self.trackers
        )

    def _cut(self) -> None:
        """Put the model, which was read, into pieces of which none learns."""
        whole, self.model = self.model, copy.deepcopy(self.hollow).requires_grad_(False)
        sharing = dataclasses.replace(self.sharing, gathered=False)
        self.root = distribute(self.model, None, self.world, sharing, self.config.dtype, self.device, weights=whole)

    def _make_trackers(self) -> None:
        self.trackers = Trackers(self.config.trackers, self.folder)

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Inside, the trackers are told what the run does. Raises ValueError as `Trackers.open`."""
        done = False
        try:
            self.world.first(lambda: self.trackers.open(self.config))
            yield
            done = True
        finally:
            self.trackers.close(done)

    def _checkpoint_bytes(self) -> int:
        """Of the largest checkpoint, the final one: the model, two moments of what is trained, and a teacher."""
        groups = {name: sum(p.nbytes for p in group) for name, group in self.model.groups().items()}
        stages = (self.config.warmup, *self.config.stages)
        most = max(2 * sum(groups[g] for g in s.train) + bool(s.distill) * groups["encoder"] for s in stages)
        return sum(tensor.nbytes for tensor in model_tensors(self.model).values()) + most

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

    def count_steps(self) -> None:
        """Give the stages the numbers of steps and sequences that their `epochs` and `images` come to, counted once a
        folder. Raises ValueError where the ranks can't share the sequences evenly."""

        def count() -> TrainConfig:
            return counted(self.config, self.chosen_data, self.processor, self.folder / "counts.json")

        with self.console.waiting(COUNTING) if needs_counting(self.config) else nullcontext():
            self.config = self.world.first(count)
        check_ranks(self.config, self.world.ranks)

    def chosen_data(self, stage: Stage) -> GranDataset:
        """What a stage is trained on."""
        return self.splits["chat" if stage.name == self.config.sft.name else "train"]

    def finish(self) -> dict:
        """Everything that is still to do. Returns the run's result: seed, stages, features, peak memory, what it was
        measured with, and the seconds that training and evaluations took, of all the pieces it was run in."""
        path = self.folder / "result.json"
        result = self.world.first(lambda: read_json(path) if path.exists() else None)
        if result is None:
            with self.tracked():
                result = self._finish()
            if self.world.leads:
                write_aside(path, json.dumps(result, indent=1))
        return result

    def _finish(self) -> dict:
        config = self.config
        if config.warmup.runs:
            self.phase(config.warmup)
        stages: dict[str, dict] = {}
        features: dict[str, dict] = {}
        last = None
        for stage in config.stages:
            before = self.evaluations.measure(self.model, self.root, stage, 0, "before", known=last)
            metrics = stages[stage.name] = {"before": before}
            learns = "encoder" in stage.train
            if learns and "test" in self.splits:
                features[stage.name] = self.evaluations.features(self.model, self.root, "before")
            self.phase(stage)
            if learns and "test" in self.splits:
                features[stage.name] |= self.evaluations.features(self.model, self.root, "after")
            if learns:
                self._export_encoder()
            for when, blind in (("after", None), ("other_image", "other_image"), ("text_only", "text")):
                if blind != "text" or "test" in self.splits:  # else there is nothing that it would measure
                    metrics[when] = self.evaluations.measure(self.model, self.root, stage, stage.steps, when, blind)
            last = metrics["after"]
        self._export()
        controlled = config.control and config.adapt.runs
        if controlled:
            stages[config.adapt.name]["control"] = self._control()
        logs = [self.metrics] + ([MetricsLog(self.folder / "control" / "metrics.jsonl")] if controlled else [])
        peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        if config.stages:
            self.trackers.show(config.stages[-1].name, config.stages[-1].steps, "curves", lambda: self._curves(stages))
        return {
            "seed": config.seed,
            "stages": stages,
            "features": features,
            "seconds": sum(line["seconds"] for log_file in logs for line in log_file.lines()),
            "peak_memory_mb": peak / 1024,
            "commit": commit(),
            "device": device_name(self.device.type),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "datasets")},
            "faults": {name: split.faults.summary() for name, split in self.splits.items()},
        }

    def _curves(self, stages: dict[str, dict]) -> Image.Image:
        summary = {"floors": self.console.floors, "mean": {"stages": stages}, "config": dataclasses.asdict(self.config)}
        return rendered(draw_curves(panels(self.metrics.lines(), summary)))

    def phase(self, stage: Stage, title: str | None = None) -> None:
        """Train `stage` to its end, from its newest checkpoint if there is one. title: what the run's console calls it.
        """
        title = title or stage.name
        final = self.checkpoints.final(stage.name)
        if final is None or step_of(final) < stage.steps:  # it was given more since
            self._train(stage, title)
        self.console.forecast.left[title] = 0
        self._load_end(stage, self.model)

    def _load_end(self, stage: Stage, model: GranViT) -> None:
        """Fill a model from the checkpoint with which a stage of this run ended."""
        load(self.checkpoints.final(stage.name), model_tensors(model), subset=not stage.cooldown, world=self.world)

    def begin(self, stage: Stage) -> None:
        """Bring the model, which is as it was built, to where `stage` begins."""
        path = self.world.first(lambda: beginning(self.checkpoints.folder, stage.name))
        if path is not None:
            load(path, model_tensors(self.model), subset=True, world=self.world)

    def _train(self, stage: Stage, title: str) -> None:
        phase = self.new_phase(stage)
        if phase.pieces:
            self.model, self.root = phase.model, phase.root
        newest = self.checkpoints.newest(stage.name)
        if newest is not None:
            phase.resume(newest)
        if self.world.leads:
            self.metrics.go_back(stage.name, phase.step)
        try:
            with self.console.stage(title, stage.steps, phase.step) as stepped:
                train_phase(phase, self.checkpoints, self.metrics, self.request, stepped, self.held_out(phase))
        finally:
            self.checkpoints.wait()  # whoever catches what was raised may go on in this folder

    def new_phase(self, stage: Stage, model: GranViT | None = None) -> Phase:
        """The stage before its first step, of the run's model (which stays as it is where it is in pieces), or of this
        one."""
        weights = None
        if self.sharing.pieces:
            model, weights = copy.deepcopy(self.hollow), model or self.model
        config, processor, world = self.config, self.processor, self.world
        warming = stage.name == config.warmup.name

        def loss_of(model: GranViT, teacher, step: int, batch: Batch, share: Share) -> dict[str, torch.Tensor]:
            if warming:
                return warmup_loss(model, processor, batch, f"{config.seed} {step}", share)
            return stage_loss(model, teacher, batch, stage, config.distill, share)

        loader = PackLoader(
            self.chosen_data(stage), processor, stage.weights,
            **order_arguments(config, stage), rank=world.rank, ranks=world.ranks, workers=config.data.workers,
            pixels=not warming, crops=config.crops if stage.distill else None,
        )  # fmt: skip
        if stage.passes is not None:
            loader.steps = stage.steps * stage.accumulate
        return Phase(
            config, stage, model or self.model, loader, loss_of, self._blank(stage), world, self.device, self.sharing,
            weights,
        )  # fmt: skip

    def held_out(self, phase: Phase) -> HeldOut:
        """What evaluates a phase on its way."""
        rows = self.evaluations.rows
        return HeldOut(phase, self.processor, self.splits, rows, self.metrics, self.console.say)

    def _blank(self, stage: Stage) -> Batch:
        image = torch.zeros(32, 32, 3, dtype=torch.uint8)
        region, chat = Region((0.25, 0.25, 0.75, 0.75), "nothing", "natural"), (("what", "nothing"),)
        sample = Sample("", image, "nothing", (region,), "", "", (chat,))
        questions = self.processor.questions(sample, stage.tasks)[:1]
        return collate([sample], [questions], self.processor, self.config.data.capacity, self.config.crops)

    def _export(self) -> None:
        folder, model = self.folder / "export", self._whole()

        def write() -> None:
            save(model, self.processor, folder)
            if adapters(model.llm):
                save_adapters(model.llm, folder / "lora")
            write_card(folder, "granvit", self.folder)

        self.world.first(write)

    def _export_encoder(self) -> None:
        """Written when the encoder has learnt, so that it is there however the run ends."""
        folder, model = self.folder / "export" / "encoder", self._whole("encoder.")

        def write() -> None:
            model.save_encoder(folder)
            write_card(folder, "encoder", self.folder)

        self.world.first(write)

    def _whole(self, prefix: str = "") -> GranViT:
        """The model as the first rank writes it down: out of its pieces, in host memory, the parameters of that prefix.
        """
        if not self.sharing.pieces:
            return self.model
        return gathered(copy.deepcopy(self.hollow), self.model, self.world, prefix)

    def _control(self) -> dict[str, float]:
        """Metrics of stage 2 alone, from this run's warm LLM and an encoder with random weights: what stage 1 has to
        beat. It lies in control/, and goes on where it was as the run does."""
        adapt = dataclasses.replace(self.config.adapt, eval_every=0)
        run = Run(self.config, self.folder / "control", self.world, self.device, self.request, self.console, True)
        warmup = self.config.warmup
        if run.checkpoints.final(warmup.name) is None:
            if warmup.runs:
                tensors = model_tensors(run.model)
                rest = {name: t for name, t in tensors.items() if not name.startswith("model.encoder.")}
                load(self.checkpoints.final(warmup.name), rest, subset=True, world=self.world)
            # No other phase ends with this model, and the checkpoints of one on its way lack what it does not train.
            run.checkpoints.save(warmup.name, warmup.steps or 0, model_tensors(run.model), {}, final=True)
        run.begin(adapt)
        with run.tracked():
            run.phase(adapt, title=CONTROL)
            title = "control: adapt on a random encoder"
            return run.evaluations.measure(run.model, run.root, adapt, adapt.steps, "after", title=title)
