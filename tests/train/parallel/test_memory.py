"""What backward passes keep: less with checkpointing, nothing of a frozen encoder, little of a frozen LLM."""

import copy
import runpy
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from granvit.data.batches import collate
from granvit.questions.schema import Region, Sample
from granvit.train.distill import Teacher
from granvit.train.optimizer import freeze
from granvit.train.parallel.memory import checkpoint_activations
from granvit.train.presets import PRESETS
from granvit.train.step import stage_loss

SMOKE = PRESETS["smoke"]
Kept = runpy.run_path(str(Path(__file__).parents[3] / "bench" / "kept.py"))["Kept"]
TASKS = ("global_caption", "bbox2caption", "caption2bbox")


@pytest.fixture()
def parts(tiny):
    """A model in training mode and a batch."""
    model, processor = tiny()
    regions = tuple(Region((0.1 * i, 0.2, 0.5 + 0.1 * i, 0.9), f"thing {i}", "natural") for i in range(3))
    noise = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (h, w, 3), generator=noise, dtype=torch.uint8) for h, w in ((40, 60), (64, 64))]
    samples = [Sample(str(i), image, "a scene", regions, "test", "") for i, image in enumerate(images)]
    asked = [processor.questions(one, TASKS) for one in samples]
    return model.train(), collate(samples, asked, processor, 128, SMOKE.crops)


def step(model, batch, stage, autocast: bool = False) -> tuple[int, dict[str, torch.Tensor]]:
    """The bytes kept for the backward pass of a stage's loss, and its gradients."""
    freeze(model.groups(), stage.train)
    teacher = Teacher(model.encoder, 0.9) if stage.distill else None
    model.zero_grad()
    with Kept(model) as kept, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = stage_loss(model, teacher, batch, stage, SMOKE.distill)["loss"]
    loss.backward()
    return kept.bytes, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(grads: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert grads.keys() == expected.keys()
    assert all(torch.equal(grads[name], grad) for name, grad in expected.items())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [SMOKE.pretrain, SMOKE.adapt], ids=lambda stage: stage.name)
def test_checkpointing_keeps_less_and_gives_the_same_gradients(parts, stage, autocast):
    model, batch = parts
    checkpointed = copy.deepcopy(model)
    checkpoint_activations(checkpointed)
    kept, expected = step(model, batch, stage, autocast)
    fewer, again = step(checkpointed, batch, stage, autocast)
    assert_equal(again, expected)
    assert fewer < 0.7 * kept


@contextmanager
def within(module, kept):
    """Yields a list that gets the storages which are kept while `module` runs."""
    storages, before = [], set()
    hooks = [
        module.register_forward_pre_hook(lambda *_: before.update(kept.storages)),
        module.register_forward_hook(lambda *_: storages.extend(set(kept.storages) - before)),
    ]
    yield storages
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_encoder_keeps_nothing(parts, frozen):
    model, batch = parts
    stage = SMOKE.adapt if frozen else replace(SMOKE.adapt, train=("encoder", "projector", "llm"))
    freeze(model.groups(), stage.train)
    kept = Kept(model)
    with within(model.encoder, kept) as storages, kept:
        stage_loss(model, None, batch, stage, SMOKE.distill)
    assert bool(storages) != frozen


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_llm_keeps_no_input_of_its_linear_layers(parts, frozen):
    """They are for the weights' gradients alone; what softmax and norms keep carries the gradient to the image."""
    model, batch = parts
    stage = replace(SMOKE.pretrain, distill=0.0)
    freeze(model.groups(), stage.train if frozen else ("encoder", "projector", "llm"))
    inputs = []
    for layer in model.llm.get_decoder().layers:
        for linear in (layer.self_attn.q_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
            linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with Kept(model) as kept:
        stage_loss(model, None, batch, stage, SMOKE.distill)["loss"].backward()
    assert len(inputs) == 6
    held = [one.untyped_storage()._cdata in kept.storages for one in inputs]
    assert not any(held) if frozen else all(held)
