import pytest
import torch

from granvit.model.projector import Projector, shuffle_pixels
from granvit_kernels import PackedLayout


@pytest.mark.parametrize("inputs, outputs", [(64, 96), (256, 32)])
def test_outputs_begin_at_unit_rms_times_scale(inputs, outputs):
    torch.manual_seed(0)
    projector = Projector(inputs, outputs)
    projector.scale.fill_(0.05)
    out = projector(7 + 3 * torch.randn(4096, inputs))
    assert out.square().mean().sqrt().item() == pytest.approx(0.05, rel=0.1)


def test_shuffle_merges_neighbours_and_completes_odd_sides():
    layout = PackedLayout.from_grids([(2, 4), (3, 3), (1, 1)])
    tokens = torch.arange(layout.num_tokens, dtype=torch.float32)[:, None]
    merged, smaller = shuffle_pixels(tokens, layout, 2)
    assert smaller.grids.tolist() == [[1, 2], [2, 2], [1, 1]]
    assert merged.tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        *[[8, 9, 11, 12], [10, 10, 13, 13], [14, 15, 14, 15], [16, 16, 16, 16]],
        [17, 17, 17, 17],
    ]


def test_shuffle_keeps_gradients_of_every_token():
    layout = PackedLayout.from_grids([(3, 5), (4, 4)])
    tokens = torch.randn(layout.num_tokens, 3, requires_grad=True)
    shuffle_pixels(tokens, layout, 2)[0].sum().backward()
    assert (tokens.grad >= 1).all()


def test_no_shuffle_and_no_images():
    layout = PackedLayout.from_grids([(2, 2)])
    tokens = torch.randn(4, 3)
    assert shuffle_pixels(tokens, layout, 1) == (tokens, layout)
    empty = PackedLayout.from_grids([])
    assert shuffle_pixels(tokens[:0], empty, 2)[0].shape == (0, 12)
