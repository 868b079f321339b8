import copy
import json
import logging
import math
import os
import re
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch

from granvit.train import __main__, checkpoint, loop
from granvit.train.checkpoint import Checkpoints, read_values
from granvit.train.feed import MicroBatch
from granvit.train.guard import (
    INTERRUPTED,
    STOPPED,
    Failed,
    NotFinite,
    Spikes,
    Streak,
    Terminated,
    Termination,
    termination,
)
from granvit.train.pending import Launched, Pending
from granvit.train.presets import save_config
from granvit.train.replay import replay
from granvit.train.run import Run, train
from granvit.world import World


def test_a_spike_is_what_is_far_above_what_came_before():
    generator = torch.Generator().manual_seed(0)
    losses = (3 + 0.1 * torch.randn(300, generator=generator)).tolist()
    spikes = Spikes()
    assert not any(map(spikes.add, losses))
    assert spikes.mean == pytest.approx(3, abs=0.05) and math.sqrt(spikes.variance) == pytest.approx(0.1, rel=0.3)
    again = Spikes()
    again.restore(json.loads(json.dumps(spikes.state())))
    for one in (spikes, again):
        assert one.add(4.0) and not one.add(3.3) and not one.add(0.1)
    assert spikes.state() == again.state()
    assert spikes.mean < 3.1  # one spike does not make the next one usual


def test_the_first_losses_are_learnt_from_and_a_new_level_becomes_usual():
    spikes = Spikes(memory=10)
    assert not any(spikes.add(loss) for loss in (1, 100, 1, 100, 1, 1, 1, 1, 1, 1))
    for _ in range(100):
        spikes.add(1.0)
    assert spikes.add(50.0)
    assert not all([spikes.add(50.0) for _ in range(200)][-50:])


def test_a_streak_is_broken_by_one_finite_step():
    streak = Streak(3)
    for finite in (False, False, True, False, False):
        streak.add(finite)
        assert not streak.over
    streak.add(False)
    assert streak.over and streak.length == 3
    lowered = Streak(2)
    lowered.restore(streak.length)
    assert not lowered.over  # before another step
    lowered.add(False)
    assert lowered.over


def test_sigterm_ends_at_once_where_nobody_waits_for_it_and_is_noted_where_somebody_does():
    before = signal.getsignal(signal.SIGTERM)
    with termination() as asked:
        with pytest.raises(Terminated), asked.awaited():  # nobody looked, after it came
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.asked
        with pytest.raises(Terminated) as raised:
            os.kill(os.getpid(), signal.SIGTERM)
        assert raised.value.code == STOPPED == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_first_ctrl_c_is_as_sigterm_and_the_second_ends_at_once(caplog):
    before = signal.getsignal(signal.SIGINT)
    with termination() as asked:
        with pytest.raises(Terminated) as raised, asked.awaited():
            os.kill(os.getpid(), signal.SIGINT)
            assert asked.asked and "press it again" in caplog.text
        assert raised.value.code == INTERRUPTED == 130
        with pytest.raises(KeyboardInterrupt), asked.awaited():
            os.kill(os.getpid(), signal.SIGINT)
    with termination() as asked, pytest.raises(Terminated), asked.awaited():  # one that follows SIGTERM is the first
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    with termination() as asked, pytest.raises(KeyboardInterrupt):  # where no step is taken
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_in_a_thread_no_signal_is_handled_and_that_is_said(caplog):
    entered = []

    def enter():
        with termination() as asked:
            entered.append(asked.asked)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [False] and "will not save the run" in caplog.text


@pytest.fixture()
def config(small_config, tmp_path):
    return replace(small_config, output=str(tmp_path / "run"), nonfinite_limit=3)


@pytest.fixture()
def phase(config, tmp_path):
    run = Run(config, tmp_path / "run", World(), torch.device("cpu"), Termination())
    return run.new_phase(config.pretrain, run.model)


def spoil(monkeypatch, steps, what) -> None:
    """In those steps of every stage, what(losses) in place of its losses; the first image's answers are NaN."""
    losses_of = loop.Phase.losses

    def spoilt(self, step, batch, share):
        losses = losses_of(self, step, batch, share)
        if step in steps:
            owner = batch.packed.image_index.flatten()[batch.packed.answer_slots]
            losses = what(losses | {"answers": losses["answers"].masked_fill(owner == 0, math.nan)})
        return losses

    monkeypatch.setattr(loop.Phase, "losses", spoilt)


