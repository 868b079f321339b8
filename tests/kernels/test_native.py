"""The native library's reasons, given when it is needed."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from granvit_kernels import native

CPU = torch.device("cpu")


@pytest.fixture
def reload(monkeypatch):
    """The library is looked for again, within this test only."""
    native._load.cache_clear()
    yield monkeypatch
    native._load.cache_clear()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("_native"), "the native library is not built: run `pip install -e .`"),
        (ImportError("libgomp.so.1: no such file"), "the native library does not load: libgomp.so.1"),
    ],
)
def test_missing_and_broken_libraries(reload, error, reason):
    def fail(name):
        raise error

    reload.setattr(native.importlib, "import_module", fail)
    assert reason in native.why_not() and reason in native.cpu_why_not(CPU, torch.float32)
    with pytest.raises(RuntimeError, match=reason):
        native.library()


@pytest.mark.parametrize("attributes", [{}, {"interface": native.INTERFACE - 1}])
def test_a_library_of_other_sources_is_told_apart(reload, attributes):
    reload.setattr(native.importlib, "import_module", lambda name: SimpleNamespace(**attributes))
    with pytest.raises(RuntimeError, match="of other sources .*: run `pip install -e .`"):
        native.library()


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
def test_an_unknown_instruction_set_is_named_on_use_not_on_import():
    code = "from granvit_kernels import native; print(native.why_not())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "GRANVIT_KERNELS_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "GRANVIT_KERNELS_ISA=sse9: it takes base, avx2 or avx512" in result.stdout


def test_reasons_of_cpu_kernels():
    assert "the tensors are on meta" in native.cpu_why_not(torch.device("meta"), torch.float32)
    assert "not torch.float64" in native.cpu_why_not(CPU, torch.float64)
