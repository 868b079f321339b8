"""The tables of docs/kernels.md from the files in bench/results/: each operator's times beside its peers' on CPUs and
GPUs, and its floors. Called by bench/readme.py."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

from performance import NOT_YET, RESULTS, gpu_results, markdown

OPERATORS = ("roi_gather", "region_attention", "region_pool", "pack_patches", "plan_packing")
PARTS = {"region_pool": ("region_prompt",)}
"""What is measured of a model that stands on an operator."""
HOST = ("plan_packing",)
OTHERS = ("loader", "sample_set", "training")


def cpu_rows() -> list[dict[str, Any]]:
    return [row for path in sorted(RESULTS.glob("cpu-*.json")) for row in json.loads(path.read_text())]


def workload(row: dict[str, Any]) -> tuple:
    """What the rows of one comparison have in common."""
    names = ("operator", "mode", "workload", "device", "shape", "compiled")
    return tuple(str(row.get(name, "")) for name in names)


def comparisons(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows that were measured, those of one workload together."""
    measured = sorted((row for row in rows if "median" in row), key=workload)
    return [list(group) for _, group in groupby(measured, workload)]


def tables_of(name: str) -> list[str]:
    """Every table of one operator."""
    names = (name, *PARTS.get(name, ()))
    tables = [on_cpus(names)]
    tables += [on_gpu(device, rows, names) for device, rows in gpu_results().items()]
    return "\n\n".join("\n".join(table) for table in [*tables, floors(name)] if table).splitlines()


def others() -> list[str]:
    """What is no operator, on CPUs."""
    return on_cpus(OTHERS)


def on_cpus(names: tuple[str, ...]) -> list[str]:
    """A row a workload: our median, and how many times as long each peer takes."""
    table, machines = [], set()
    for group in comparisons([row for row in cpu_rows() if row["operator"] in names]):
        rows = {row["provider"]: row for row in group}
        ours = rows.pop("granvit")
        isa = ours["device"].split(", ")[1]
        cells = [shown(ours, names), ours["workload"], f"{1000 * ours['median']:.1f}", peers(rows), isa]
        table.append([*cells, ours["versions"]["torch"]])
        machines.add(f"{ours['device']} (commit {ours['commit']})")
    if not table:
        return [f"On a CPU: {NOT_YET}."]
    head = ["mode", "workload", "ours, ms", "a peer's time over ours", "ISA", "torch"]
    told = f"On a CPU; medians of alternating runs in one process, on {'; '.join(sorted(machines))}."
    return [told, "", *markdown(head, table)]


def on_gpu(device: str, rows: list[dict[str, Any]], names: tuple[str, ...]) -> list[str]:
    """The same on a GPU, with the call as a CUDA graph and its share of a copy's bandwidth. Nothing of HOST."""
    table, commits = [], set()
    for group in comparisons([row for row in rows if row["operator"] in names]):
        by_provider = {row["provider"]: row for row in group}
        ours, graph = by_provider.pop("granvit", None), by_provider.pop("granvit, CUDA graph", None)
        if ours is None:
            continue
        figures = [f"{1e6 * ours['median']:.0f}"]
        figures += [f"{1e6 * graph['median']:.0f}", f"{100 * graph['share']:.0f} %"] if graph else ["", ""]
        table.append([shown(ours, names), ours["workload"], *figures, peers(by_provider)])
        commits.add(ours["commit"])
    if not table:
        return [f"On an {device}: {NOT_YET}."] if names[0] not in HOST else []
    head = ["mode", "workload", "ours, us", "as a CUDA graph, us", "share of bandwidth", "a peer's time over ours"]
    measured = f"bfloat16, commit {', '.join(sorted(commits))}, since which the kernel may have changed"
    told = f"On an {device} ({measured}; [performance.md](performance.md) says what the workloads are)."
    return [told, "", *markdown(head, table)]


def floors(name: str) -> list[str]:
    """What the GPU kernels must take at least, for the chip that was measured. Nothing where none were counted."""
    record = json.loads((RESULTS / "floors.json").read_text())
    table = [
        [row["direction"], f"{row['workload']}, {row['shape']}"]
        + [f"{1e6 * row[f'{of}_seconds']['H200']:.0f}" for of in ("issue", "memory")]
        for row in record["rows"]
        if row["operator"] == name
    ]
    if not table:
        return []
    head = ["direction", "workload", "issue floor, us", "memory floor, us"]
    told = (
        f"Floors for an H200: counted bounds at commit {record['commit']}, no measurements "
        "([how](performance.md#what-the-gpu-kernels-must-take-at-least))."
    )
    return [told, "", *markdown(head, table)]


def shown(row: dict[str, Any], names: tuple[str, ...]) -> str:
    """A row's mode, with the operator where that is not the table's own."""
    return row["mode"] if row["operator"] == names[0] else f"{row['operator']}: {row['mode']}"


def peers(rows: dict[str, dict[str, Any]]) -> str:
    return "; ".join(f"{name} {row['ratio']:.1f}" for name, row in rows.items())
