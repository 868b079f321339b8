"""Where the time of one training step goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

STEP = 4
"""Which step of a stage, counted from where it is taken up, is profiled: the first ones allocate and compile."""
ROWS = 30
PREFIX = "granvit."
"""Of the names that parts of a step give themselves: torch.profiler.record_function("granvit.encoder")."""


@contextmanager
def profiled(folder: Path, device: torch.device) -> Iterator[None]:
    """Profile what is done inside. Writes profile.txt, the parts of the step and then the operators by the time that
    they take, and trace.json.gz (for chrome://tracing or Perfetto) to `folder`.
    """
    activities, sort_by = [ProfilerActivity.CPU], "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        sort_by = "self_cuda_time_total"
    with profile(activities=activities, record_shapes=True) as profiler:
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    parts = [event for event in profiler.key_averages() if event.key.startswith(PREFIX)]
    lines = [f"{'part of the step':<32}{'calls':>7}{'host ms':>12}{'device ms':>12}"]
    lines += [
        f"{event.key:<32}{event.count:>7}{event.cpu_time_total / 1e3:>12.3f}{event.device_time_total / 1e3:>12.3f}"
        for event in sorted(parts, key=lambda event: -max(event.cpu_time_total, event.device_time_total))
    ]
    operators = profiler.key_averages(group_by_input_shape=True)
    table = operators.table(sort_by=sort_by, row_limit=ROWS, max_shapes_column_width=60)
    text = "\n".join((*lines, "", table))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.txt").write_text(text, encoding="utf-8")
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
