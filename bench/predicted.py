"""How well the counted floors (bench/results/floors.json) predict what a GPU did: times and executed instructions."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ncu import SHAPES
from workloads import GRAPH


class Prediction(NamedTuple):
    """Of one comparison, in seconds. ratio: measured over the larger floor."""

    operator: str
    mode: str
    workload: str
    issue: float
    memory: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.measured / max(self.issue, self.memory)


def predictions(floors: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], chip: str) -> list[Prediction]:
    """floors: rows of floors.json. rows: those of a GPU's file, of which the CUDA graph's are taken: they hold no
    host time. chip: "H100" or "H200". A mode of both directions has the sum of theirs."""
    table = []
    for row in rows:
        if row["provider"] != GRAPH or "median" not in row:
            continue
        letter, _, shape = row["workload"].partition(", ")
        shape = re.sub(r"(\d+) quer(?:y|ies)", r"K = \1", shape)  # as the floors say it
        parts = [
            floor for floor in floors
            if (floor["operator"], floor["workload"], floor["shape"]) == (row["operator"], letter, shape)
            and floor["direction"] in row["mode"].split("+")
        ]  # fmt: skip
        if parts:
            sums = [sum(part[f"{kind}_seconds"][chip] for part in parts) for kind in ("issue", "memory")]
            table.append(Prediction(row["operator"], row["mode"], row["workload"], *sums, row["median"]))
    return table


class Execution(NamedTuple):
    """Of one kernel, warps' instructions: as counted without a GPU, and as Nsight Compute counted them."""

    operator: str
    kernel: str
    counted: float
    executed: float
    issue_active: float
    dram_share: float
    occupancy: float


def executions(floors: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[Execution]:
    """rows: of a GPU's -ncu.json, whose calls are of workload A and SHAPES; pictures are packed as they are."""
    table = []
    for row in rows:
        operator, kernel = row["operator"], row["kernel"].strip("_").removesuffix("_kernel")
        counted = [
            part["instructions"] * part["trips"]
            for floor in floors
            if (floor["operator"], floor["workload"], floor["shape"]) == (operator, "A", SHAPES[operator])
            for part in floor["parts"]
            if part["kernel"] == kernel
        ]
        if counted:
            shares = row["issue_active"], row["dram_share"], row["occupancy"]
            table.append(Execution(operator, row["kernel"], sum(counted), row["instructions"], *shares))
    return table


def floors_of(device: str, results: Path) -> dict[str, Any]:
    """The floors of the kernels that a device ran, where they were kept (floors-DEVICE.json), else of those of now.
    device: as its files are called."""
    kept = results / f"floors-{device}.json"
    return json.loads((kept if kept.is_file() else results / "floors.json").read_text())


def load_executions(results: Path) -> dict[str, list[Execution]]:
    """{device: its executions} of every GPU that ncu has watched."""
    devices = {}
    for path in sorted(results.glob("nvidia-*-ncu.json")):
        rows = json.loads(path.read_text())
        if rows:
            floors = floors_of(path.stem.removesuffix("-ncu"), results)["rows"]
            devices[rows[0]["device"]] = executions(floors, rows)
    return devices


def load(results: Path) -> dict[str, tuple[str, list[Prediction]]]:
    """{device: (commit of the floors, its predictions)} of every GPU with rows in `results` whose chip the floors are
    counted for."""
    devices = {}
    for path in sorted(results.glob("nvidia-*.json")):
        rows = json.loads(path.read_text())
        if not isinstance(rows, list):  # tuned launches
            continue
        rows = [row for row in rows if row.get("provider") == GRAPH]
        record = floors_of(path.stem, results)
        for chip in record["assumptions"]["chips"]:
            if rows and chip in rows[0]["device"]:
                devices[rows[0]["device"]] = record["commit"], predictions(record["rows"], rows, chip)
    return devices
