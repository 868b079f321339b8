"""The steps of `python bench/gpu.py`: what each runs, how long it may take, and what of it the table shows."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

GRAPH = "granvit, CUDA graph"
"""workloads.GRAPH; that module would import torch."""
WORKERS = str(min(12, os.cpu_count() or 1))


def printed(output: str, results: Path, commit: str) -> list[str]:
    """The lines that a script marks for the table: they begin with "= "."""
    return [line[2:] for line in output.splitlines() if line.startswith("= ")]


@dataclass(frozen=True)
class Step:
    """seconds: what it is expected to take; a budget that has less left drops it. limit: when it is ended."""

    name: str
    command: tuple[str, ...]
    """Arguments of Python, in the repository's root."""
    seconds: int
    limit: int
    figures: Callable[[str, Path, str], list[str]] = printed
    """(its output, FOLDER/DEVICE of the result files, the commit) -> lines for the table."""
    dry: tuple[str, ...] | None = None
    """The command of a dry run, where it is another one."""
    variables: tuple[tuple[str, str], ...] = ()
    """Of its environment, besides the driver's."""
    measures: bool = True
    """False: it prepares the machine, so what another run did does not stand for it."""


# ---- figures ----


def summary(output: str, results: Path, commit: str) -> list[str]:
    """pytest's last line, or how far it came where it was cut off, and the tests that failed."""
    failed = re.findall(r"^((?:FAILED|ERROR) .*)", output, re.MULTILINE)
    if last := re.findall(r"^=* ?(\d+ (?:passed|failed|skipped|errors?)\b.* in [\d.]+s)", output, re.MULTILINE):
        return last[-1:] + failed
    told = re.findall(r"^\[gw\d+\] \[ *\d+%\] (\w+) (\S+.*?) *$", output, re.MULTILINE)
    counts = Counter(verdict.lower() for verdict, _ in told)
    last = [", ".join(f"{number} {verdict}" for verdict, number in counts.items()) + ", then cut off"] if told else []
    return last + [f"{verdict} {name}" for verdict, name in told if verdict in ("FAILED", "ERROR")]


def rows_of(results: Path, kind: str, commit: str) -> list[dict[str, Any]]:
    """What this commit measured."""
    path = results.with_name("-".join(filter(None, (results.name, kind))) + ".json")
    rows = json.loads(path.read_text()) if path.exists() else []
    return [row for row in rows if row.get("commit") == commit]


def compiled(row: dict[str, Any]) -> bool:
    """Whether a row is of a peer that takes long to compile."""
    return "Flex" in row["provider"] or row["provider"].endswith("compiled")


def operators(output: str, results: Path, commit: str, chosen: Callable[[dict], bool]) -> list[str]:
    """A line a comparison: our time, that of the CUDA graph with its share of the bandwidth, and how many times as long
    the others take, the fastest of each kind."""
    cases: dict[tuple, list[dict]] = {}
    for row in filter(chosen, rows_of(results, "", commit)):
        cases.setdefault((row["operator"], row["mode"], row["workload"]), []).append(row)
    lines = []
    for case, rows in cases.items():
        times, peers = [], {}
        for row in sorted(rows, key=lambda row: row.get("ratio", 0), reverse=True):
            kind = row["provider"].partition(",")[0] + " compiled" * row["provider"].endswith(", compiled")
            if "failed" in row:
                peers.setdefault(kind, f"{row['provider']} failed")
            elif row["provider"] == "granvit":
                times.insert(0, f"{1e6 * row['median']:.0f} us")
            elif row["provider"] == GRAPH:
                times.append(f"graph {1e6 * row['median']:.0f} us ({row['share']:.2f})")
            else:
                peers[kind] = f"{kind} x{row['ratio']:.1f}"
        lines.append(f"{' '.join(case)}: {', '.join(times + list(peers.values()))}")
    return lines


