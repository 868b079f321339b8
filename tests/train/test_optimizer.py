"""Muon beside torch's own, and what it is given."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from granvit.toy.tiny import build_tiny
from granvit.train.optimizer import Muon, hidden_matrices, make_optimizer, orthogonalized
from granvit.train.presets import PRESETS

MUON = replace(PRESETS["smoke"].pretrain, train=("encoder", "projector", "llm"), distill=0.0, optimizer="muon")


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 48, 128), (2, 128, 48)])
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    before = torch.linalg.svdvals(matrices := torch.randn(shape) * 1e-3)
    after = torch.linalg.svdvals(orthogonalized(matrices))
    large = before > before.max() / 50  # smaller ones take more steps
    assert 0.6 < after[large].min() and after.max() < 1.3


def test_steps_are_those_of_torch_on_matrices_and_of_adamw_on_the_rest():
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((32, 64), (64, 32), (32, 64), (5, 7))]
    ours, theirs = ([nn.Parameter(weight.clone()) for weight in start] for _ in range(2))
    common = {"lr": 0.02, "weight_decay": 0.1}
    groups = [{"params": ours[:3], "muon": True, **common}, {"params": ours[3:], "muon": False, **common}]
    muon = Muon(groups, betas=(0.9, 0.98))
    for parameter in ours[:3]:
        muon.state[parameter] = {"momentum": torch.zeros_like(parameter)}
    others = [
        torch.optim.Muon(theirs[:3], **common, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[3:], **common, betas=(0.9, 0.98)),
    ]
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in (muon, *others):
            optimizer.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        moved = (other - before).norm()
        assert moved > 0.1 and (mine - other).norm() < 0.02 * moved  # torch's are rounded to bfloat16


def test_a_step_of_muon_that_is_to_change_nothing_does_so():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((64, 64), (64, 64), (5, 7))]
    groups = [{"params": parameters[i : i + 2], "muon": not i, "weight_decay": 0.1} for i in (0, 2)]
    muon = Muon(groups, betas=(0.9, 0.98))
    for parameter in parameters[:2]:
        muon.state[parameter] = {"momentum": torch.randn(64, 64)}
    for gradient in (1.0, torch.nan, torch.inf):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, gradient)
        tensors = [*parameters, *(value for state in muon.state.values() for value in state.values())]
        before = [tensor.detach().clone() for tensor in tensors]
        muon.found_inf.fill_(gradient != 1)
        muon.step()
        assert [torch.equal(*pair) for pair in zip(before, tensors, strict=True)] == [gradient != 1] * len(tensors)


def test_muon_takes_linear_layers_and_no_table():
    model, _ = build_tiny(["a red ball", "a blue ring"])
    matrices = {name for name, parameter in model.named_parameters() if parameter in hidden_matrices(model)}
    assert matrices > {"encoder.embeddings.patch_embedding.weight", "llm.model.layers.0.mlp.up_proj.weight"}
    tables = ("embed_tokens", "position_embedding", "locations")
    assert not [name for name in matrices if any(table in name for table in tables)]
    optimizer = make_optimizer(model.groups(), MUON, hidden_matrices(model))
    kinds = {p: group["muon"] for group in optimizer.param_groups for p in group["params"]}
    assert kinds.keys() == set(model.parameters())
    assert {name for name, parameter in model.named_parameters() if kinds[parameter]} == matrices


def test_muon_on_pieces_is_refused():
    with pytest.raises(ValueError, match="pretrain.optimizer is 'muon'; parallel fsdp .* adamw"):
        replace(PRESETS["paper"], parallel="fsdp", pretrain=replace(PRESETS["paper"].pretrain, optimizer="muon"))
    replace(PRESETS["paper"], sft=replace(PRESETS["paper"].sft, optimizer="muon"))  # it has no steps
