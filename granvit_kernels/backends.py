"""Which backend runs an operator.

A backend is a module with `why_not(device, dtype, **problem) -> str | None`: None where it can run, else the
reason. `problem` is what else decides; each of its arguments has a default, so that the table of `python -m
granvit_kernels` can ask without one. Each package under granvit_kernels.ops lists its own in CANDIDATES =
{operator: {backend: module}}.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import warnings
from types import ModuleType
from typing import Any

import torch

ORDER = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu", "reference": "cpu"}
"""{backend: the device it is for}, best first. The reference runs on any."""

VARIABLE = "GRANVIT_KERNELS_BACKEND"


def choose(operator: str, candidates: dict[str, ModuleType], **problem: Any) -> ModuleType:
    """The first backend of ORDER that can run the problem, or the one that GRANVIT_KERNELS_BACKEND forces.

    problem: device (torch.device), dtype, and what else the operator's backends decide by; nothing for an operator
    on host numbers.
    Raises RuntimeError with the reason(s) where the forced one, or every one, can't run. Warns once where the
    reference stands in for kernels, on a device that has none (MPS, XPU) too; not in float64, which it alone computes,
    nor on meta, where nothing is computed.
    """
    forced = _forced(os.environ.get(VARIABLE, ""))
    name = forced.get(operator, forced.get("*"))
    if not problem and operator not in forced and name not in candidates:
        name = None  # a device's backend forced for all: an operator on host numbers has none, nor needs one
    if name is not None:
        if name not in candidates:
            raise RuntimeError(f"{VARIABLE} forces {name}, and {operator} has only {', '.join(candidates)}")
        reason = candidates[name].why_not(**problem)
        if reason is not None:
            raise RuntimeError(f"{VARIABLE} forces {name} for {operator}, which can't run: {reason}")
        return candidates[name]
    reasons = {}
    for name in filter(candidates.__contains__, ORDER):
        reason = candidates[name].why_not(**problem)
        if reason is None:
            if name == "reference" and problem.get("dtype") != torch.float64:
                device = problem["device"].type if problem else "cpu"
                known = device in ORDER.values()  # else no kernel is for it, and each says so
                missed = [f"{n}: {r}" for n, r in reasons.items() if ORDER[n] == device or not known]
                if missed and device != "meta":
                    _warn("; ".join(missed))
            return candidates[name]
        reasons[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(f"no backend can run {operator}: {listed}")


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"granvit_kernels runs its slow reference: {reason}", RuntimeWarning, stacklevel=3)


@functools.cache
def _forced(value: str) -> dict[str, str]:
    """{operator: backend} of the variable's value, with "*" for all operators."""
    forced = {}
    for part in filter(None, (part.strip() for part in value.split(","))):
        operator, name = part.split("=", 1) if "=" in part else ("*", part)
        operator, name = operator.strip(), name.strip()
        if name not in ORDER or operator not in ("*", *operators()):
            raise RuntimeError(
                f"{VARIABLE} is {value!r}; it takes {', '.join(ORDER)}, or operator=backend,... with the operators "
                f"{', '.join(operators())}"
            )
        forced[operator] = name
    return forced


def operators() -> dict[str, dict[str, ModuleType]]:
    """{operator: {backend: module}} of every package under granvit_kernels.ops."""
    from . import ops

    candidates: dict[str, dict[str, ModuleType]] = {}
    for package in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        candidates.update(getattr(importlib.import_module(package.name), "CANDIDATES", {}))
    return dict(sorted(candidates.items()))


def survey() -> list[tuple[str, str, str | None]]:
    """(operator, backend, why it can't run here or None), in float32 on the backend's own device."""
    rows = []
    for operator, candidates in operators().items():
        for name in ORDER:
            if name not in candidates:
                continue
            device = torch.device(ORDER[name])
            rows.append((operator, name, candidates[name].why_not(device=device, dtype=torch.float32)))
    return rows
