"""Compiled blocks compute what eager ones do, and sizes that change from step to step compile nothing anew."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from granvit.data.batches import collate
from granvit.questions.schema import Region, Sample
from granvit.train.distill import Teacher
from granvit.train.optimizer import freeze
from granvit.train.parallel.compiling import blocks, compile_blocks, compiled_graphs, eager
from granvit.train.parallel.memory import checkpoint_activations
from granvit.train.presets import PRESETS
from granvit.train.step import stage_loss

SMOKE = PRESETS["smoke"]
TASKS = ("global_caption", "bbox2caption", "caption2bbox")
STEPS = 20


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def sample(seed: int) -> Sample:
    draw = random.Random(seed)
    height, width = draw.randrange(24, 100), draw.randrange(24, 100)
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    boxes = [(draw.random() / 2, draw.random() / 2, 0.6 + draw.random() / 3, 0.9) for _ in range(seed % 4)]
    regions = tuple(Region(box, f"thing {i}", "natural", None) for i, box in enumerate(boxes))
    return Sample(id=str(seed), image=image, caption="a scene", regions=regions, source="test", licence="")


def batch(processor, seed: int, images: int | None = None, capacity: int = 128):
    draw = random.Random(seed)
    samples = [sample(draw.randrange(1000)) for _ in range(images or draw.randrange(4, 9))]
    return collate(samples, [processor.questions(one, TASKS) for one in samples], processor, capacity, SMOKE.crops)


def run(model, teacher, one, stage) -> SimpleNamespace:
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = stage_loss(model, teacher, one, stage, SMOKE.distill)["loss"]
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return SimpleNamespace(loss=loss.detach(), grads=grads)


def steps(tiny, stage, checkpointing: bool, backend: str | None) -> None:
    """Twenty different batches after a warm-up: as eager, and no graph more than after the warm-up."""
    model, processor = tiny()
    freeze(model.train().groups(), stage.train)
    plain = copy.deepcopy(model)
    teachers = [Teacher(one.encoder, 0.9) if stage.distill else None for one in (plain, model)]
    compile_blocks(model)
    if teachers[1] is not None:
        compile_blocks(teachers[1].encoder)
    if checkpointing:
        checkpoint_activations(model)
    stance = torch.compiler.set_stance("default", force_backend=backend)
    seen, after_warm_up = set(), None
    for seed in range(2 + STEPS):
        one = batch(processor, seed)
        seen.add((one.packed.input_ids.shape, len(one.packed.images)))
        with stance:
            compiled = run(model, teachers[1], one, stage)
        expected = run(plain, teachers[0], one, stage)
        torch.testing.assert_close(compiled.loss, expected.loss, rtol=1e-5, atol=1e-5)
        assert compiled.grads.keys() == expected.grads.keys()
        for name, grad in expected.grads.items():
            assert (compiled.grads[name] - grad).abs().max() <= 1e-4 * max(1.0, grad.abs().max()), name
        if seed == 1:
            after_warm_up = compiled_graphs()
            assert after_warm_up > 0
    assert compiled_graphs() == after_warm_up
    assert len(seen) > STEPS / 2


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("stage", [SMOKE.pretrain, SMOKE.adapt], ids=lambda stage: stage.name)
def test_other_sizes_compile_nothing_anew(tiny, stage, checkpointing):
    steps(tiny, stage, checkpointing, "aot_eager")


@pytest.mark.slow
def test_inductor_s_code_serves_every_size(tiny):
    steps(tiny, SMOKE.pretrain, False, None)


def test_copies_are_not_compiled_and_eager_runs_nothing_compiled(tiny):
    model, processor = tiny()
    compile_blocks(model)
    assert len(list(blocks(model))) == 4 and all(block._compiled_call_impl for block in blocks(model))
    assert not any(block._compiled_call_impl for block in blocks(copy.deepcopy(model)))
    with eager():
        model(batch(processor, 0).packed)
    assert compiled_graphs() == 0