def scaled(losses: dict, factor: float, *names: str) -> dict:
    return losses | {name: losses[name] * factor for name in names}


SPOILT = {
    "NaN": lambda losses: scaled(losses, math.nan, "loss", "loss_caption"),
    "infinite": lambda losses: scaled(losses, math.inf, "loss", "loss_caption"),
    "a gradient alone": lambda losses: losses | {"loss": losses["loss"] + (losses["loss"] * 0).sqrt()},
    "features too": lambda losses: scaled(losses, math.nan, "loss", "loss_caption", "features"),
}


@pytest.mark.parametrize("what", SPOILT.values(), ids=SPOILT)
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_image(phase, monkeypatch, caplog, what):
    batches = phase.batches()
    ranks.taken(phase, [next(batches)])
    before, spikes = {name: tensor.clone() for name, tensor in phase.tensors().items()}, phase.spikes.state()
    spoil(monkeypatch, {2}, what)
    two = next(batches)
    with caplog.at_level(logging.WARNING):
        (line,) = ranks.taken(phase, [two])
    assert line["skipped"] is True and "loss" not in line and line["images"] == len(two.parts[0].ids) > 1
    json.dumps(line, allow_nan=False)
    after = phase.tensors()
    assert before.keys() == after.keys() and any(name.startswith("teacher.") for name in after)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert phase.spikes.state() == spikes and phase.streak.length == 1
    assert caplog.messages[-1].partition("its images: ")[2] == two.parts[0].ids[0]
    assert "loss" in ranks.taken(phase, [next(batches)])[0] and phase.streak.length == 0
    assert not all(torch.equal(tensor, phase.tensors()[name]) for name, tensor in before.items())


def test_of_the_ranks_one_says_which_images_a_skipped_step_had_each_once(phase, caplog):
    part = MicroBatch(None, ["a", "b", "a"], torch.tensor([0, 1, 2]), ())
    numbers = {name: torch.tensor(math.nan) for name in ("loss_caption", "loss_distill", "grad_norm")}
    step = Launched({"step": 1}, {"taken": torch.tensor(False)} | numbers, (part,), (torch.tensor([False] * 3),))
    for rank, said in ((1, []), (0, ["a, b"])):
        pending = Pending(phase.stage, Spikes(), Streak(3), World(rank=rank))
        pending.add(step)
        assert pending.read() == [{"step": 1, "skipped": True}]
        assert [message.partition("its images: ")[2] for message in caplog.messages] == said


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_that_are_read_late_are_as_if_read_at_once(config, tmp_path, monkeypatch, caplog, optimizer):
    """A skipped step, and two in a row, the most that may be: what the device does after them is as not done, though
    step 6 is finite."""
    run = Run(replace(config, nonfinite_limit=2), tmp_path / "run", World(), torch.device("cpu"), Termination())
    stage = replace(config.pretrain, optimizer=optimizer)
    spoil(monkeypatch, {2, 4, 5}, SPOILT["a gradient alone"])
    outcomes = []
    for late in (False, True):
        caplog.clear()
        phase, lines = run.new_phase(stage, copy.deepcopy(run.model)), []
        for given in phase.batches():
            phase.take(given)
            lines += [] if late else phase.read()
            if phase.streak.over:
                break
        assert phase.step == (6 if late else 5)
        lines += phase.read()
        tensors = {name: tensor.clone() for name, tensor in phase.tensors().items()}
        outcomes.append((lines, phase.values(), caplog.messages, tensors))
    at_once, late = outcomes
    assert [line.get("skipped", False) for line in late[0]] == [False, True, False, True, True]
    assert at_once[:3] == late[:3] and late[1]["step"] == 5 and len(late[2]) == 3
    assert any(name.startswith("teacher.") for name in late[3])
    assert all(torch.equal(tensor, late[3][name]) for name, tensor in at_once[3].items())


def test_a_jump_of_the_loss_names_the_images_and_is_learnt_from(phase, monkeypatch, caplog):
    batches = phase.batches()
    phase.spikes.restore([1000, 1.0, 0.01])
    two = next(batches)
    with caplog.at_level(logging.WARNING):
        (line,) = ranks.taken(phase, [two])
    assert line["loss"] > 2 and "the loss jumped to" in caplog.text
    assert all(image in caplog.text for image in two.parts[0].ids)


