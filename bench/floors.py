"""python bench/floors.py: what the GPU kernels must take at least, counted where no GPU is; bench/results/floors.json.

For each operator, direction and workload (workloads.py): the instructions of every loop in the machine code, times its
trips, over what the chip issues in a second (the issue floor), beside the bytes that must move over its bandwidth (the
memory floor). Both are bounds and no measurements: what waits, and units that take fewer than an instruction a clock (a
half of the integer work, special functions, shared memory), come on top.
"""

from __future__ import annotations

import json
import os
from typing import Any

import expected
import trips
from parts import DTYPE, VALUES, Part, launched, pack_copy, pack_kernels, pack_resample, pack_weights
from rows import commit_of_this_run, results_folder
from workloads import BINS, DESCRIPTIONS, PATCH, picture_sizes, regions

SCHEDULERS = 4  # of a multiprocessor, an instruction of a warp each a clock
CLOCK = 1.83e9
CHIPS = {
    "H100": {"multiprocessors": 132, "bytes_per_second": 3.0e12},
    "H200": {"multiprocessors": 132, "bytes_per_second": 4.3e12},
}
ASSUMPTIONS = {"dtype": DTYPE, "clock_hz": CLOCK, "schedulers": SCHEDULERS, "chips": CHIPS}
"""SXM cards; what a large copy reaches, read and written, not the data sheet's bandwidth."""

ITEM = 2  # bytes of a value of DTYPE
GATHERS = {
    "768 channels": (768, BINS, 2),
    "1152 channels": (1152, BINS, 2),
    "768 channels, 7x7, 1 samples": (768, BINS, 1),
    "768 channels, 1x1, adaptive": (768, 1, 0),  # as region classifiers ask
}
"""{shape: (channels, bins a side, sampling ratio)}; shapes are named as in test_gpu.py."""
PACKED = "ABD"  # workloads of pack_patches, as in test_gpu.py
ATTENTION = {
    "12 x 64, K = 4": {"queries": 4, "heads": 12, "size": 64},
    "16 x 72, K = 1, coverage": {"queries": 1, "heads": 16, "size": 72, "coverage": True},
}
POOLS = {
    "16 rows, 1152 channels, coverage": {"queries": 1, "heads": 16, "size": 1152},  # as the model asks: 16 x 72, K = 1
    "48 rows, 768 channels, coverage": {"queries": 4, "heads": 12, "size": 768},  # 12 x 64, K = 4
}
"""The region prompt's: rows are queries and heads, and all share a token's features."""


# ---- rows ----


def row(operator: str, direction: str, workload: str, shape: str, parts: list[Part], moved: int) -> dict[str, Any]:
    """moved: each distinct byte that a call reads, once, and what it writes."""
    issued = sum(part.instructions * part.trips for part in parts)
    issue = {name: issued / (chip["multiprocessors"] * SCHEDULERS * CLOCK) for name, chip in CHIPS.items()}
    memory = {name: moved / chip["bytes_per_second"] for name, chip in CHIPS.items()}
    return {
        "operator": operator, "direction": direction, "workload": workload, "shape": shape,
        "instructions": round(issued), "bytes": moved,
        "issue_seconds": issue, "memory_seconds": memory,
        "binds": {name: "issue" if issue[name] > memory[name] else "memory" for name in CHIPS},
        "parts": [part._asdict() for part in parts if part.trips],
    }  # fmt: skip


def roi_rows(workload: str) -> list[dict[str, Any]]:
    made = regions(workload, "cpu")
    rows = []
    for shape, (channels, bins, ratio) in GATHERS.items():
        options = {"channels": channels, "sampling_ratio": ratio} | ({} if bins == BINS else {"bins": bins})
        parts = launched("roi_gather", options, made)
        pooled = len(made.boxes) * bins**2
        tokens = {"forward": expected.read_tokens(made, bins, ratio), "backward": made.layout.num_tokens}
        for direction, count in tokens.items():
            moved = (count + pooled) * channels * ITEM
            rows.append(row("roi_gather", direction, workload, shape, parts[direction], moved))
    return rows


