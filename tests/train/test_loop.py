import copy
import importlib.util
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch

from granvit.data.collate import Read, join
from granvit.lora import Lora
from granvit.questions.packing import write_parts
from granvit.questions.schema import Sample
from granvit.train import loop
from granvit.train.presets import Model
from granvit.world import World

Kept = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "kept.py"))["Kept"]


def batch_of(run, stage):
    """Eight sequences: two pictures with all that can be asked of them, pictures alone, of which the third has no
    region, or conversations without a picture, and nothing."""
    samples = [run.splits["train"][row] for row in range(8)]
    samples = [replace(sample, conversations=((("how many?", "3"), ("sure?", "yes")),)) for sample in samples]
    samples[2] = replace(samples[2], regions=(), caption="a picture, " * 10)
    nothing = torch.zeros(0, 0, 3, dtype=torch.uint8)
    if "chat" in stage.tasks:
        samples[6:] = [Sample(f"text {i}", nothing, None, (), "", "", ((("and?", "no " * 20),),)) for i in range(2)]
    asked = [run.processor.questions(sample, stage.tasks)[:5] for sample in samples]
    plan, parts = [[0, 1], [2], [3], [4], [5], [6], [7], []], write_parts(samples, asked, run.processor)
    return join([Read(plan, samples, asked, parts)], run.processor, run.config.data.capacity, run.config.crops)


@pytest.mark.parametrize("case", ["warmup", "pretrain", "adapt", "conversations", "adapters"])
def test_micro_batches_are_one_batch_and_keep_less_of_it(small_config, tmp_path, monkeypatch, case):
    """Losses, gradients, and what the teacher's statistics take in, to 1e-6. Kept for the backward pass, at once: what
    the largest micro-batch needs."""
    config = small_config
    if case == "adapters":
        config = replace(config, model=Model(llm="llm-toy", lora=Lora(rank=2)))
    run = ranks.Run(config, tmp_path, World(), torch.device("cpu"), ranks.Termination())
    tasks = ("chat", "bbox2caption") if case == "conversations" else config.adapt.tasks
    stage = getattr(config, case) if case in ("warmup", "pretrain") else replace(config.adapt, tasks=tasks)
    stage = replace(stage, packs=8, learning_rate=0.0)  # so that all steps are of the same weights
    batch, learn, kept = batch_of(run, stage), loop.Phase._learn, []

    def watched(phase, *arguments):
        with Kept(phase.model) as watch:
            losses = learn(phase, *arguments)
        kept.append(watch.bytes)
        return losses

    monkeypatch.setattr(loop.Phase, "_learn", watched)

    def outcome(micro_packs: int):
        run.config = replace(config, micro_packs=micro_packs)
        phase = run.new_phase(stage, copy.deepcopy(run.model))
        lines = ranks.taken(phase, (phase.feed.step([batch]) for _ in range(2)))  # the first fills the statistics
        largest = max(kept)
        kept.clear()
        gradient = torch.cat([p.grad.flatten() for p in phase.trained if p.grad is not None])
        statistics = phase.teacher.statistics.covariance if phase.teacher else torch.ones(1)
        return (phase.parts, largest), lines[1], gradient, statistics

    (_, whole), line, gradient, statistics = outcome(0)
    assert bool(line["loss_distill"]) == (case == "pretrain") and gradient.norm() > 0
    for micro_packs, parts in ((1, 8), (2, 4), (3, 3)):
        (split, largest), ours, own_gradient, own_statistics = outcome(micro_packs)
        assert split == parts and largest < 0.4 * whole
        assert ours.keys() == line.keys()
        assert ours == pytest.approx(line, rel=1e-6), micro_packs
        assert (own_gradient - gradient).norm() < 1e-6 * gradient.norm()
        assert (own_statistics - statistics).norm() < 1e-6 * statistics.norm()


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", Path(__file__).parents[2] / "bench" / "soak.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_run_does_not_grow(soak, tmp_path, monkeypatch):
    """300 steps and 20 checkpoints, in the second half of which 22 MB are noise: each checkpoint is written by a thread
    of its own, whose arenas are still new. In 3,000 steps (bench/soak.py) the slope was a thousandth of that."""
    measured = soak.soak(tmp_path, 300)
    assert measured["checkpoints"] == 20
    for name in ("memory_mb", "reader_memory_mb"):
        assert measured[name]["second_half_slope_per_1000_steps"] < 150, measured
    assert measured["open_files"]["second_half_range"] <= 8, measured
    assert measured["open_files"]["last"] <= measured["open_files"]["first"] + 4, measured