def lines_of(config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def test_skipped_steps_are_counted_and_too_many_leave_a_dump_that_shows_the_cause(config, monkeypatch, capsys):
    """From step 4 on the LLM's last norm overflows: its weights are finite, what comes out is not."""
    take = loop.Phase.take

    def poisoned(self, batches):
        if (self.stage.name, self.step) == ("pretrain", 3):
            with torch.no_grad():
                self.model.llm.model.norm.weight.mul_(2e38)
        return take(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Phase, "take", poisoned)
        with pytest.raises(NotFinite, match="pretrain step 6: 3 steps in a row") as raised:
            train(config)
    lines = [line for line in lines_of(config) if line["stage"] == "pretrain" and "evaluation" not in line]
    assert [line.get("skipped", False) for line in lines] == [False] * 3 + [True] * 3
    dump = Path(config.output) / "faults" / "pretrain-0000005"
    assert f"`granvit train replay {dump}`" in str(raised.value)
    assert read_values(dump)["step"] == 5 and read_values(dump)["streak"] == 3

    written = (Path(config.output) / "metrics.jsonl").read_text()
    monkeypatch.setattr(sys, "argv", ["granvit.train", "replay", str(dump), "--device", "cpu"])
    __main__.main()
    output = capsys.readouterr().out
    assert "pretrain step 6" in output and "llm.model.norm" in output and "output, of finite input" in output
    assert (Path(config.output) / "metrics.jsonl").read_text() == written
    with pytest.raises(ValueError, match="no dump of a step"):
        replay(Checkpoints(Path(config.output) / "checkpoints", 1).newest("pretrain"), "cpu")


def test_a_few_skipped_steps_end_nothing(config, monkeypatch):
    spoil(monkeypatch, {2, 3}, SPOILT["NaN"])
    train(config)
    skipped = [(line["stage"], line["step"]) for line in lines_of(config) if line.get("skipped")]
    assert skipped == [(stage, step) for stage in ("warmup", "pretrain", "adapt") for step in (2, 3)]


@pytest.fixture()
def disk(monkeypatch):
    """disk(which): writing the checkpoints of these numbers, from 0, fails as on a full disk. Returns those tried."""
    whole, tried = checkpoint.save_file, []

    def fill(full):
        def write(tensors, path, **kwargs):
            tried.append(path.parent.name)
            if full(len(tried) - 1):
                raise OSError(28, "No space left on device")
            whole(tensors, path, **kwargs)

        monkeypatch.setattr(checkpoint, "save_file", write)
        return tried

    return fill


def test_checkpoints_that_can_t_be_written_are_outlived_for_a_while(config, disk, caplog):
    config = replace(config, checkpoint_every=1, failed_saves=2, warmup=replace(config.warmup, steps=0))
    disk(lambda number: number in (1, 3))
    train(config)
    assert caplog.text.count("could not be written, the one before it stands: ") == 2


def test_too_many_end_the_run_with_a_message(config, disk, caplog):
    config = replace(config, checkpoint_every=1, failed_saves=2, warmup=replace(config.warmup, steps=0))
    tried = disk(lambda number: number > 0)
    with pytest.raises(Failed, match=r"2 checkpoints in a row could not be written to .*config.failed_saves"):
        train(config)
    assert tried[:3] == [".pretrain-0000001.tmp", ".pretrain-0000002.tmp", ".pretrain-0000003.tmp"]
    assert Checkpoints(Path(config.output) / "checkpoints", 1).newest("pretrain").name == "pretrain-0000001"


def test_a_last_checkpoint_that_can_t_be_written_ends_the_run(config, disk):
    disk(lambda number: True)
    with pytest.raises(Failed, match="the final checkpoint of warmup could not be written"):
        train(replace(config, checkpoint_every=100))


def test_who_is_asked_to_stop_and_can_t_save_says_so(config, disk, monkeypatch):
    disk(lambda number: True)
    take = loop.Phase.take

    def asked(self, batches):
        os.kill(os.getpid(), signal.SIGTERM)
        return take(self, batches)

    monkeypatch.setattr(loop.Phase, "take", asked)
    with pytest.raises(Failed, match="stopped after step 1, which could not be saved"):
        train(config)


def test_a_folder_that_can_t_be_written_to_is_named_before_training(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    save_config(replace(config, output=str(tmp_path / "file" / "run")), tmp_path / "config.yaml")
    monkeypatch.setattr(loop.Phase, "take", None)  # which would fail otherwise than said
    monkeypatch.setattr(sys, "argv", ["granvit.train", "--config", str(tmp_path / "config.yaml")])
    assert __main__.main() == 2
    said = capsys.readouterr().err
    assert re.match("granvit train: error: .*/checkpoints can't be written to .*and the checkpoints belong there", said)
