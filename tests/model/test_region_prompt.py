from copy import deepcopy

import pytest
import torch

from granvit.model.region_prompt import RegionPrompt, box_features
from granvit_kernels import PackedLayout, region_attention

LAYOUT = PackedLayout.from_grids([(4, 4), (2, 6)])
BOXES = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.3, 0.1, 0.35, 0.2], [0.5, 0.5, 1.0, 1.0]])
OWNERS = torch.tensor([0, 1, 1])


@pytest.fixture
def prompt():
    torch.manual_seed(0)
    return RegionPrompt(width=32, heads=4, tokens=3, outputs=24)


def test_a_box_sees_its_own_cells_of_its_own_image(prompt):
    features = torch.randn(LAYOUT.num_tokens, 32)
    before = prompt(features, LAYOUT, BOXES, OWNERS)
    assert before.shape == (3, 3, 24)
    rows, columns = LAYOUT.positions().T
    for r in range(3):
        h, w = LAYOUT.grids[OWNERS[r]].tolist()
        x1, y1, x2, y2 = (BOXES[r] * torch.tensor([w, h, w, h])).tolist()
        inside = (columns + 1 > x1) & (columns < x2) & (rows + 1 > y1) & (rows < y2)
        inside &= LAYOUT.image_ids() == OWNERS[r]
        changed = prompt(torch.where(inside[:, None], features, features + 1), LAYOUT, BOXES, OWNERS)
        torch.testing.assert_close(changed[r], before[r])
        changed = prompt(torch.where(inside[:, None], features * 2, features), LAYOUT, BOXES, OWNERS)
        assert (changed[r] - before[r]).abs().max() > 0.01


def test_where_the_box_is_reaches_the_tokens(prompt):
    """Equal features everywhere, so that only the geometry can tell two boxes apart."""
    features = torch.randn(32).expand(LAYOUT.num_tokens, -1)
    tokens = prompt(features, LAYOUT, BOXES[[0, 2]], torch.tensor([0, 0]))
    assert (tokens[0] - tokens[1]).abs().max() > 0.01


def test_boxes_inside_one_cell_differ_by_coverage(prompt):
    """Two boxes over the same two cells, but in other shares; without geometry only coverage tells."""
    torch.nn.init.zeros_(prompt.geometry.weight)
    boxes = torch.tensor([[0.20, 0.0, 0.26, 0.2], [0.24, 0.0, 0.30, 0.2]])
    tokens = prompt(torch.randn(LAYOUT.num_tokens, 32), LAYOUT, boxes, torch.tensor([0, 0]))
    assert (tokens[0] - tokens[1]).abs().max() > 0.01


def test_every_parameter_learns(prompt):
    prompt(torch.randn(LAYOUT.num_tokens, 32), LAYOUT, BOXES, OWNERS).square().sum().backward()
    for name, parameter in prompt.named_parameters():
        if name != "key.bias":  # softmax cancels it
            assert parameter.grad.abs().max() > 0, name


def by_keys_and_values(prompt, features, layout, boxes, image_index):
    """RegionPrompt.attend by keys and values of every token, as it once was: what saved models were trained with."""
    shape = (len(features), *prompt.queries.shape[1:])
    keys, values = prompt.key(features).view(shape), prompt.value(features).view(shape)
    return region_attention(prompt.queries, keys, values, layout, boxes, image_index, coverage=True)


def both_ways(attend, prompt, features, precision=None):
    """Output and the gradients of features and of the parameters that attention has. The last box meets no cell."""
    boxes = torch.cat((LAYOUT.to_grid(BOXES, OWNERS), torch.tensor([[3.0, 3.0, 2.0, 2.0]])))
    features = features.detach().requires_grad_()
    with torch.autocast("cpu", precision, enabled=precision is not None):
        seen = attend(prompt, features, LAYOUT, boxes, torch.cat((OWNERS, OWNERS[:1])))
    leaves = features, prompt.queries, prompt.key.weight, prompt.value.weight, prompt.value.bias
    upstream = torch.randn(seen.shape, generator=torch.Generator().manual_seed(1)).to(seen.dtype)
    return [seen.detach(), *torch.autograd.grad(seen, leaves, upstream)]


@pytest.fixture
def learned(prompt):
    """Queries as sharp and biases as large as training may leave them."""
    with torch.no_grad():
        prompt.queries.mul_(2)
        for layer in (prompt.key, prompt.value):
            torch.nn.init.normal_(layer.bias)
    return prompt


def test_attends_as_by_keys_and_values(learned):
    features = torch.randn(LAYOUT.num_tokens, 32)
    for ours, theirs in zip(both_ways(RegionPrompt.attend, learned, features),
                            both_ways(by_keys_and_values, learned, features), strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert {name: tuple(t.shape) for name, t in learned.state_dict().items() if "projector" not in name} == {
        "queries": (3, 4, 8), "key.weight": (32, 32), "key.bias": (32,), "value.weight": (32, 32), "value.bias": (32,),
        "geometry.weight": (32, 52), "geometry.bias": (32,),
    }  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_costs_no_more_than_keys_and_values_did(learned, autocast):
    features = torch.randn(LAYOUT.num_tokens, 32)
    if not autocast:
        learned, features = learned.bfloat16(), features.bfloat16()
    exact = both_ways(by_keys_and_values, deepcopy(learned).double(), features.double())
    precision = torch.bfloat16 if autocast else None
    results = [both_ways(attend, learned, features, precision) for attend in (RegionPrompt.attend, by_keys_and_values)]
    for ours, theirs, wanted in zip(*results, exact, strict=True):
        assert ours.dtype == theirs.dtype
        error, before = ((t.double() - wanted).norm() for t in (ours, theirs))
        assert error <= 1.25 * before  # of few numbers: at the size of a model it is .5 to 1.0


def test_box_features_are_bounded_and_distinct():
    features = box_features(torch.rand(50, 4))
    assert features.shape == (50, 52) and features.dtype == torch.float32
    assert features.abs().max() <= 1
    assert torch.pdist(features).min() > 0.05
