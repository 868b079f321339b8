"""What a run says while it goes.

With a terminal it shows a bar for what is being done. Without one it prints a line every half minute. In both it prints
the figures of each evaluation next to the floors, and at the end where everything is.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import rich
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from granvit.train.presets import TrainConfig

EVERY = 30.0
"""Seconds between the lines of a stage or an evaluation, where there is no terminal."""

EVALUATION = "evaluation"
CONTROL = "control"


FIGURES = {
    "bbox2caption_rouge_l": "captions ROUGE-L",
    "bbox2caption_exact": "exact match",
    "caption2bbox_acc50": "boxes ACC@0.5",
    "chat_token_accuracy": "tokens of conversations",
}
"""The metrics that a run says, in per cent."""


def log_handler() -> logging.Handler:
    """For logging.basicConfig: coloured above the bars of a terminal, else plain lines that nothing wraps."""
    terminal = rich.get_console().is_terminal
    handler = RichHandler(show_path=False) if terminal else logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s" if terminal else "%(asctime)s %(message)s", "%H:%M:%S"))
    return handler


def hush() -> None:
    """Turn off bars and messages of libraries that say nothing of the run."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # "Writing model shards", "Loading weights"
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # "generated new fontManager"


def say(text: str) -> None:
    """A line on standard output, with the time where it goes into a file."""
    console = rich.get_console()
    stamp = "" if console.is_terminal else time.strftime("%H:%M:%S ")
    console.print(stamp + text, soft_wrap=True, highlight=False, markup=False, emoji=False)


class Forecast:
    """How long the rest of a run will take, judged by what its steps and evaluations took.

    left: {title: steps left}, of the seed that is being run; an evaluation counts as a step of EVALUATION.
    seeds: how many are still to begin.
    """

    def __init__(self, seeds: int) -> None:
        self.seeds = seeds
        self.whole: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self._packs: dict[str, int] = {}
        self._seconds: dict[str, list[float]] = {}  # kind: [seconds a step, steps measured]

    def begin_seed(self, config: TrainConfig) -> None:
        """The next seed begins, with this configuration, whose steps are counted."""
        self.seeds -= 1
        stages = {stage.name: stage for stage in (config.warmup, *config.stages) if stage.runs}
        self.whole = {name: stage.steps for name, stage in stages.items()}
        self._packs = {name: stage.packs * stage.accumulate for name, stage in stages.items()}
        evaluations = 1 + 3 * len(config.stages)  # before the first stage; after each, and twice without its image
        if config.control and config.adapt.runs:
            self.whole[CONTROL] = config.adapt.steps
            evaluations += 1
        self.whole[EVALUATION] = evaluations
        self.left = dict(self.whole)

    def measured(self, title: str, seconds: float) -> None:
        """A step of `title` took this long; the last 50 count."""
        mean, number = self._seconds.get(_kind(title), (0.0, 0))
        number = min(number + 1, 50)
        self._seconds[_kind(title)] = [mean + (seconds - mean) / number, number]

    def seconds(self) -> tuple[float, bool]:
        """Seconds that are left, and whether all that is left was measured; what was not is guessed from the number of
        packed sequences of its steps, and an evaluation is left out."""
        each = {kind: mean for kind, (mean, _) in self._seconds.items()}
        known = [each[kind] / self._packs[kind] for kind in each if kind in self._packs]
        guess = sum(known) / len(known) if known else 0.0
        total, certain = 0.0, True
        for title, steps in self.whole.items():
            steps = self.left.get(title, 0) + self.seeds * steps
            kind = _kind(title)
            if steps and kind not in each:
                certain = False
            total += steps * each.get(kind, guess * self._packs.get(kind, 0))
        return total, certain

    def __str__(self) -> str:
        seconds, certain = self.seconds()
        minutes = round(seconds / 60)
        if minutes < 1 and certain:
            return "under a minute left"
        hours, minutes = divmod(max(minutes, 1), 60)
        return f"{'about' if certain else 'over'} {f'{hours} h ' if hours else ''}{minutes} min left"


def _kind(title: str) -> str:
    """The control takes the steps of the stage adapt."""
    return "adapt" if title == CONTROL else title


