"""Whole training steps on the meta device, where every read raises: so on a GPU no step waits for what it computes.

Copies from the host don't raise there. On a GPU each would wait for the stream too, unless it is from pinned memory: a
dispatch mode finds those, and only PackedLayout's, which is, is allowed.
"""

import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from granvit.cost.shapes import config_of, on_meta
from granvit.data.collate import collate
from granvit.metrics_log import MetricsLog
from granvit.model import GranViTProcessor, llm
from granvit.train import pending
from granvit.train.guard import Termination
from granvit.train.loop import Phase, train_phase
from granvit.train.presets import PRESETS, TrainConfig
from granvit.train.stages import Stage
from granvit.train.step import stage_loss
from granvit.world import World

SMOKE, PAPER = PRESETS["smoke"], PRESETS["paper"]
STAGES = [SMOKE.align, SMOKE.pretrain, SMOKE.adapt, SMOKE.sft]
META = torch.device("meta")
PINNED = {"layout.py copied"}
"""What may copy to the device in a step: it doesn't wait."""


MAKERS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)


def note(counter: Counter, tensors: list) -> None:
    """Counts the innermost function of this repository, if there are tensors of more than one device."""
    if len({tensor.device for tensor in tensors if isinstance(tensor, Tensor)}) > 1:
        ours = [f"{f.filename} {f.name}" for f in traceback.extract_stack()[:-2] if "/granvit" in f.filename]
        counter[ours[-1].rsplit("/", 1)[-1] if ours else "elsewhere"] += 1


class Operators(TorchDispatchMode):
    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        note(self.counter, tree_leaves((args, kwargs, out)))
        return out


class Makers(TorchFunctionMode):
    """Tensors of numbers, which are made on the host first; on meta no operator shows that."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in MAKERS:
            note(self.counter, [out, torch.empty(0, device="cpu")])
        return out


@contextmanager
def crossings() -> Iterator[Counter]:
    """Functions of this repository that take tensors from one device to another, or use them together."""
    counter = Counter()
    with Operators(counter), Makers(counter):
        yield counter


@pytest.fixture
def fused_on_meta(monkeypatch):
    """AdamW's fused step has shapes on meta, but its list of devices leaves meta out."""
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])


class Loader(list):
    """Batches, as a phase takes them from a PackLoader."""

    dataset = None


class Exchanges(World):
    """Counts what the ranks would tell each other on the host."""

    calls: ClassVar[list[int]] = []

    def total(self, *numbers: float) -> list[float]:
        self.calls.append(len(numbers))
        return super().total(*numbers)


def phase_of(
    model, processor, samples, stage: Stage, steps: int, config: TrainConfig, device: torch.device
) -> Phase:
    """So many steps of a stage on these samples."""
    asked = [processor.questions(sample, stage.tasks) for sample in samples]
    batch = collate(samples, asked, processor, config.data.capacity, config.crops if stage.distill else None)
    stage = replace(stage, steps=steps, epochs=None, packs=1, images=None)

    def losses(model, teacher, step, batch, share):
        return stage_loss(model, teacher, batch, stage, config.distill, share)

    return Phase(config, stage, model.to(device).train(), Loader([batch] * steps), losses, batch, Exchanges(), device)


def train(monkeypatch, tmp_path, model, processor, samples, stage: Stage, config: TrainConfig) -> list[int]:
    """Three steps of a stage on meta as a run takes them: encoder, teacher, region prompt, LLM, losses, backward,
    clipping, optimiser and averages. Returns the steps after which the device is read, once for each time.

    A read anywhere else raises, and so does this, where a step's tensors cross from the host but by pinned memory."""
    config = replace(config, precision="float32", log_every=3)  # autocast doesn't know meta
    phase = phase_of(model, processor, samples, stage, 3, config, META)
    take, reads = Phase.take, []

    def watched(phase, given):
        with crossings() as crossed:
            take(phase, given)
        assert crossed.keys() == PINNED

    def fetch(numbers: Tensor) -> list[float]:
        assert numbers.is_meta
        reads.append(phase.step)
        return [1.0] * len(numbers)

    monkeypatch.setattr(Phase, "take", watched)
    monkeypatch.setattr(Exchanges, "calls", [])
    monkeypatch.setattr(pending, "fetch", fetch)
    nowhere = SimpleNamespace(folder=tmp_path / "checkpoints", failures=0, save=lambda *_, **__: None)
    never = SimpleNamespace(due=False, evaluate=lambda _: None)
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    train_phase(phase, nowhere, metrics, Termination(), lambda *_: None, never)
    lines = list(metrics.lines())
    assert [line["step"] for line in lines] == [1, 2, 3] and all(line["grad_norm"] == 1 for line in lines)
    assert ["features_std" in line for line in lines] == [True, False, True]
    # Each step's counts and wish to stop, losses of one step and of the two read together; at the end the wish.
    assert Exchanges.calls == [6, 2, 6, 6, 4, 1]
    assert (phase.teacher is not None) == bool(stage.distill)
    assert all(parameter.grad.is_meta for parameter in phase.trained if parameter.numel())
    return reads


