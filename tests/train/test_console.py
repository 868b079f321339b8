"""What a run says: lines every half minute without a terminal, bars with one, and how long the rest will take."""

import dataclasses
import io
import logging
import time
from types import SimpleNamespace

import pytest
import rich
from rich.console import Console

from granvit.train import console
from granvit.train.console import Forecast, RunConsole, figures, log_handler
from granvit.train.presets import PRESETS


@pytest.fixture
def config():
    smoke = PRESETS["smoke"]
    steps = {name: dataclasses.replace(getattr(smoke, name), steps=100) for name in ("warmup", "pretrain", "adapt")}
    return dataclasses.replace(smoke, **steps)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until its seconds are changed."""
    clock = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.seconds)
    return clock


@pytest.fixture
def screen(monkeypatch):
    """screen(terminal) -> what the run's console writes from then on."""

    def open_screen(terminal: bool) -> io.StringIO:
        written = io.StringIO()
        made = Console(file=written, force_terminal=terminal, width=100, color_system=None)
        monkeypatch.setattr(rich, "get_console", lambda: made)
        return written

    return open_screen


def test_without_a_terminal_a_stage_says_a_line_every_half_minute(config, clock, screen):
    written = screen(False)
    run = RunConsole(config, leads=True)
    run.forecast.begin_seed(config)
    with run.stage("pretrain", 100, 0) as stepped:
        for step in range(1, 101):
            clock.seconds += 1
            stepped(step, 6, f"loss {step / 100:.3f}")
    lines = [line[9:] for line in written.getvalue().splitlines()]
    # 100 steps each of warmup (12 sequences), pretrain, adapt and control (6), at a second for 6; evaluations unknown
    assert lines == [
        "pretrain: 100 steps",
        "pretrain step 30 of 100, loss 0.300, 6 images/s, over 8 min left",
        "pretrain step 60 of 100, loss 0.600, 6 images/s, over 7 min left",
        "pretrain step 90 of 100, loss 0.900, 6 images/s, over 7 min left",
    ]


def test_an_evaluation_says_when_it_begins_how_far_it_is_and_its_figures(config, clock, screen):
    written = screen(False)
    run = RunConsole(config, leads=True)
    run.forecast.begin_seed(config)
    run.floors = {"blind": {"bbox2caption_rouge_l": 0.11}, "most_frequent": {"bbox2caption_rouge_l": 0.122}}
    with run.evaluation("after pretrain") as answered:
        clock.seconds += 20
        answered(64, 140)
        clock.seconds += 20
        answered(128, 140)
    run.evaluated("after pretrain", {"bbox2caption_rouge_l": 0.347, "caption2bbox_acc50": 0.02})
    lines = [line[9:] for line in written.getvalue().splitlines()]
    assert lines[0] == "after pretrain: measuring"
    assert lines[1].startswith("after pretrain, answer 128 of 140, ")
    assert lines[2] == "after pretrain: captions ROUGE-L 34.7 (floor 12.2), boxes ACC@0.5 2.0 %"
    assert len(lines) == 3


def test_with_a_terminal_there_is_a_bar_and_no_line_every_half_minute(config, clock, screen):
    written = screen(True)
    run = RunConsole(config, leads=True)
    run.forecast.begin_seed(config)
    with run.stage("pretrain", 100, 40) as stepped:
        clock.seconds += 60
        stepped(41, 6, "loss 1.250")
    with run.evaluation("after pretrain") as answered:
        answered(64, 140)
    text = written.getvalue()
    assert "pretrain goes on from step 40\n" in text  # tests and people look for it
    assert "41/100" in text and "loss 1.250" in text and "min left" in text and "64/140" in text
    assert "images/s" not in text


@pytest.mark.parametrize("terminal", [False, True])
def test_messages_are_the_same_with_and_without_a_terminal(screen, terminal):
    screen(terminal)
    record = logging.LogRecord("granvit", logging.INFO, "", 0, "checkpoint %s written", ("adapt-1",), None)
    text = log_handler().format(record)
    assert text.endswith("checkpoint adapt-1 written") and "INFO" not in text


def test_ranks_that_do_not_lead_say_nothing(config, clock, screen):
    written = screen(False)
    run = RunConsole(config, leads=False)
    with run.waiting("something"), run.stage("pretrain", 100, 0) as stepped:
        clock.seconds += 60
        stepped(1, 6, "loss 1")
    with run.evaluation("after pretrain") as answered:
        clock.seconds += 60
        answered(64, 140)
    run.evaluated("after pretrain", {})
    assert written.getvalue() == ""


def test_the_forecast_is_the_sum_of_what_was_measured(config):
    forecast = Forecast(seeds=2)
    forecast.begin_seed(config)
    assert str(forecast) == "over 1 min left"  # nothing is known yet
    for title, seconds in (("warmup", 0.1), ("pretrain", 0.5), ("adapt", 0.3), (console.EVALUATION, 10.0)):
        forecast.measured(title, seconds)
    seed = 100 * (0.1 + 0.5 + 0.3 + 0.3) + 8 * 10  # with the control's steps; 8 evaluations
    assert forecast.seconds() == (pytest.approx(2 * seed), True)
    forecast.left["warmup"] = 0
    assert forecast.seconds()[0] == pytest.approx(2 * seed - 10)
    assert str(forecast) == "about 6 min left"
    forecast.begin_seed(config)
    assert forecast.seconds() == (pytest.approx(seed), True)
    forecast.left = {}
    assert str(forecast) == "under a minute left"


def test_figures_name_the_best_floor_and_leave_out_what_there_is_none_of():
    assert figures({"chat_token_accuracy": 0.5}, {}) == "tokens of conversations 50.0 %"
    assert figures({}, {}) == "nothing to measure"
