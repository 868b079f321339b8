"""The native library, granvit_kernels._native: loaded when first needed, else a clear reason."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch  # noqa: F401  before the library, so that both share one OpenMP runtime

INTERFACE = 5
"""Of csrc/bindings.cpp: raise it with every change there that callers can tell. CMake reads this line and compiles the
number in, so that a library built from other sources is told apart here instead of failing somewhere in a call."""

REBUILD = "run `pip install -e .` in granvit's folder"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What csrc/common/dtype.h calls each dtype that the kernels store."""


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module(f"{__package__}._native")
        built = getattr(module, "interface", None)
        if built != INTERFACE:
            return None, f"the native library is of other sources (interface {built}, not {INTERFACE}): {REBUILD}"
        module.isa()  # an unusable GRANVIT_KERNELS_ISA shows here
    except ModuleNotFoundError:
        return None, f"the native library is not built: {REBUILD}"
    except (ImportError, RuntimeError) as error:
        return None, f"the native library does not load: {error}"
    return module, None


def why_not() -> str | None:
    """None if the native library is usable, else the reason."""
    return _load()[1]


def library() -> ModuleType:
    """The native library. Raises RuntimeError with the reason where it can't be loaded."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def cpu_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """why_not of every C++ kernel for the CPU: tensors there, a dtype of DTYPES, and the library."""
    if device.type != "cpu":
        return f"it runs on the CPU, and the tensors are on {device.type}"
    if dtype not in DTYPES:
        return f"it takes {', '.join(map(str, DTYPES))}, not {dtype}"
    return why_not()