class Task:
    """A stage or an evaluation on its way, told of what is done of it."""

    def __init__(
        self, title: str, total: int | None, done: int, forecast: Forecast, bar: Progress, speaks: bool
    ) -> None:
        self.title, self.total = title, total
        self._forecast, self._bar, self._speaks = forecast, bar, speaks
        self._task = bar.add_task(title, total=total, completed=done, note="", left="")
        self._spoken, self._images = time.monotonic(), 0

    def advance(self, done: int, images: int = 0, note: str = "") -> None:
        """So much is done by now. images: how many the last step was of; note: what is to be said of it."""
        self._images += images
        self._bar.update(self._task, completed=done, total=self.total, note=note, left=str(self._forecast))
        seconds = time.monotonic() - self._spoken
        if self._speaks and seconds >= EVERY:
            rate = f"{self._images / seconds:.0f} images/s" if self._images else ""
            say(", ".join(filter(None, [f"{self.title} {done} of {self.total}", note, rate, str(self._forecast)])))
            self._spoken, self._images = time.monotonic(), 0


class RunConsole:
    """What the first rank says of a run. leads: whether this is it; else nothing is said."""

    def __init__(self, config: TrainConfig, leads: bool) -> None:
        self.forecast, self.leads = Forecast(config.seeds), leads
        self.floors: Mapping[str, Mapping[str, float]] = {}  # as `figures` takes them, once they are known

    def say(self, text: str) -> None:
        if self.leads:
            say(text)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Inside, something is done that can't say how far it is."""
        self.say(text)
        console = rich.get_console()
        with console.status(text) if self.leads and console.is_terminal else nullcontext():
            yield

    @contextmanager
    def stage(self, title: str, steps: int, done: int) -> Iterator[Callable[[int, int, str], None]]:
        """Inside, a stage of `steps` steps is trained, of which `done` are known from before. What it gives is called
        after each step with the step, its images and what is to be said of it."""
        self.forecast.left[title] = steps - done
        if done:
            self.say(f"{title} goes on from step {done}")
        else:
            self.say(f"{title}: {steps} steps")
        last = time.monotonic()
        with self._task(f"{title} step", steps, done) as task:

            def stepped(step: int, images: int, note: str) -> None:
                nonlocal last
                self.forecast.left[title] = steps - step
                self.forecast.measured(title, time.monotonic() - last)
                last = time.monotonic()
                task.advance(step, images, note)

            yield stepped

    @contextmanager
    def evaluation(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Inside, a model is asked for answers. What it gives is called with the number there are by now, and of how
        many."""
        self.say(f"{title}: measuring")
        began = time.monotonic()
        with self._task(f"{title}, answer", None, 0) as task:

            def answered(done: int, total: int) -> None:
                task.total = total
                task.advance(done)

            yield answered
        self.forecast.measured(EVALUATION, time.monotonic() - began)

    def evaluated(self, title: str, metrics: Mapping[str, float]) -> None:
        """An evaluation's figures, those that are known from before too."""
        self.forecast.left[EVALUATION] = max(self.forecast.left.get(EVALUATION, 0) - 1, 0)
        self.say(f"{title}: {figures(metrics, self.floors)}")

    @contextmanager
    def _task(self, title: str, total: int | None, done: int) -> Iterator[Task]:
        console = rich.get_console()
        columns = (
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"), TextColumn("{task.fields[left]}"),
        )  # fmt: skip
        shown = self.leads and console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
            yield Task(title, total, done, self.forecast, bar, self.leads and not shown)


def figures(metrics: Mapping[str, float], floors: Mapping[str, Mapping[str, float]]) -> str:
    """A few of an evaluation's metrics in one line, each with the best floor's."""
    parts = []
    for name, label in FIGURES.items():
        if name in metrics:
            best = max((floor[name] for floor in floors.values() if name in floor), default=None)
            parts.append(f"{label} {100 * metrics[name]:.1f}" + ("" if best is None else f" (floor {100 * best:.1f})"))
    return ", ".join(parts) + " %" if parts else "nothing to measure"


def closing_words(folder: Path) -> list[str]:
    """What a finished run says at its end: its figures, where things are, and a command to try it with."""
    summary = json.loads((folder / "report" / "summary.json").read_text())
    last = list(summary["mean"]["stages"].values())[-1]["after"]
    seeds = sorted(folder.glob("seed-*"))
    model = seeds[0] if seeds else folder
    lines = [
        f"result: {figures(last, summary['floors'])}",
        f"report: {folder / 'report' / 'index.html'}",
        f"model: {model / 'export'} (its encoder for transformers: {model / 'export' / 'encoder'})",
    ]
    if example := summary.get("example"):
        box = " ".join(f"{value:.3f}" for value in example["box"])
        lines.append(f"try it: granvit predict {model} --image {folder / example['image']} --box {box}")
    return lines
