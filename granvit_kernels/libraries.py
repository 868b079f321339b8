"""Libraries that can do a part of a training step in PyTorch's place: flash-attn 2 and 3, and NVIDIA's apex.

None is used unasked, as no measurement of ours shows one to be faster; but flash-attn-2 is where torch is older than
2.11. GRANVIT_LIBRARIES names those to use, such as "flash-attn-3,apex". What is named and can't run is an error that
says why.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass

import torch

VARIABLE = "GRANVIT_LIBRARIES"


@dataclass(frozen=True)
class Library:
    """part: what it does. module: what is imported. capabilities: the GPUs it is for, by the major number of their
    compute capability."""

    part: str
    module: str
    capabilities: range


LIBRARIES = {
    "flash-attn-3": Library("encoder's attention", "flash_attn_interface", range(9, 10)),
    "flash-attn-2": Library("encoder's attention", "flash_attn", range(8, 100)),
    "apex": Library("AdamW", "apex.optimizers", range(7, 100)),
}


def why_not(name: str) -> str | None:
    """None where a library can run here, else the reason."""
    library = LIBRARIES[name]
    try:
        importlib.import_module(library.module)
    except Exception as error:  # a build for another torch raises whatever its loader raises
        return f"{library.module} can't be imported ({type(error).__name__}: {error})"
    if not torch.cuda.is_available():
        return "no CUDA device"
    major = torch.cuda.get_device_capability()[0]
    if major not in library.capabilities:
        return f"it is not for GPUs of compute capability {major}.x"
    return None


def named(part: str) -> str | None:
    """The library that GRANVIT_LIBRARIES names for a part; None where it names none. Raises RuntimeError for a name
    that is none of LIBRARIES, for two of one part, and with the reason for one that can't run."""
    names = _asked()
    if unknown := [name for name in names if name not in LIBRARIES]:
        raise RuntimeError(f"{VARIABLE} names {unknown[0]!r}; it takes {', '.join(LIBRARIES)}")
    names = [name for name in names if LIBRARIES[name].part == part]
    if len(names) > 1:
        raise RuntimeError(f"{VARIABLE} names {' and '.join(names)} for the {part}; it takes one of them")
    if names and (reason := why_not(names[0])):
        raise RuntimeError(f"{VARIABLE} names {names[0]}, which can't run: {reason}")
    return names[0] if names else None


def _asked() -> list[str]:
    """What GRANVIT_LIBRARIES names."""
    return list(filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(","))))


def survey() -> list[tuple[str, str, str | None]]:
    """(part, library, why it is not used here or None) of each library."""
    asked, rows = _asked(), []
    for name, library in LIBRARIES.items():
        reason = why_not(name) or (None if name in asked else f"not named in {VARIABLE}: never measured to be faster")
        rows.append((library.part, name, reason))
    return rows
