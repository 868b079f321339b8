"""What of its configuration a run may change when it goes on: docs/training.md has the table.

One rule is behind it: the new configuration, had it been there from the start, would have brought the run to where it
is. So what comes out does not depend on when somebody changed their mind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from granvit.train.presets import PHASES, TrainConfig
from granvit.train.retention import checkpoints_of, step_of
from granvit.train.stages import Stage

FREE = {
    "output", "device", "threads", "parallel", "compile", "micro_packs", "checkpointing", "profile", "checkpoint_every",
    "keep_checkpoints", "keep_every", "failed_saves", "nonfinite_limit", "log_every", "trackers", "data.workers",
    "data.path", "data.chat", *(f"{phase}.eval_every" for phase in PHASES),
}  # fmt: skip
"""Where and how fast a run goes, not what comes out of it. Where the data lies is free as well: `folder.same_data`
tells whether it is the same."""


def differences(theirs: TrainConfig, ours: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """{"stage.field": (theirs, ours)} of what differs and is not FREE; a stage that neither runs does not count."""
    off = {name for name in PHASES if not getattr(theirs, name).runs and not getattr(ours, name).runs}
    there, here = (dict(flat(asdict(config))) for config in (theirs, ours))
    names = [name for name in here if name not in FREE and name.partition(".")[0] not in off]
    return {name: (there[name], here[name]) for name in names if there[name] != here[name]}


def refused(run: Path, theirs: TrainConfig, ours: TrainConfig) -> list[str]:
    """The differences that the run in this folder can't take: fields with both values, and for a stage the reason."""
    of: dict[str, dict[str, tuple[Any, Any]]] = {}
    for name, values in differences(theirs, ours).items():
        of.setdefault(name.partition(".")[0], {})[name] = values
    reached = _reached(run, theirs)
    lines = []
    for owner, fields in of.items():
        shown = "; ".join(f"{name}: {there} there, {here} now" for name, (there, here) in fields.items())
        if owner not in PHASES:
            lines.append(shown)
        elif why := _objection(getattr(theirs, owner), getattr(ours, owner), set(fields), reached):
            lines.append(f"{shown}, but {why}")
    return lines


def _objection(old: Stage, new: Stage, fields: set[str], reached: dict[str, tuple[int, bool]]) -> str | None:
    """Why a stage can't change in these fields; None where it can."""
    name = new.name
    later = [phase for phase in PHASES[PHASES.index(name) + 1 :] if phase in reached]
    if later:
        return f"{later[0]}, which comes after it, has begun"
    if name not in reached:
        return None
    step, ended = reached[name]
    if fields != {f"{name}.steps"} or None in (old.steps, new.steps):
        return f"{name} has begun"
    if new.steps < step:
        return f"{step} steps are taken"
    advice = f"a stage that begins with --{name}.cooldown 0 keeps its rate, and takes more steps at any time"
    if ended and old.cooldown:
        return f"{name} has ended, its rate down to zero; {advice}"
    if any(old.rate(past) != new.rate(past) for past in range(1, step + 1)):
        return f"in the {step} steps that are taken the rate would have been another; {advice}"
    return None


def _reached(run: Path, config: TrainConfig) -> dict[str, tuple[int, bool]]:
    """{phase: (its furthest step, whether it has ended)} of the phases that have begun, in any seed or the control."""
    reached: dict[str, tuple[int, bool]] = {}
    for pattern in ("checkpoints", "control/checkpoints", "seed-*/checkpoints", "seed-*/control/checkpoints"):
        for folder in run.glob(pattern):
            for phase in PHASES:
                for path in checkpoints_of(folder, phase)[-1:]:
                    here = step_of(path), path.name.endswith("-final")
                    reached[phase] = max(reached.get(phase, here), here)
    if any(any(run.glob(pattern)) for pattern in ("result.json", "seed-*/result.json")):
        for stage in config.stages:  # ended, though somebody may have removed the checkpoints
            reached.setdefault(stage.name, (stage.steps or 0, True))
    return reached


def flat(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """("stage.field", value) of every field of nested configurations."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
