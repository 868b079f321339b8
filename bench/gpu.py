"""python bench/gpu.py: builds, proves and measures on the GPU at hand, what matters first, in eight minutes.

Each step (gpu_steps.py) is a process with a time limit of its own, and runs whatever happened to the one before.
Results are kept as they come, in the folder that GRANVIT_BENCH_RESULTS names (else bench/results). A second call goes
on with what this commit and device lack. docs/gpu.md says how to read the table.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # granvit need not be installed

from gpu_steps import STEPS, TRAIN, TUNE, Step
from rows import Rows, versions_of
from wheels import TARGET

LINES, WIDTH = 60, 160
"""Of the table, at most."""
GRACE = 3
"""Seconds between SIGTERM and SIGKILL."""
REPORT_EVERY = 20
"""Seconds between two lines of progress within a step."""
BUDGET = 480
"""Seconds of a call."""
PATIENCE = 10
"""Times as long as a step's limit that a dry run gives it: a CPU takes its time, and none of it is measured."""
ENDED = ("passed", "failed")
"""Verdicts of a step that ran to its end; the others are "cut off" (at its limit), "unfinished" and "dropped"."""

PROBE = """
import json, rows
print(json.dumps({"file": str(rows.gpu_file("steps")), **rows.provenance(rows.gpu_name())}))
"""


class Stopped(BaseException):
    """SIGTERM or SIGINT came."""


def environment(dry: bool) -> dict[str, str]:
    """Of every step. A dry run keeps its rows under build/, unless it was told where."""
    paths = [str(ROOT), str(ROOT / "bench"), str(TARGET), os.environ.get("PYTHONPATH", "")]
    made = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if dry:
        made |= {"GRANVIT_BENCH_DEVICE": "cpu", "GRANVIT_TEST_DEVICE": "cpu"}
        made.setdefault("GRANVIT_BENCH_RESULTS", str(ROOT / "build" / "gpu-dry"))
    return made


