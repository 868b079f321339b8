"""Values that are not finite stay with the regions and tokens that they belong to, in every backend."""

import importlib.util
import os

import interpreter
import pytest
import torch

from granvit_kernels import PackedLayout
from granvit_kernels.native import cpu_why_not
from granvit_kernels.ops import region_attention, region_pool, roi_gather

interpreted = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
if interpreted:
    interpreter.mend()
needs_interpreter = pytest.mark.skipif(not interpreted, reason="needs Triton and TRITON_INTERPRET")
why_no_library = cpu_why_not(torch.device("cpu"), torch.float32)
needs_library = pytest.mark.skipif(why_no_library is not None, reason=str(why_no_library))
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy tells of every infinity
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.parametrize(
        "backend",
        ["reference", pytest.param("cpu", marks=needs_library), pytest.param("triton", marks=needs_interpreter)],
    ),
]

LAYOUT = PackedLayout.from_grids([(4, 5), (1, 2)])
BOXES = torch.tensor([[0.2, 0.3, 2.1, 0.9], [2.4, 1.2, 4.9, 3.9], [0.0, 0.0, 2.0, 1.0]])
TOKEN = 13  # row 2, column 3 of the first image: of the second box alone
PLACE = LAYOUT.grids, LAYOUT.cu_seqlens, BOXES, torch.tensor([0, 0, 1])
ELSEWHERE = torch.tensor([0, 2])  # the regions other than the one with a value that is not finite


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ratio", [2, 0])
def test_roi_gather(backend, ratio):
    kernels = roi_gather.CANDIDATES["roi_gather"]
    kernel, size = kernels[backend], (2, 2)
    tokens, grad, only = normal(LAYOUT.num_tokens, 8), normal(3, *size, 8), torch.zeros(3, *size, 8)
    only[1] = 1
    reads = kernels["reference"].backward(only, *PLACE, LAYOUT.num_tokens, ratio)[:, 0] > 0
    assert 0 < reads.sum() < 20

    clean = kernel.backward(grad, *PLACE, LAYOUT.num_tokens, ratio)
    grad[1, ..., :4], grad[1, ..., 4:] = float("inf"), float("nan")
    gradient = kernel.backward(grad, *PLACE, LAYOUT.num_tokens, ratio)
    assert torch.equal(gradient[~reads], clean[~reads]) and not gradient[reads].isfinite().any()

    clean = kernel.forward(tokens, *PLACE, *size, ratio)
    tokens[TOKEN, :4], tokens[TOKEN, 4:] = float("inf"), float("nan")
    output = kernel.forward(tokens, *PLACE, *size, ratio)
    assert torch.equal(output[ELSEWHERE], clean[ELSEWHERE]) and not output[1].isfinite().all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("where", ["grad_output", "grad_lse", "query", "key", "value"])
def test_region_attention(backend, bad, where):
    """One head of one region: the other head and other regions' tokens get what they would get without it."""
    kernel = region_attention.CANDIDATES["region_attention"][backend]
    tensors = {name: normal(3, 2, 2, 8) for name in ("grad_output", "query")}
    tensors |= {name: normal(LAYOUT.num_tokens, 2, 8) for name in ("key", "value")}
    tensors["grad_lse"] = normal(3, 2, 2)
    cells = torch.zeros(4, 5, dtype=torch.bool)
    cells[1:4, 2:5] = True
    met = torch.cat([cells.flatten(), torch.zeros(2, dtype=torch.bool)])

    def both_ways():
        inputs = [tensors[name] for name in ("query", "key", "value")]
        output, lse = kernel.forward(*inputs, *PLACE, 0.35, True)
        upstream = tensors["grad_output"], tensors["grad_lse"]
        return output, lse, *kernel.backward(*upstream, *inputs, output, lse, *PLACE, 0.35, True)

    clean = both_ways()
    row = TOKEN if where in ("key", "value") else 1
    if where == "grad_lse":
        tensors[where][row, 0, 1] = bad
    else:
        tensors[where][row, ..., 1, 3] = bad
    poisoned = both_ways()
    for ours, right in zip(poisoned[:3], clean[:3], strict=True):
        assert torch.equal(ours[ELSEWHERE], right[ELSEWHERE]) and torch.equal(ours[1, :, 0], right[1, :, 0])
    for ours, right in zip(poisoned[3:], clean[3:], strict=True):
        assert torch.equal(ours[~met], right[~met]) and torch.equal(ours[:, 0], right[:, 0])
    grad_key, grad_value = poisoned[3:]
    assert not grad_key[met, 1].isfinite().all(-1).any()
    if where == "grad_output":
        assert not grad_value[met, 1].isfinite().all(-1).any()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("where", ["grad_output", "grad_lse", "logits", "value"])
def test_region_pool(backend, bad, where, heads):
    """One head of one region: other regions' tokens, and the other head if it has values of its own, get what they
    would get without it."""
    if backend not in region_pool.CANDIDATES["region_pool"]:
        pytest.skip(f"region_pool has no backend {backend}")
    kernel = region_pool.CANDIDATES["region_pool"][backend]
    tensors = {"grad_output": normal(3, 2, heads, 8), "grad_lse": normal(3, 2, heads)}
    tensors |= {"logits": normal(LAYOUT.num_tokens, 2, heads), "value": normal(LAYOUT.num_tokens, heads, 8)}
    cells = torch.zeros(4, 5, dtype=torch.bool)
    cells[1:4, 2:5] = True
    met = torch.cat([cells.flatten(), torch.zeros(2, dtype=torch.bool)])

    def both_ways():
        inputs = tensors["logits"], tensors["value"]
        output, lse = kernel.forward(*inputs, *PLACE, True)
        upstream = tensors["grad_output"], tensors["grad_lse"]
        return output, *kernel.backward(*upstream, *inputs, output, lse, *PLACE, True)

    clean = both_ways()
    row, head = TOKEN if where in ("logits", "value") else 1, heads - 1
    tensors[where][(row, 0, head) if where in ("grad_lse", "logits") else (row, ..., head, 3)] = bad
    poisoned = both_ways()
    assert torch.equal(poisoned[0][ELSEWHERE], clean[0][ELSEWHERE])
    for ours, right, dim in zip(poisoned[1:], clean[1:], (2, 1), strict=True):
        assert torch.equal(ours[~met], right[~met])
        assert heads == 1 or torch.equal(ours.select(dim, 0), right.select(dim, 0))
    assert not poisoned[1][met, 0, head].isfinite().any()
    if where == "grad_output":
        assert not poisoned[2][met, head].isfinite().all(-1).any()
