"""Where the time of one training step goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP = 3
ROWS = 30
PREFIX = "granvit."
"""Of the names that parts of a step give themselves: torch.profiler.record_function("granvit.encoder")."""


def profile_step(run_one_step: Callable[[], None], folder: Path, device: torch.device) -> str:
    """Profile one step after a few others. Writes profile.txt and trace.json.gz (for chrome://tracing or Perfetto) to
    `folder`; returns the former's text: the parts of the step, then the operators by the time that they take.
    """
    activities, sort_by = [ProfilerActivity.CPU], "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        sort_by = "self_cuda_time_total"
    for _ in range(WARM_UP):
        run_one_step()
    with profile(activities=activities, record_shapes=True) as found:
        run_one_step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    parts = [event for event in found.key_averages() if event.key.startswith(PREFIX)]
    lines = [f"{'part of the step':<32}{'calls':>7}{'host ms':>12}{'device ms':>12}"]
    lines += [
        f"{event.key:<32}{event.count:>7}{event.cpu_time_total / 1e3:>12.3f}{event.device_time_total / 1e3:>12.3f}"
        for event in sorted(parts, key=lambda event: -max(event.cpu_time_total, event.device_time_total))
    ]
    operators = found.key_averages(group_by_input_shape=True)
    table = operators.table(sort_by=sort_by, row_limit=ROWS, max_shapes_column_width=60)
    text = "\n".join((*lines, "", table))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.txt").write_text(text, encoding="utf-8")
    found.export_chrome_trace(str(folder / "trace.json.gz"))
    return text
