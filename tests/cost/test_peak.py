"""The memory that a plan states, severalst what a real step takes on a CPU."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from granvit.cost.config import PlanConfig
from granvit.cost.live import Live
from granvit.cost.peak import Peak, peak
from granvit.cost.reading import assumed_reading
from granvit.cost.shapes import config_of
from granvit.cost.stand_in import batch_of
from granvit.lora import Lora, add_adapters
from granvit.model import GranViT, llm
from granvit.train.distill import Teacher
from granvit.train.optimizer import freeze, hidden_matrices, make_optimizer
from granvit.train.parallel.memory import checkpoint_activations
from granvit.train.parallel.sharing import Sharing
from granvit.train.presets import PRESETS, Model, TrainConfig
from granvit.train.stages import Stage
from granvit.train.step import stage_loss
from granvit.world import World

SMOKE = PRESETS["smoke"]
WIDE = replace(
    SMOKE, data=replace(SMOKE.data, capacity=64),
    model=Model(encoder_width=32, encoder_layers=1, llm_width=320, llm_layers=2, max_image_tokens=9),
)  # fmt: skip
ADAPTERS = replace(
    SMOKE, model=Model(llm="llm-toy", lora=Lora(8)), precision="bfloat16", checkpointing=True,
    adapt=replace(SMOKE.adapt, optimizer="adamw"),
)  # fmt: skip


def rows_of(config: TrainConfig, stage: Stage, number: int) -> tuple:
    """A plan's shapes, and sequences of as many small images as fit."""
    shapes = config_of(config.model)
    plan = PlanConfig(config, rows=100, image_size=(64, 96), prompt_tokens=12, answer_tokens=6, caption_tokens=20)
    return shapes, assumed_reading(plan, shapes, stage).rows[:number]


def on_cpu(config: TrainConfig, stage: Stage, shapes, rows, several: bool) -> int:
    """Bytes that the allocator has given at most, by its own count, to a real step and what there is before it."""
    frozen = torch.bfloat16 if config.precision == "bfloat16" else torch.float32

    def step() -> None:
        model = GranViT(shapes).train()
        if config.model.lora.rank:
            add_adapters(model.llm.to(frozen), config.model.lora)
        groups = model.groups()
        freeze(groups, stage.train)
        teacher = Teacher(model.encoder, 0.9) if stage.distill else None
        if config.checkpointing:
            checkpoint_activations(model)
        optimizer = make_optimizer(groups, stage, hidden_matrices(model))
        batch = batch_of(rows, shapes, torch.device("cpu"))
        trained = [parameter for name in stage.train for parameter in groups[name]]
        for _ in range(1 + several):
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
                losses = stage_loss(model, teacher, batch, stage, config.distill)
            losses["loss"].backward()
            del losses
        nn.utils.clip_grad_norm_(trained, stage.clip)
        optimizer.step()
        if teacher is not None:
            teacher.update(model.encoder)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("config", "stage", "sequences", "several", "segments", "when"),
    [
        (WIDE, WIDE.adapt, 1, False, False, "optimizer"),  # where Muon's steps take more than the activations
        (SMOKE, SMOKE.pretrain, 6, False, False, "backward"),
        (replace(SMOKE, checkpointing=True), replace(SMOKE.adapt, optimizer="adamw"), 3, True, True, "backward"),
        (ADAPTERS, ADAPTERS.adapt, 6, False, True, "backward"),
    ],
    ids=["few tokens, Muon", "smoke", "checkpointing, micro-batches", "adapters in bfloat16"],
)
def test_a_step_takes_what_the_plan_states(monkeypatch, config, stage, sequences, several, segments, when):
    """segments: attention as on a GPU in half precision, else by the dense mask, which meta takes in float32."""
    monkeypatch.setattr(llm, "find_grids", lambda *_: None)
    monkeypatch.setattr(llm, "why_not_flash", lambda *_: None if segments else "not here")
    shapes, rows = rows_of(config, stage, sequences)
    stated = peak(config, stage, shapes, rows, World(), Sharing(), several)
    taken = on_cpu(config, stage, shapes, rows, several)
    assert stated.total == pytest.approx(taken, rel=0.05)
    assert stated.when == when


def test_ranks_hold_copies_or_pieces():
    stages = {name: replace(getattr(SMOKE, name), optimizer="adamw") for name in ("warmup", "pretrain", "adapt")}
    config = replace(SMOKE, **stages)
    shapes, rows = rows_of(config, config.adapt, 2)

    def held(ranks: int, parallel: str) -> Peak:
        return peak(config, config.adapt, shapes, rows, World(0, ranks, 2), Sharing(parallel))

    one, copy, pieces, halves = held(1, "ddp"), held(4, "ddp"), held(4, "fsdp"), held(4, "hsdp")
    assert copy.parts["gradients"] > one.parts["gradients"]  # they stay in DDP's buckets
    assert copy.parts["made by the step"] == pytest.approx(one.parts["made by the step"], rel=0.02)
    for name in ("parameters", "moments"):
        assert pieces.parts[name] == pytest.approx(one.parts[name] / 4, rel=0.05)
        assert halves.parts[name] == pytest.approx(one.parts[name] / 2, rel=0.05)
    assert not torch.distributed.is_initialized() and not hasattr(torch, "meta")


def test_storages_count_while_they_live():
    with Live("cpu") as live:
        a = torch.zeros(1024)
        b = a.view(32, 32)
        live.count(b, "named")
        assert live.now["named"] == 4096 and live.now.total() == 4096
        live.phase = "later"
        c = a + 1
        c.untyped_storage().resize_(0)
        assert live.now.total() == 4096
        del a, b
    assert live.now.total() == 0 and live.peak.total() == 8192 and live.when == "later"
