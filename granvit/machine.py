"""What a measurement depends on besides the code, and which code it was."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def commit() -> str:
    """What GRANVIT_COMMIT says, for a copy of the files whose history is elsewhere; else the checked-out commit, with
    "-dirty" where files differ from it, results of benchmarks aside: they change while they are measured. Outside a
    checkout, or without git, "unknown"."""
    if named := os.environ.get("GRANVIT_COMMIT"):
        return named
    try:
        described = _git("describe", "--always", "--match", "").stdout.strip()
        changed = _git("diff", "--quiet", "HEAD", "--", ":(top)", ":(top,exclude)bench/results").returncode == 1
    except OSError:  # no git on PATH, or one that can't be run
        described = ""
    return described + "-dirty" * changed if described else "unknown"


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)


def default_device() -> str:
    """"cuda" where there is a GPU, else "cpu": what commands compute on that are not told."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str = "cpu") -> str:
    """The GPU's name, or the CPU's model name."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Where what can be made again is kept: the folder that GRANVIT_CACHE names, else ~/.cache/granvit."""
    return Path(os.environ.get("GRANVIT_CACHE") or Path.home() / ".cache" / "granvit")
