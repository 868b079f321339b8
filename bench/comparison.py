"""One comparison: ours beside its peers on the same inputs, and a row for each in a result file.

A peer is what others would use. One that can't run, or that gives something else, gets a row that says so and is not
timed; a wrong result of ours fails the test. Speed never does: aims stand in the rows as reached or not, and
bench/check.py lists what falls short.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import expected
import numpy as np
import torch
from peers import unpadded
from rows import Rows, judged
from torch import Tensor
from workloads import Pictures

Make = Callable[[], Callable[[], Any]]
"""Prepares what need not be timed, and returns what is."""

PEERS_TOLERANCE = 4
"""How many times as far from the exact result as ours a peer may be."""


@dataclass
class WallClock:
    """Times a function on the CPU."""

    run: Callable[[], Any]

    def seconds(self) -> float:
        """Of one call."""
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start

    def figures(self) -> dict[str, float]:
        """What a row says besides the seconds."""
        return {}


def near(*exacts: Tensor) -> Callable[[Any, float], None]:
    """check for `compare`: each tensor of an output (reshaped) lies near its exact value.

    The largest error may be twice the dtype's epsilon, or 3e-5 where that is more, of the largest exact value: about
    what rounding inputs and results costs, while a wrong token or weight costs a good part of that value.
    """

    def check(output: Any, tolerance: float) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        for place, (given, exact) in enumerate(zip(outputs, exacts, strict=True)):
            relative = max(2 * torch.finfo(given.dtype).eps, 3e-5) * tolerance
            error = float((given.detach().reshape(exact.shape) - exact).abs().max())
            allowed = relative * float(exact.abs().max())
            assert error <= allowed, f"result {place} is off by {error:.2e}, and {allowed:.2e} is allowed"

    return check


def near_pictures(pictures: Pictures, dtype: torch.dtype) -> Callable[[Tensor, float], None]:
    """check for `compare` of patches: ours within a tenth of an 8-bit step and the dtype's rounding. Peers round to 8
    bits in between, up to 1.5 steps in all."""
    exact = expected.pack_patches(pictures)
    rounding = torch.finfo(dtype).eps / 2

    def check(output: Tensor, tolerance: float) -> None:
        output = unpadded(output, pictures)
        allowed = (0.1 if tolerance == 1 else 1.5) / 127.5 + rounding
        for rows, patches in exact:
            error = float((output[rows] - patches).abs().max())
            assert error <= allowed, f"rows from {rows.start} are off by {error:.4f}, and {allowed:.4f} is allowed"

    return check


def compare(
    benchmark: Any,
    rows: Rows,
    common: Mapping[str, Any],
    ours: Mapping[str, Make],
    peers: Mapping[str, Make],
    check: Callable[[Any, float], None] | None = None,
    aims: Mapping[str, tuple[str, float]] | None = None,
    derived: Callable[[float], dict[str, float]] = lambda median: {},
    clock: type[WallClock] = WallClock,
    rounds: int = 15,
) -> None:
    """Check and time every provider, and save its row: `common`, median and quantiles in seconds, ratio (its median
    over that of the first of ours), what the clock and `derived(median)` add, and its aim.

    benchmark: pytest-benchmark's fixture, which times the first of ours. Each round calls every provider once, so that
    what else the machine does meets all of them. check(output, tolerance): raises AssertionError where an output is
    wrong; tolerance is 1 for ours, PEERS_TOLERANCE for peers. A peer that returns None makes what others need, and is
    not checked. aims: {provider: (figure, least)}.
    Raises what ours raised: the first of ours at once, others after all rows were saved.
    """
    aims = aims or {}

    def row(name: str, figures: dict[str, Any]) -> dict[str, Any]:
        made = {**common, "provider": name, **figures}
        return judged(made, *aims[name]) if name in aims else made

    clocks: dict[str, WallClock] = {}
    times: dict[str, list[float]] = {}
    failures: list[Exception] = []  # of ours
    first = next(iter(ours))

    def failed(name: str, error: Exception) -> None:
        """Saves the row that says so, and times the provider no more."""
        clocks.pop(name, None)
        times.pop(name, None)
        told = "wrong" if isinstance(error, AssertionError) else type(error).__name__
        rows.save(row(name, {"failed": f"{told}: {error}"[:300]}))
        if name in ours:
            failures.append(error)

    for name, make in {**ours, **peers}.items():
        try:
            run = make()
            output = run()
            if check is not None and (name in ours or output is not None):
                check(output, 1 if name in ours else PEERS_TOLERANCE)
            clocks[name], times[name] = clock(run), []
        except Exception as error:
            failed(name, error)
            if name == first:
                raise

    def time_rest() -> None:
        for name in list(clocks)[1:]:
            try:
                times[name].append(clocks[name].seconds())
            except Exception as error:
                failed(name, error)

    benchmark.pedantic(lambda: times[first].append(clocks[first].seconds()), setup=time_rest, rounds=rounds)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    made = []
    for name, median in medians.items():
        figures = {"median": median, "quantiles": np.quantile(times[name], [0.1, 0.9]).tolist()}
        figures |= {"ratio": median / medians[first], **clocks[name].figures(), **derived(median)}
        made.append(row(name, figures))
    rows.save(*made)
    benchmark.extra_info["ratios"] = {row["provider"]: row["ratio"] for row in made}
    if failures:
        raise failures[0]