@pytest.mark.usefixtures("fused_on_meta")
@pytest.mark.parametrize("attention", ["mask", "segments"])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_only_log_steps_read_and_those_once(tiny, samples, monkeypatch, tmp_path, stage, attention):
    model, processor = tiny(pixel_shuffle=2 if attention == "mask" else 1)
    if attention == "segments":  # as on a GPU in half precision
        monkeypatch.setattr(llm, "why_not_flash", lambda *_: None)
        stage = replace(stage, optimizer="adamw")
    assert train(monkeypatch, tmp_path, model, processor, samples, stage, SMOKE) == [1, 3]


@pytest.mark.usefixtures("fused_on_meta")
@pytest.mark.parametrize("target", ["layer_norm", "cosine", "mse"])
def test_no_target_of_distillation_reads_anything(tiny, samples, monkeypatch, tmp_path, target):
    config = replace(SMOKE, distill=replace(SMOKE.distill, target=target))
    assert train(monkeypatch, tmp_path, *tiny(), samples, config.pretrain, config) == [1, 3]


@pytest.mark.slow
@pytest.mark.usefixtures("fused_on_meta")
@pytest.mark.parametrize("stage", [PAPER.align, PAPER.pretrain, PAPER.adapt, PAPER.sft], ids=lambda stage: stage.name)
def test_steps_of_the_paper_s_size(tiny, samples, monkeypatch, tmp_path, stage):
    """SigLIP2 so400m and Qwen2.5-1.5B, whose activations are computed again."""
    small, processor = tiny(box_format="text")
    config = config_of(PAPER.model)
    config.text_vocab = small.config.text_vocab  # the rest of the table is left unused, as by Qwen's own tokenizer
    processor = GranViTProcessor.from_config(config, processor.tokenizer)
    paper = replace(PAPER, checkpointing=True, micro_packs=0)
    assert train(monkeypatch, tmp_path, on_meta(config), processor, samples, stage, paper) == [1, 3]


def test_crossings_are_seen_and_reads_raise():
    x = torch.zeros(3, device=META)
    for plant in (
        lambda: x.new_tensor(2.0),
        lambda: torch.tensor([1, 2], device=META),
        lambda: torch.arange(3).to(META),
        lambda: x + torch.ones(()),
    ):
        with crossings() as crossed:
            plant()
        assert sum(crossed.values()) == 1
    for read in (x.tolist, x.cpu, x[0].item, lambda: bool(x[0] > 0), x.nonzero, lambda: x[x > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [SMOKE.pretrain, SMOKE.adapt], ids=lambda stage: stage.name)
def test_a_step_on_a_gpu_never_waits(tiny, samples, stage):
    """What meta can't show: copies and kernels of libraries that wait. Of the two steps between the log steps."""
    config = replace(SMOKE, precision="bfloat16", log_every=100)
    stage = replace(stage, optimizer="adamw")
    phase = phase_of(*tiny(pixel_shuffle=2), samples, stage, 4, config, torch.device("cuda"))
    before = torch.cuda.get_sync_debug_mode()
    for number, given in enumerate(phase.batches(), 1):
        torch.cuda.set_sync_debug_mode("error" if 1 < number < 4 else before)
        try:
            phase.take(given)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert ["loss" in line for line in phase.read()] == [True] * 4