def attention_rows(workload: str) -> list[dict[str, Any]]:
    made = regions(workload, "cpu")
    met, tokens = trips.met_tokens(made), made.layout.num_tokens
    rows = []
    for shape, options in ATTENTION.items():
        parts = launched("region_attention", options, made)
        width = options["heads"] * options["size"]
        query, output = options["queries"] * width, len(made.boxes) * options["queries"] * width
        lse = len(made.boxes) * options["queries"] * options["heads"] * 4
        read = (2 * met * width + query + output) * ITEM + lse  # keys and values that a box meets
        rows.append(row("region_attention", "forward", workload, shape, parts["forward"], read))
        moved = read + (2 * tokens * width + query + output) * ITEM
        rows.append(row("region_attention", "backward", workload, shape, parts["backward"], moved))
    return rows


def pool_rows(workload: str) -> list[dict[str, Any]]:
    made = regions(workload, "cpu")
    met, tokens, count = trips.met_tokens(made), made.layout.num_tokens, len(made.boxes)
    rows = []
    for shape, options in POOLS.items():
        parts = launched("region_pool", options, made)
        each, channels = options["queries"] * options["heads"], options["size"]
        output, lse = count * each * channels, count * each * 4
        read = (met * (channels + each) + output) * ITEM + lse  # values and logits that a box meets
        rows.append(row("region_pool", "forward", workload, shape, parts["forward"], read))
        moved = read + lse + (tokens * (channels + each) + output) * ITEM
        rows.append(row("region_pool", "backward", workload, shape, parts["backward"], moved))
    return rows


def pack_rows(workload: str) -> list[dict[str, Any]]:
    rows = []
    for mode in ("as it is", "resized"):
        sizes, grids = picture_sizes(workload, mode == "resized")
        if mode == "resized":
            counts = trips.resampled(sizes, grids, VALUES)
            parts = [*pack_weights(counts), *pack_resample(counts)]
        else:
            parts = list(pack_copy(grids))
        pixels = sum(height * width for height, width in sizes)
        moved = 3 * pixels + 3 * PATCH**2 * ITEM * sum(height * width for height, width in grids)
        rows.append(row("pack_patches", mode, workload, f"patches of {PATCH}", parts, moved))
    return rows


# ---- the table ----


def table(rows: list[dict[str, Any]]) -> str:
    """A line a row; floors in microseconds."""
    lines = [" " * 62 + "".join(f"{name + ': issue':>12}{'memory':>8}  binds " for name in CHIPS)]
    for row in rows:
        line = f"{row['operator']:17}{row['direction']:10}{row['workload']:3}{row['shape']:32}"
        for name in CHIPS:
            issue, memory = 1e6 * row["issue_seconds"][name], 1e6 * row["memory_seconds"][name]
            line += f"{issue:12.0f}{memory:8.0f}  {row['binds'][name]:6}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def main() -> None:
    """Counts every row, prints the table and writes floors.json: equal code and compilers give equal figures."""
    import triton

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("floors: TRITON_INTERPRET=1 keeps Triton from compiling; unset it")
    rows = [row for workload in DESCRIPTIONS for row in roi_rows(workload)]
    rows += [row for workload in DESCRIPTIONS for row in attention_rows(workload)]
    rows += [row for workload in DESCRIPTIONS for row in pool_rows(workload)]
    rows += [row for workload in PACKED for row in pack_rows(workload)]
    head = {"assumptions": ASSUMPTIONS, "versions": {"triton": triton.__version__, "nvcc": pack_kernels()[0]}}
    head["commit"] = commit_of_this_run()
    lines = ",\n".join(map(json.dumps, rows))
    (results_folder() / "floors.json").write_text(json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n')
    print(table(rows))


if __name__ == "__main__":
    main()
