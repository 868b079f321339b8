"""An encoder behind the adapter trains on several ranks, compiled and with less kept, as it does by itself."""

from dataclasses import replace

import pytest
import ranks
import torch
from launching import run_ranks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from granvit.cost.flops import Counts, Sizes, operations
from granvit.model.encoders import random_encoder
from granvit.train.distill import Teacher
from granvit.train.parallel.compiling import blocks
from granvit.train.parallel.distributed import units
from granvit.train.parallel.memory import checkpoint_activations
from granvit.train.presets import save_config
from granvit.world import World
from granvit_kernels import PackedLayout

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "num_register_tokens": 2,
    "drop_path_rate": 0.3,
}  # fmt: skip


def encoder():
    torch.manual_seed(0)
    return random_encoder(AutoConfig.for_model("dinov2_with_registers", image_size=24, patch_size=4, **SIZES)).train()


@pytest.mark.slow
def test_ranks_find_what_one_process_does(small_config, sample_set, tmp_path):
    """Ranks have different numbers of grids, and in the splits no picture."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("dinov2_with_registers", image_size=48, patch_size=16, **SIZES)
    random_encoder(config).to_transformers().save_pretrained(tmp_path / "start")
    stages = {name: replace(getattr(small_config, name), packs=4) for name in ("pretrain", "adapt")}
    model = replace(small_config.model, encoder=str(tmp_path / "start"))
    data = replace(small_config.data, path=str(sample_set), capacity=128, fault_budget=1.0)
    config = replace(small_config, **stages, model=model, data=data)
    save_config(config, tmp_path / "config.yaml")
    run_ranks(ranks.keep_adapted, 2, tmp_path)
    expected = ranks.adapted(config, tmp_path, World(), "ddp")
    for parallel in ("ddp", "fsdp"):
        for case, ours in torch.load(tmp_path / f"{parallel}.pt").items():
            for line, other in zip(ours["lines"], expected[case]["lines"], strict=True):
                for name in ("loss", "loss_distill", "grad_norm"):
                    got, wanted = line.get(name, 0), other.get(name, 0)
                    assert got == pytest.approx(wanted, rel=1e-4), (parallel, case, name)
            for name, value in expected[case]["weights"].items():
                if "exp_avg" in name and "k_proj.bias" not in name:
                    torch.testing.assert_close(ours["weights"][name], value, rtol=0, atol=1e-4, msg=name)


def test_units_of_fsdp():
    """The encoder as a whole, since ranks run its blocks different numbers of times."""
    model = torch.nn.ModuleList([encoder(), torch.nn.Linear(2, 2)])
    assert units(model) == [model[0]] and units(model[0]) == [model[0]] and len(list(blocks(model))) == 2


def test_teacher_checkpointing_and_compilation():
    student = encoder()
    teacher = Teacher(student, 0.9)
    layout = PackedLayout.from_grids([(2, 3), (4, 4), (2, 3)])
    patches = torch.randn(layout.num_tokens, 48)
    expected = student(patches, layout)
    assert torch.equal(teacher.encoder(patches, layout), expected)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    checkpoint_activations(student)
    for block in blocks(student):
        block.compile(dynamic=True, backend="aot_eager")  # what is traced, without a compiler's minutes
    student.zero_grad()
    got = student(patches, layout)
    got.square().sum().backward()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-4, msg=name)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    teacher.update(student)
    ours, theirs = teacher.encoder.model.layernorm.weight, student.model.layernorm.weight
    torch.testing.assert_close(ours, theirs - 0.9)


def test_operations_are_those_that_torch_counts(tiny):
    model, _ = tiny()
    model.encoder = encoder()
    sizes = Sizes.of(model)
    layout = PackedLayout.from_grids([(2, 3), (4, 4), (2, 3)])
    lengths = [6, 16, 6]
    counts = Counts(images=3, patches=sum(lengths), patch_pairs=sum(length**2 for length in lengths))
    patches = torch.randn(layout.num_tokens, 48)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.encoder(patches, layout).sum().backward()
    assert counter.get_total_flops() == operations(sizes, counts, ("encoder",)).parts["encoder"]
