"""What the Triton backends share: where they can run, and the table of tuned launch configurations.

An operator's launch configuration is a frozen dataclass of its own, made by a rule from the call's shapes: lengths
vary from batch to batch, and searching at every new one would cost more than it gains. What was measured for a device
(`python bench/tune.py`) replaces the rule's choice.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
from pathlib import Path
from typing import Any, TypeVar

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TUNED = Path(__file__).parent / "tuned"
"""DEVICE.json each: {kernel: {key: {field: value}}}."""

CAPABILITY = (8, 0)
"""The oldest compute capability that the kernels are compiled and checked for."""

Config = TypeVar("Config")


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where the Triton kernels can run on tensors of `dtype` on `device`, else the reason."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, and the tensors are on {device.type}"
    if dtype not in DTYPES:
        return f"it takes {', '.join(map(str, DTYPES))}, not {dtype}"
    return _triton_why_not() or device_why_not(device.index)


@functools.cache
def _triton_why_not() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed: `pip install triton`"


@functools.cache
def device_why_not(index: int | None) -> str | None:
    """None where this CUDA device can run what is compiled for CAPABILITY and newer, else the reason."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here"
    if torch.version.hip is not None:
        return "it was never tried on ROCm"
    capability = torch.cuda.get_device_capability(index)
    if capability < CAPABILITY:
        oldest, this = (".".join(map(str, version)) for version in (CAPABILITY, capability))
        return f"it takes compute capability {oldest} or newer, not {this}"
    return None


def products_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """As why_not, for kernels with matrix products."""
    reason = why_not(device, dtype)
    if reason is None and dtype == torch.bfloat16 and _interpreted():
        return "Triton's interpreter (TRITON_INTERPRET) multiplies bfloat16's bits as if they were integers"
    return reason


@functools.cache
def _interpreted() -> bool:
    import triton

    from . import triton_common

    return not isinstance(triton_common.load_box, triton.JITFunction)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; an H100's for the interpreter and for a compilation ahead of time."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def tuned(kernel: str, key: tuple, default: Config, device: torch.device) -> Config:
    """`default` with what was measured for this kernel, key and device in place of its fields.

    key: what the choice depends on, numbers and words, as bench/tune.py wrote it.
    """
    if device.type != "cuda":
        return default  # the interpreter, or a compilation ahead of time
    return _tuned(kernel, key, default, device.index)


@functools.lru_cache(maxsize=4096)
def _tuned(kernel: str, key: tuple, default: Config, index: int | None) -> Config:
    fields = _table(_slug(index)).get(kernel, {}).get(key_text(key))
    return default if fields is None else dataclasses.replace(default, **fields)


def key_text(key: tuple) -> str:
    """A key as the table's JSON has it."""
    return " ".join(map(str, key))


@functools.cache
def _slug(index: int | None) -> str:
    return slug(torch.cuda.get_device_name(index))


def slug(device_name: str) -> str:
    """A device's name as a file's: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


@functools.cache
def _table(name: str) -> dict[str, Any]:
    path = TUNED / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`, at least 1."""
    return 1 << max(number - 1, 0).bit_length()
