import pytest
import torch

from granvit.model.region_prompt import RegionPrompt, box_features
from granvit_kernels import PackedLayout

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


def test_box_features_are_bounded_and_distinct():
    features = box_features(torch.rand(50, 4))
    assert features.shape == (50, 52) and features.dtype == torch.float32
    assert features.abs().max() <= 1
    assert torch.pdist(features).min() > 0.05
