"""Checkpoints of a run: one file a checkpoint, written aside and renamed, so that a crash leaves the previous one."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

_NAME = re.compile(r"(?P<phase>[a-z]+)-(?P<step>\d{7})(?P<final>-final)?\.pt")


class Checkpoints:
    """The folder `checkpoints/` of a run. Files are PHASE-STEP.pt, and PHASE-STEP-final.pt where a phase ended.

    Final checkpoints stay; of the others the newest `keep` do.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, phase: str, step: int, state: dict, final: bool = False) -> Path:
        path = self.folder / f"{phase}-{step:07d}{'-final' if final else ''}.pt"
        aside = path.with_suffix(".tmp")
        with aside.open("wb") as file:
            torch.save({"phase": phase, "step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        running = [p for p in self._files(phase) if not p.stem.endswith("-final")]
        for old in running if final else running[: -self.keep]:
            old.unlink()
        return path

    def newest(self, phase: str) -> Path | None:
        """The checkpoint from which `phase` goes on, or None."""
        files = self._files(phase)
        return files[-1] if files else None

    def final(self, phase: str) -> Path | None:
        newest = self.newest(phase)
        return newest if newest is not None and newest.stem.endswith("-final") else None

    def _files(self, phase: str) -> list[Path]:
        found = [p for p in self.folder.glob(f"{phase}-*.pt") if _NAME.fullmatch(p.name)]
        return sorted(found, key=lambda p: (int(_NAME.fullmatch(p.name)["step"]), p.stem.endswith("-final")))


def load(path: Path, device: torch.device) -> dict:
    """The state in `path`: tensors and plain values only, nothing is executed. Raises ValueError if it is not ours."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file, and each means the same here
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(state, dict) or not {"phase", "step", "model"} <= state.keys():
        raise ValueError(f"{path} is not a checkpoint of granvit.train: it lacks phase, step or model")
    return state