def training(output: str, results: Path, commit: str) -> list[str]:
    rows = rows_of(results, "training", commit)
    lines = [line for line in output.splitlines() if line.startswith("SKIPPED ") and not rows]
    for row in rows:
        case = f"{row['shape']} {row['mode']} {'compiled' if row['compiled'] else 'eager'}, {row['provider']}"
        if "failed" in row:
            lines.append(f"{case} failed")
        else:
            share = f", MFU {row['mfu']:.2f}" if "mfu" in row else ""
            lines.append(f"{case}: {1e3 * row['median']:.0f} ms, {row['regions_per_second']:.0f} regions/s{share}")
    return lines


# ---- the steps ----
TESTS = (
    "tests/kernels/test_layout.py", "tests/train/test_meta.py", "tests/kernels/test_gpu.py",
    "tests/kernels/test_patch_packing.py", "tests/kernels/test_patch_packing_cuda.py",
    "tests/kernels/test_patch_resampling.py",
    "tests/model/test_question_attention.py", "tests/model/test_vision.py",
)  # fmt: skip
"""The files that have tests marked "gpu"."""
PYTEST = ("-m", "pytest", "-q", "--tb=short", "-rfEs", "-p", "no:cacheprovider")
PARALLEL = (*PYTEST, "-vv", "-p", "no:benchmark", "-n", WORKERS, "-o", "faulthandler_timeout=90")
"""A line for each test as it ends, so that a step that is cut off shows how far it came."""
ONE_THREAD = (("OMP_NUM_THREADS", "1"), ("TORCHINDUCTOR_COMPILE_THREADS", "1"))
"""Of processes that are as many as the cores: their references are computed on the CPU."""
BENCH = (*PYTEST, "bench/test_gpu.py", "-k")

STEPS = (
    Step("packages", ("bench/wheels.py", "--install"), 5, 60, measures=False),
    Step("build", ("setup.py", "build_ext", "--inplace"), 25, 120, measures=False),
    Step("compile", ("bench/warm.py",), 20, 100, measures=False),
    Step("accuracy", ("bench/accuracy.py",), 15, 60),
    Step(
        "tests", (*PARALLEL, *TESTS, "-m", "gpu"), 75, 150, summary,
        dry=(*PARALLEL, *TESTS, "-k", "test_gpu.py and float32"), variables=ONE_THREAD,
    ),
    Step(
        "workload-A", (*BENCH, "workload_A and not flex and not compiled"), 52, 160,
        partial(operators, chosen=lambda row: row["workload"].startswith("A,") and not compiled(row)),
    ),
    Step(
        "flex-attention", (*BENCH, "workload_A and flex"), 35, 120,
        partial(operators, chosen=lambda row: row["workload"].startswith("A,") and "Flex" in row["provider"]),
    ),
    Step(
        "workloads-BCD", (*BENCH, "not workload_A and not flex and not compiled and not processors"), 70, 130,
        partial(operators, chosen=lambda row: row["workload"][0] in "BCD" and not compiled(row)),
    ),
    Step(
        "processors", (*BENCH, "processors"), 20, 80,
        partial(operators, chosen=lambda row: row["mode"].endswith("processor")),
    ),
    Step("sanitizer", ("bench/sanitize.py",), 15, 90),
    Step(
        "training", (*PYTEST, "bench/test_gpu_training.py", "-k", "base and pretrain"), 110, 180, training,
        dry=(*PYTEST, "bench/test_gpu_training.py", "-k", "pretrain"),
    ),
    Step("ncu", ("bench/ncu.py",), 35, 100),
    # What an ordinary budget has no room for: a second call's.
    Step(
        "slow-peers", (*BENCH, "compiled or (flex and not workload_A)"), 230, 340, partial(operators, chosen=compiled),
    ),
)  # fmt: skip
"""In their order: what matters first stands first, and a budget drops from the end."""

TUNE = Step("tune", ("bench/tune.py",), 200, 250)
TRAIN = Step("train", ("bench/gpu_train.py",), 200, 300)

FILES = ("", "steps", "accuracy", "sanitizer", "training", "ncu", "tuned", "run")
"""The kinds of result files, DEVICE-KIND.json: all that the steps leave."""
