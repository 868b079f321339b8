"""Which backend runs, forcing one, and the table."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from granvit_kernels import PackedLayout, backends, roi_gather

PROBLEM = {"device": torch.device("cpu"), "dtype": torch.float32}


def module(reason: str | None) -> SimpleNamespace:
    return SimpleNamespace(why_not=lambda device, dtype: reason)


OPERATORS = ("pack_patches", "plan_packing", "region_attention", "region_pool", "roi_gather")


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    backends._forced.cache_clear()
    yield
    backends._forced.cache_clear()


@pytest.fixture
def two_operators(monkeypatch):
    """The variable may name `thing` and `other`."""
    monkeypatch.setattr(backends, "operators", lambda: {"thing": {}, "other": {}})


def test_the_best_that_can_run():
    able, unable = module(None), module("no GPU")
    candidates = {"reference": module(None), "cpu": able, "cuda": unable}
    assert backends.choose("thing", candidates, **PROBLEM) is able


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("cpu", "cpu: not built"),
        ("cuda", "triton: not installed"),
        *((device, "triton: not installed; cpu: not built") for device in ("mps", "xpu", "hpu", "privateuseone")),
    ],
)
def test_missing_kernels_are_said_once_where_the_reference_stands_in(device, reason):
    backends._warn.cache_clear()
    candidates = {"reference": module(None), "cpu": module("not built"), "triton": module("not installed")}
    problem = {"device": torch.device(device), "dtype": torch.float32}
    with pytest.warns(RuntimeWarning, match=f"runs its slow reference: {reason}$") as seen:
        for _ in range(2):
            assert backends.choose("thing", candidates, **problem) is candidates["reference"]
    assert len(seen) == 1
    backends._warn.cache_clear()


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_of_meta():
    candidates = {"reference": module(None), "cpu": module("not on meta"), "triton": module("not on meta")}
    problem = {"device": torch.device("meta"), "dtype": torch.float32}
    assert backends.choose("thing", candidates, **problem) is candidates["reference"]


@pytest.mark.parametrize("operator", ["pack_patches", "region_attention", "region_pool", "roi_gather"])
def test_accelerators_without_kernels_are_named(operator):
    backends._warn.cache_clear()
    candidates = backends.operators()[operator]
    with pytest.warns(RuntimeWarning, match="slow reference: .*on mps; cpu: it runs on the CPU.*on mps$"):
        problem = {"device": torch.device("mps"), "dtype": torch.float32}
        assert backends.choose(operator, candidates, **problem) is candidates["reference"]
    backends._warn.cache_clear()


@pytest.mark.filterwarnings("error")
def test_float64_is_the_references_own():
    candidates = {"reference": module(None), "cpu": module("it takes float32")}
    problem = {"device": torch.device("cpu"), "dtype": torch.float64}
    assert backends.choose("thing", candidates, **problem) is candidates["reference"]


def test_none_can_run():
    candidates = {"reference": module("too big"), "cuda": module("no GPU")}
    with pytest.raises(RuntimeError, match="no backend can run thing: cuda: no GPU; reference: too big"):
        backends.choose("thing", candidates, **PROBLEM)


@pytest.mark.parametrize(
    "value", ["reference", "thing=reference", "other=cuda, thing = reference", "cpu,thing=reference"]
)
@pytest.mark.usefixtures("two_operators")
def test_forced(monkeypatch, value):
    monkeypatch.setenv(backends.VARIABLE, value)
    candidates = {"reference": module(None), "cpu": module(None)}
    assert backends.choose("thing", candidates, **PROBLEM) is candidates["reference"]


@pytest.mark.usefixtures("two_operators")
def test_forcing_another_operator_changes_nothing(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "other=reference")
    candidates = {"reference": module(None), "cpu": module(None)}
    assert backends.choose("thing", candidates, **PROBLEM) is candidates["cpu"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("cuda", "forces cuda for thing, which can't run: no GPU"),
        ("triton", "forces triton, and thing has only cuda, reference"),
        ("gpu", "GRANVIT_KERNELS_BACKEND is 'gpu'; it takes cuda, triton, cpu, reference"),
        ("thingg=cuda", "is 'thingg=cuda'; it takes .* with the operators thing, other"),
        ("*=gpu", "is '\\*=gpu'; it takes"),
    ],
)
@pytest.mark.usefixtures("two_operators")
def test_forced_and_unable(monkeypatch, value, message):
    monkeypatch.setenv(backends.VARIABLE, value)
    with pytest.raises(RuntimeError, match=message):
        backends.choose("thing", {"cuda": module("no GPU"), "reference": module(None)}, **PROBLEM)


def test_forcing_reaches_a_real_operator(monkeypatch):
    layout = PackedLayout.from_grids([(2, 2)])
    arguments = torch.zeros(4, 3), layout, torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    monkeypatch.setenv(backends.VARIABLE, "roi_gather=triton")
    with pytest.raises(RuntimeError, match="triton"):
        roi_gather(*arguments)
    monkeypatch.setenv(backends.VARIABLE, "roi_gather=reference")
    assert roi_gather(*arguments).shape == (1, 7, 7, 3)
    monkeypatch.setenv("GRANVIT_KERNELS_BACKEND", "roi_gater=reference")
    with pytest.raises(RuntimeError, match=f"roi_gater=reference.*operators {', '.join(OPERATORS)}"):
        roi_gather(*arguments)


def test_every_operator_has_a_reference_that_runs_here():
    rows = backends.survey()
    assert {operator for operator, *_ in rows} == set(OPERATORS)
    for operator in {operator for operator, *_ in rows}:
        assert (operator, "reference", None) in rows


def test_table_says_what_runs_and_why_not(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = subprocess.run(
        [sys.executable, "-m", "granvit_kernels"], capture_output=True, text=True, check=True
    )
    for word in (*OPERATORS, "cpu", "reference", "yes", "native library:", torch.__version__):
        assert word in result.stdout
    monkeypatch.setenv("GRANVIT_KERNELS_ISA", "sse9")
    monkeypatch.setenv(backends.VARIABLE, "reference")
    result = subprocess.run(
        [sys.executable, "-m", "granvit_kernels"], capture_output=True, text=True, check=True
    )
    assert "GRANVIT_KERNELS_BACKEND=reference forces a backend" in result.stdout
