"""Result files: JSON lists of rows, each row saved as soon as it is measured, so that a run that is cut off keeps them.

A row names its device, the versions and the commit (`provenance`), and where there is an aim for it, whether it reached
it (`judged`). torch is imported where it is needed: what only reads rows starts at once.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granvit.machine import commit

DRY_RUN = "dry run"
"""What rows call the device of a GPU's benchmark that ran on the CPU, at a tiny size: GRANVIT_BENCH_DEVICE=cpu."""

commit_of_this_run = functools.cache(commit)
"""The commit as it was when the first row asked for it."""


def results_folder() -> Path:
    """The folder that GRANVIT_BENCH_RESULTS names, else bench/results; made if it is missing."""
    folder = Path(os.environ.get("GRANVIT_BENCH_RESULTS") or Path(__file__).resolve().parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def gpu_name() -> str:
    """The GPU's name, or DRY_RUN."""
    import torch

    return DRY_RUN if os.environ.get("GRANVIT_BENCH_DEVICE") == "cpu" else torch.cuda.get_device_name()


def gpu_file(kind: str = "") -> Path | None:
    """Where a benchmark on a GPU keeps rows: DEVICE.json or DEVICE-KIND.json in the results' folder.

    None for a dry run without GRANVIT_BENCH_RESULTS: bench/results keeps no figures of one.
    """
    from granvit_kernels.launch import slug

    name = gpu_name()
    if name == DRY_RUN and not os.environ.get("GRANVIT_BENCH_RESULTS"):
        return None
    return results_folder() / ("-".join(filter(None, (slug(name), kind))) + ".json")


def versions_of(about: dict[str, Any]) -> str:
    """The versions of a row, or of what `provenance` gives, in words."""
    return ", ".join(f"{name} {version}" for name, version in about["versions"].items())


def provenance(device: str) -> dict[str, Any]:
    """What a row says of where it comes from: the device as named, the versions that matter there, and the commit."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        versions["cuda"] = torch.version.cuda
        try:
            versions["triton"] = __import__("triton").__version__
        except ImportError:
            versions["triton"] = None
    return {"device": device, "versions": versions, "commit": commit_of_this_run()}


def judged(row: dict[str, Any], figure: str, least: float) -> dict[str, Any]:
    """The row with its aim: `figure`, one of its own, is to be `least` at least. A row that failed reached nothing."""
    return {**row, "aim": {"figure": figure, "least": least}, "reached": row.get(figure, float("-inf")) >= least}


@dataclass(frozen=True)
class Rows:
    """The rows of one file. path: None keeps nothing. key: names of what tells one row from another, without the
    commit: a new row takes the place of the old one with equal values, so that a file holds the newest of each."""

    path: Path | None
    key: tuple[str, ...]

    def of(self, row: dict[str, Any]) -> tuple:
        """The values of the key; None where the row lacks one."""
        return tuple(row.get(name) for name in self.key)

    def kept(self) -> list[dict[str, Any]]:
        """The rows of the file, oldest first."""
        return [] if self.path is None or not self.path.exists() else json.loads(self.path.read_text())

    def has(self, **values: Any) -> bool:
        """Whether the file has a row with these values of this commit; failed=None asks for one that did not fail.
        False where the commit does not say what code this is, and where GRANVIT_BENCH_AGAIN is set."""
        commit = values["commit"] = commit_of_this_run()
        if commit == "unknown" or commit.endswith("-dirty") or os.environ.get("GRANVIT_BENCH_AGAIN"):
            return False
        return any(all(row.get(name) == value for name, value in values.items()) for row in self.kept())

    def save(self, *rows: dict[str, Any]) -> None:
        """Write the file with these rows, in place of older ones of equal keys. A reader sees all of it or nothing, and
        processes that save at once wait for each other."""
        if self.path is None:
            return
        new = {self.of(row) for row in rows}
        folder = os.open(self.path.parent, os.O_RDONLY)  # its lock leaves no file behind, and ends with the process
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            lines = map(json.dumps, [*(row for row in self.kept() if self.of(row) not in new), *rows])
            partial = self.path.with_suffix(".partial")
            partial.write_text("[\n" + ",\n".join(lines) + "\n]\n")
            partial.replace(self.path)
        finally:
            os.close(folder)
