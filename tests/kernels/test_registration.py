"""How operators meet torch where it records calls: torch.jit.trace. Compilation, export and transforms stand in each
operator's own tests."""

import pytest
import torch

from granvit_kernels import PackedLayout, region_attention, region_pool, roi_gather

LAYOUT = PackedLayout.from_grids([(4, 5), (3, 2)])
WHERE = LAYOUT, torch.tensor([[0.2, 0.4, 3.1, 2.0], [0, 0, 2, 3], [1, 1, 5, 4]]), torch.tensor([0, 1, 0])


def gather(x):
    return roi_gather(x, *WHERE)


def attend(x):
    key = x.view(26, 2, 4)
    return region_attention(x[:3].reshape(3, 1, 2, 4), key, 2 * key, *WHERE, coverage=True)


def attend_shared(x):
    key = x.view(26, 2, 4)
    return region_attention(x[:3].reshape(3, 2, 4), key, 2 * key, *WHERE, return_lse=True)[1]


def pool(x):
    return region_pool(x[:, :6].view(26, 3, 2), x[:, None], *WHERE, coverage=True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.* is deprecated")
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("run", [gather, attend, attend_shared, pool])
def test_a_trace_computes_anew(run, needs_grad):
    x = torch.randn(26, 8, generator=torch.Generator().manual_seed(0), requires_grad=needs_grad)
    traced = torch.jit.trace(run, x)
    other = (2 * x).detach().requires_grad_(needs_grad)
    assert torch.equal(traced(other), run(other))
    if needs_grad:
        grads = [torch.autograd.grad(function(other).square().sum(), other)[0] for function in (traced, run)]
        assert torch.equal(*grads)