def probe(variables: dict[str, str]) -> dict[str, Any]:
    """The device, versions and commit, and "file", where the steps' rows are. Asked in another process, so that this
    one holds nothing on the GPU. Raises SystemExit where no GPU can be used."""
    done = subprocess.run([sys.executable, "-c", PROBE], env=variables, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise SystemExit(f"no GPU can be used here, so nothing was built, tested or measured: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- one step ----


def end(process: subprocess.Popen) -> None:
    """End the process and all of its group: gently, then not."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            break
        if sent == signal.SIGTERM and process.poll() is None:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                pass
    process.wait()


def execute(command: Sequence[str], limit: float, log: Path, variables: dict[str, str], name: str) -> str:
    """The verdict on a command, which is ended with its children at its limit, in seconds."""
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=variables, cwd=ROOT,
            preexec_fn=os.setpgrp,  # a group to end, within the session: whoever ends that ends all
        )  # fmt: skip
        try:
            while (left := began + limit - time.monotonic()) > 0:
                try:
                    return "failed" if process.wait(min(left, REPORT_EVERY)) else "passed"
                except subprocess.TimeoutExpired:
                    told = log.read_text(errors="replace").strip().splitlines() or [""]
                    print(f"  {name}: {time.monotonic() - began:.0f} s, {told[-1][:100]}", flush=True)
            return "cut off"
        except Stopped:
            return "unfinished"
        finally:
            end(process)


def kernels_compiled(variables: dict[str, str]) -> int:
    """In Triton's cache."""
    folder = Path(variables.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    return sum(1 for _ in folder.glob("*/*.cubin"))


def run(step: Step, limit: float, dry: bool, log: Path, variables: dict[str, str], results: Path) -> dict[str, Any]:
    """The step's row. results: FOLDER/DEVICE of the files FOLDER/DEVICE-KIND.json that hold what it measured."""
    command = [sys.executable, *(step.dry if dry and step.dry is not None else step.command)]
    compiled, began = kernels_compiled(variables), time.monotonic()
    verdict = execute(command, limit, log, variables | dict(step.variables), step.name)
    seconds = round(time.monotonic() - began, 1)
    output = log.read_text(errors="replace")
    try:
        figures = step.figures(output, results, variables["GRANVIT_COMMIT"])
    except Exception as error:  # a figure that can't be made must not hide what was measured
        figures = [f"no figures: {type(error).__name__}: {error}"]
    return {
        "step": step.name, "verdict": verdict, "seconds": seconds, "figures": figures, "limit": round(limit),
        "command": shlex.join(command[1:]), "kernels_compiled": kernels_compiled(variables) - compiled,
        "told": "" if verdict == "passed" else output[-5000:],
    }  # fmt: skip


# ---- all of them ----


def chosen(steps: Sequence[Step], only: Sequence[str] = (), start: str | None = None) -> list[Step]:
    """Those that --only names, or from --from on. Raises SystemExit for a name that no step has."""
    names = [step.name for step in steps]
    for name in filter(None, [*only, start]):
        if name not in names:
            raise SystemExit(f"there is no step {name!r}; the steps are {', '.join(names)}")
    steps = [step for step in steps if not only or step.name in only]
    return steps if start is None else [step for step in steps if names.index(step.name) >= names.index(start)]


def known_rows(rows: Rows, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{step: its row} of what ran to its end with this commit, device and these versions. Files that differ from the
    commit, or have none, may be any: then nothing is known."""
    if about["commit"] == "unknown" or about["commit"].endswith("-dirty"):
        return {}
    return {
        row["step"]: row for row in rows.kept()
        if row["verdict"] in ENDED and all(row.get(name) == value for name, value in about.items())
    }  # fmt: skip


def run_all(
    steps: Sequence[Step], budget: float, dry: bool, known: dict[str, dict], rows: Rows, about: dict[str, Any],
    variables: dict[str, str],
) -> tuple[list[dict[str, Any]], bool]:  # fmt: skip
    """Run what has not passed, what failed before after what never ran: (the steps' rows, whether SIGTERM or SIGINT
    ended them early)."""
    began = time.monotonic()
    results = rows.path.with_name(rows.path.name.removesuffix("-steps.json"))
    logs = Path(tempfile.mkdtemp(prefix="granvit-gpu-"))
    known = {step.name: {**known[step.name], "kept": True} for step in steps if step.measures and step.name in known}
    failed = {name for name, row in known.items() if row["verdict"] == "failed"}
    if known and not failed and all(step.name in known for step in steps if step.measures):
        steps = [step for step in steps if step.measures]  # nothing to build for
    table: list[dict[str, Any]] = []
    full = False
    try:
        for step in sorted(steps, key=lambda step: step.name in failed):
            passed = time.monotonic() - began
            if step.name in known and step.name not in failed:
                table.append(known[step.name])
                continue
            full = full or passed + step.seconds > budget  # what comes later is dropped, too
            if full:
                table.append(known.get(step.name, {"step": step.name, "verdict": "dropped", "seconds": 0}))
                continue
            table.append({"step": step.name, "verdict": "unfinished", "seconds": 0})
            rows.save({**table[-1], **about})
            limit = min(step.limit * (PATIENCE if dry else 1), budget - passed)
            print(f"[{passed:4.0f} s] {step.name}: about {step.seconds} s, at most {limit:.0f}", flush=True)
            table[-1] = run(step, limit, dry, logs / f"{step.name}.log", variables, results)
            rows.save({**table[-1], **about})
            print(f"[{time.monotonic() - began:4.0f} s] {step.name}: {table[-1]['verdict']}", flush=True)
            for line in table[-1]["told"].splitlines()[-12:]:
                print(f"  | {line[:160]}", flush=True)
            if table[-1]["verdict"] == "unfinished":
                return table, True
    except Stopped:
        return table, True
    return table, False


def table_of(rows: Sequence[dict[str, Any]], about: dict[str, Any], seconds: float) -> list[str]:
    """At most LINES lines: a step's first figure stands in its own line, others below it as far as there is room."""
    figures = [row.get("figures") or [""] for row in rows]
    shown = [1] * len(rows)
    for _ in range(LINES - 4 - len(rows)):  # a line more for the step that shows fewest of those that have more
        shorter = [i for i, lines in enumerate(figures) if len(lines) > shown[i]]
        if shorter:
            shown[min(shorter, key=shown.__getitem__)] += 1
    lines = [f"{about['device']}, {versions_of(about)}, {about['commit']}"]
    lines += [f"{'step':<15}{'verdict':<15}{'s':>4}  figures"]
    for row, told, number in zip(rows, figures, shown, strict=True):
        verdict = row["verdict"] + (" before" if row.get("kept") else "")
        lines.append(f"{row['step']:<15}{verdict:<15}{row['seconds']:>4.0f}  {told[0]}"[:WIDTH].rstrip())
        lines += [f"{'':<36}{line}"[:WIDTH] for line in told[1:number]]
    number = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in (*ENDED, "cut off", "unfinished")}
    lines.append(
        f"{number['passed']} of {len(rows)} passed, {number['failed']} failed, {number['cut off']} cut off, "
        f"{len(rows) - sum(number.values())} dropped; {seconds:.0f} s"
    )
    return lines


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python bench/gpu.py", description=__doc__.split("\n\n")[0])
    names = ", ".join(step.name for step in STEPS)
    parser.add_argument("--budget", type=float, help=f"seconds ({BUDGET}); the last steps are dropped first")
    parser.add_argument("--only", nargs="+", default=(), metavar="STEP", help=f"of {names}")
    parser.add_argument("--from", dest="start", metavar="STEP", help="this step and those after it")
    parser.add_argument("--again", action="store_true", help="run what this commit and device have already, too")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU: shows that the steps are whole")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--tune", action="store_true", help="search launch configurations instead, at most 4 minutes")
    other.add_argument("--train", action="store_true", help="train and evaluate a compact model instead, 4 minutes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """The exit status: 0 where something was measured, whatever failed beside it."""
    options = arguments(argv)
    if options.tune or options.train:
        steps = [*(step for step in steps if not step.measures), TUNE if options.tune else TRAIN]
    steps = chosen(steps, options.only, options.start)
    whole = PATIENCE * sum(step.limit for step in steps)
    budget = options.budget or (whole if options.dry or options.tune or options.train else BUDGET)
    variables = environment(options.dry)
    began = time.monotonic()

    def stop(number: int, frame: object) -> None:
        for sent in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sent, signal.SIG_IGN)  # what follows is short
        raise Stopped

    about = probe(variables)
    rows = Rows(Path(about.pop("file")), ("step",))
    known = {} if options.again else known_rows(rows, about)
    variables["GRANVIT_COMMIT"] = about["commit"]
    if options.again:
        variables["GRANVIT_BENCH_AGAIN"] = "1"
    for sent in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sent, stop)
    left = budget - (time.monotonic() - began)
    table, stopped = run_all(steps, left, options.dry, known, rows, about, variables)
    print("\n".join(table_of(table, about, time.monotonic() - began)))
    print(f"rows: {rows.path.parent}", flush=True)
    measuring = {step.name for step in steps if step.measures} or {step.name for step in steps}
    measured = any(row["verdict"] == "passed" for row in table if row["step"] in measuring)
    return 143 if stopped else 0 if measured else 1


if __name__ == "__main__":
    sys.exit(main())
