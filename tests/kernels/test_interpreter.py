"""tests/helpers/interpreter.py: what it mends and refuses in Triton's interpreter."""

import os

import interpreter
import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not set")
interpreter.mend()


@triton.jit
def multiply(a, b, output, SIDE: tl.constexpr):
    i = tl.arange(0, SIDE)
    at = i[:, None] * SIDE + i[None, :]
    tl.store(output + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def convert(a, output, LENGTH: tl.constexpr):
    i = tl.arange(0, LENGTH)
    tl.store(output + i, tl.load(a + i).to(output.dtype.element_ty))


@triton.jit
def add_up(a, output, LENGTH: tl.constexpr):
    tl.store(output, tl.sum(tl.load(a + tl.arange(0, LENGTH))))


@triton.jit
def double(a, output, LENGTH: tl.constexpr):
    i = tl.arange(0, LENGTH)
    tl.store(output + i, tl.load(a + i) + tl.load(a + i))


def test_products_of_bfloat16():
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    output = torch.empty(16, 16)
    multiply[(1,)](a, b, output, SIDE=16)
    torch.testing.assert_close(output, a.float() @ b.float())


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.int32], ids=str)
def test_casts_to_bfloat16_and_back(source):
    ties = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1.998, 0.1, 300.7, 6000.7, 0.0]
    numbers = torch.tensor(ties if source.is_floating_point else [0, 1, -3, 257, 259, 2**20, 77, -1000], dtype=source)
    rounded, back = torch.empty(8, dtype=torch.bfloat16), torch.empty(8, dtype=source)
    convert[(1,)](numbers, rounded, LENGTH=8)
    convert[(1,)](rounded, back, LENGTH=8)
    assert torch.equal(rounded, numbers.to(torch.bfloat16)) and torch.equal(back, rounded.to(source))


@pytest.mark.parametrize("kernel", [add_up, double], ids=["sum", "addition"])
def test_other_arithmetic_on_bfloat16_is_refused(kernel):
    numbers = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="cast to float32"):
        kernel[(1,)](numbers, torch.empty(16, dtype=torch.bfloat16), LENGTH=16)
