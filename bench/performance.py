"""Writes docs/performance.md and its picture from the files in bench/results/: what GPUs took, and what the compiler
makes of the kernels. Called by bench/readme.py."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from rows import versions_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
NOT_YET = "not yet measured"


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table, line by line."""
    return ["| " + " | ".join(head) + " |", "|---|" + "---|" * (len(head) - 1)] + [
        "| " + " | ".join(row) + " |" for row in rows
    ]


def spread(values: list[float], factor: float = 100, digits: int = 1, sign: str = "") -> str:
    """Their mean, and the lowest and highest where there are several; nothing where there are none. sign: "+" writes
    that of positive numbers, too."""
    if not values:
        return ""
    shown = (factor * x for x in (sum(values) / len(values), min(values), max(values)))
    mean, low, high = (round(x, digits) + 0.0 for x in shown)  # + 0.0: no -0.0
    form = f"{sign}.{digits}f"
    return f"{mean:{form}}" + (f" ({low:{form}} to {high:{form}})" if len(values) > 1 else "")


@functools.cache
def kept(file: str) -> list[dict[str, Any]]:
    """The rows of a result file, read once, none where it isn't there."""
    path = RESULTS / file
    return json.loads(path.read_text()) if path.exists() else []


def gpu_results() -> dict[str, list[dict[str, Any]]]:
    """{device: its rows}."""
    devices = {}
    for path in sorted(RESULTS.glob("*.json")):
        rows = json.loads(path.read_text())
        if isinstance(rows, list) and rows and "copy_bytes_per_second" in rows[0]:
            devices[rows[0]["device"]] = rows
    return devices


def is_rival(row: dict[str, Any]) -> bool:
    """Whether a row is another's way to do the same: not ours, and not FlexAttention's mask, a part of its work."""
    return not row["provider"].startswith("granvit") and row["provider"] != "FlexAttention's block mask"


def write_performance() -> None:
    (ROOT / "docs" / "performance.md").write_text("\n".join(performance()) + "\n")
    plot(ROOT / "docs" / "performance.png")


def performance() -> list[str]:
    """The lines of docs/performance.md."""
    from workloads import AIMS, DESCRIPTIONS

    lines = ["<!-- Written by python bench/readme.py from bench/results/: edit that, not this. -->", ""]
    lines += ["# Performance", ""]
    lines += ["The kernels on CPUs: [kernels.md](kernels.md), and the picture at the end.", "", "## On GPUs", ""]
    lines += [f"Workload {letter}: {what}." + ("" if letter == "D" else "  ") for letter, what in DESCRIPTIONS.items()]
    lines += [
        "",
        "`make gpu` measures them on the GPU at hand: medians from a cold L2, providers alternating. A share is "
        "of the bandwidth of a large copy, bytes being each distinct input byte read once and outputs written once, "
        "under CUDA-graph replay; a ratio is a peer's time over ours.",
        "",
    ]
    devices = gpu_results() or {"NVIDIA H100": []}
    for device, rows in devices.items():
        lines += [f"### {device}", ""]
        table = []
        for operator, mode, letter, provider, figure, least in AIMS:
            if operator == "training":
                continue
            cells = [
                f"{row['workload']}: {row[figure]:.2f}"
                for row in rows
                if (row["operator"], row["mode"], row["provider"]) == (operator, mode, provider)
                and row["workload"].startswith(f"{letter},")
                and figure in row
            ]
            what = "share of bandwidth" if figure == "share" else f"times as long: {provider}"
            table.append([operator, mode, letter, what, f"{least}", "; ".join(cells) or NOT_YET])
        head = ["operator", "mode", "workload", "figure", "aim on a Hopper card, bfloat16", "measured"]
        lines += [*markdown(head, table), ""]
        if rows:
            table = [
                [row["operator"], row["mode"], row["workload"], row["provider"]]
                + (
                    [f"{1e6 * row['median']:.0f}", f"{row['ratio']:.2f}", f"{100 * row['share']:.0f} %"]
                    + [f"{row['host_us']:.0f}"]
                    if "median" in row
                    else [row["failed"], "", "", ""]
                )
                for row in rows
            ]
            head = ["operator", "mode", "workload", "provider", "microseconds", "ratio", "share of bandwidth"]
            head += ["host, microseconds a call"]
            lines += [*markdown(head, table), "", f"{made_with(rows)}, since which the kernels may have changed.", ""]
    record = json.loads((RESULTS / "aot.json").read_text())
    chosen = ["roi_gather bfloat16 channels=768 sampling_ratio=2", "region_attention bfloat16 queries=4 size=64"]
    chosen.append("region_pool bfloat16 queries=1 heads=16 size=1152")
    rows = [row for row in record["kernels"] if row["case"] in (*chosen, "tiles")]
    lines += [
        "## What the compiler makes of the Triton kernels",
        "",
        f"Compiled without a GPU (`make aot`, triton {record['triton']}); the kernels of the main shapes here, all "
        f"{len(record['kernels'])} in [bench/results/aot.json](../bench/results/aot.json), to which the tests hold "
        "them.",
        "",
    ]
    head = ["case", "kernel", "sm", "registers", "bytes spilled", "shared memory, bytes", "warps"]
    head += ["HGMMA", "HMMA", "tcgen05"]
    fields = ("case", "kernel", "arch", "registers", "spills", "shared", "warps", "hgmma", "hmma", "tcgen05")
    lines += markdown(head, [[str(row[field]).lstrip("_") for field in fields] for row in rows])
    lines += ["", *floors(), *floors_and_clocks(), *steps_on_gpus(), *checked_on_gpus()]
    return [*lines, "![The rivals' times over ours](performance.png)"]


def floors() -> list[str]:
    """What the kernels must take at least: bench/results/floors.json (bench/floors.py)."""
    record = json.loads((RESULTS / "floors.json").read_text())
    assumed, versions = record["assumptions"], record["versions"]
    chips = assumed["chips"]
    bandwidths = ", ".join(f"{chip['bytes_per_second'] / 1e12:.1f} TB/s ({name})" for name, chip in chips.items())
    multiprocessors = " or ".join(sorted({str(chip["multiprocessors"]) for chip in chips.values()}))
    lines = [
        "## What the GPU kernels must take at least",
        "",
        "Counted bounds, not measurements (`make floors`, which needs no GPU); the next section says how well they "
        "predict. The issue floor is the instructions of each loop in the machine code for Hopper times its "
        f"trips on the workload, over {multiprocessors} multiprocessors that each issue {assumed['schedulers']} warps' "
        f"instructions a clock, at {assumed['clock_hz'] / 1e9} GHz. The memory floor is each distinct byte that a call "
        f"reads, once, and each that it writes, over what a large copy is assumed to reach: {bandwidths}. On top of "
        "both come waiting, units that take less than an instruction a clock, warps whose threads part (the shortest "
        "way is counted), and torch's own small kernels.",
        "",
    ]
    head = ["operator", "direction", "workload", "shape"]
    head += [f"{name}: {what}" for name in chips for what in ("issue floor, us", "memory floor, us", "binds")]
    table = []
    for row in record["rows"]:
        cells = [row["operator"], row["direction"], row["workload"], row["shape"]]
        for name in chips:
            cells += [f"{1e6 * row[f'{of}_seconds'][name]:.0f}" for of in ("issue", "memory")] + [row["binds"][name]]
        table.append(cells)
    what = "Where the instructions are, workload A (without parts under 1 %, and code that stands in a row above):"
    lines += [*markdown(head, table), "", what, ""]
    head = ["operator", "direction", "shape", "kernel", "part", "instructions a trip", "trips of warps", "share"]
    table, known = [], set()
    for row in record["rows"]:
        for part in row["parts"] if row["workload"] == "A" else []:
            share = part["instructions"] * part["trips"] / row["instructions"]
            code = row["operator"], part["kernel"], part["part"], part["instructions"]
            if share >= 0.01 and code not in known:
                cells = [row["operator"], row["direction"], row["shape"], part["kernel"], part["part"]]
                table.append([*cells, f"{part['instructions']:g}", f"{part['trips']}", f"{100 * share:.0f} %"])
            known.add(code)
    made = f"triton {versions['triton']}, nvcc {versions['nvcc']}, commit {record['commit']}"
    kinds = "[bench/results/floors.json](../bench/results/floors.json) has them by kind"
    return [*lines, *markdown(head, table), "", f"{made}; {kinds}.", ""]


def floors_and_clocks() -> list[str]:
    """What GPUs took against the floors (predicted.py)."""
    import predicted

    watched = predicted.load_executions(RESULTS)
    lines = []
    for device, (counted_at, table) in predicted.load(RESULTS).items():
        ratios = {}
        for entry in table:
            ratios.setdefault((entry.operator, entry.mode), []).append(entry.ratio)
        ranges = "; ".join(f"{' '.join(key)} {min(r):.2f} to {max(r):.2f}" for key, r in sorted(ratios.items()))
        lines += [
            f"## What an {device} took against its floors",
            "",
            "The call as a CUDA graph, in microseconds, over the larger floor of the kernels that ran (commit "
            f"{counted_at}; those of now have the floors above). A bound that predicts is near 1: the further above "
            f"it, the more of the time is waiting that no instruction shows. {ranges}.",
            "",
            *markdown(
                ["operator", "mode", "workload", "issue floor, us", "memory floor, us", "measured, us", "ratio"],
                [
                    [entry.operator, entry.mode, entry.workload]
                    + [f"{1e6 * seconds:.0f}" for seconds in (entry.issue, entry.memory, entry.measured)]
                    + [f"{entry.ratio:.2f}"]
                    for entry in table
                ],
            ),
            "",
        ]
        if device not in watched:
            continue
        lines += [
            "The instructions themselves, as Nsight Compute counts them (`python bench/ncu.py`), in millions of warps' "
            "instructions. Where few cycles issue, warps wait: few fit where each thread holds many registers.",
            "",
            *markdown(
                ["operator", "kernel", "counted", "executed", "ratio", "cycles that issue", "DRAM", "warps resident"],
                [
                    [entry.operator, entry.kernel, f"{entry.counted / 1e6:.1f}", f"{entry.executed / 1e6:.1f}"]
                    + [f"{entry.counted / entry.executed:.3f}"]
                    + [f"{100 * share:.0f} %" for share in (entry.issue_active, entry.dram_share, entry.occupancy)]
                    for entry in watched[device]
                ],
            ),
            "",
        ]
    return lines


def steps_on_gpus() -> list[str]:
    """Training steps of real shapes: bench/results/DEVICE-training.json (bench/test_gpu_training.py)."""
    lines = ["## Training steps on GPUs", ""]
    lines += [
        "Random weights, bfloat16, six questions an image of up to 1024 patches: SigLIP2-so400m with Qwen2.5-1.5B "
        "(large), ViT-B/16 with SmolLM2-135M (base). MFU is of useful operations alone (`granvit.cost.flops`); the "
        "aim is 45 % at the larger shape on an H100. The bound is the ratio of operations, with padding.",
        "",
    ]
    head = ["device", "shape", "stage", "recipe", "compiled", "regions/s", "tokens/s", "MFU", "peak GiB", "times ours"]
    table = []
    for path in sorted(RESULTS.glob("*-training.json")):
        for row in json.loads(path.read_text()):
            if "shape" not in row:  # a CPU's steps
                continue
            if "failed" in row:
                case = [row["device"], row["shape"], row["mode"], row["provider"], "yes" if row["compiled"] else "no"]
                table.append([*case, row["failed"], "", "", "", ""])
                continue
            bound = f"{row['ratio']:.2f} (bound {row['ratio_padded']:.2f})" if "ratio" in row else "1"
            table.append(
                [row["device"], row["shape"], row["mode"], row["provider"], "yes" if row["compiled"] else "no"]
                + [f"{row['regions_per_second']:.0f}", f"{row['tokens_per_second']:.0f}"]
                + [f"{100 * row['mfu']:.0f} %" if "mfu" in row else "", f"{row['peak_memory_bytes'] / 2**30:.1f}"]
                + [bound]
            )
    return [*lines, *(markdown(head, table) if table else [f"H100: {NOT_YET}."]), ""]


def checked_on_gpus() -> list[str]:
    """Errors against float64, and what compute-sanitizer found: DEVICE-accuracy.json, DEVICE-sanitizer.json."""
    lines = ["## Correct on GPUs", ""]
    lines += [
        "A kernel's largest error against float64, as a share of what is allowed: twice the error of plain PyTorch in "
        "the same dtype, and one eps of the dtype, of the largest value. `make gpu` fails where it is over 100 %.",
        "",
    ]
    table, said = [], []
    for path in sorted(RESULTS.glob("*-accuracy.json")):
        rows = kept(path.name)
        for row in rows:
            share = f"{100 * row['share_of_allowed']:.0f} %"
            table.append([row[key] for key in ("device", "operator", "case", "mode", "dtype", "backend")] + [share])
        said.append(f"{rows[0]['device']}: {made_with(rows)}.")
    head = ["device", "operator", "case", "mode", "dtype", "backend", "share of the allowed error"]
    lines += markdown(head, table) if table else [f"H100: {NOT_YET}."]
    for path in sorted(RESULTS.glob("*-sanitizer.json")):
        rows = kept(path.name)
        tools = {}
        for row in rows:
            tools.setdefault(row["operator"], []).append(row["tool"] + ("" if row["passed"] else " (failed)"))
        found = "; ".join(f"{operator}: {', '.join(sorted(names))}" for operator, names in sorted(tools.items()))
        nothing = "found nothing" if all(row["passed"] for row in rows) else "was run"
        said.append(f"compute-sanitizer {nothing} on {rows[0]['device']} ({found}; {made_with(rows)}).")
    return [*lines, "", *(line for text in said for line in (text, ""))]


def made_with(rows: list[dict[str, Any]]) -> str:
    """Versions and commits of measured rows."""
    return f"{versions_of(rows[0])}; commits {', '.join(sorted({row['commit'] for row in rows}))}"


def plot(path: Path) -> None:
    """How many times as long each peer takes, on every machine that was measured."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    bars = []
    for file in sorted(RESULTS.glob("cpu-*.json")):
        for row in json.loads(file.read_text()):
            if "failed" in row or not is_rival(row):
                continue
            bars.append((row["operator"], row["mode"], row["device"].split(", ")[1], row["provider"], row["ratio"]))
    for device, rows in gpu_results().items():
        rivals = [row for row in rows if "ratio" in row and is_rival(row)]
        bars += [(row["operator"], row["mode"], device, row["provider"], row["ratio"]) for row in rivals]
    best: dict[tuple, list[float]] = {}
    for operator, mode, device, provider, ratio in bars:
        best.setdefault((operator, mode, device, provider), []).append(ratio)
    names, ratios = zip(*sorted(best.items(), reverse=True), strict=True)
    figure, axes = pyplot.subplots(figsize=(10, 0.24 * len(names) + 1), layout="constrained")
    colours = dict(zip(sorted({name[0] for name in names}), pyplot.get_cmap("tab10").colors, strict=False))
    for at, (name, spread) in enumerate(zip(names, ratios, strict=True)):
        axes.plot([min(spread), max(spread)], [at, at], color=colours[name[0]], linewidth=6, marker="o")
    axes.set_yticks(range(len(names)), [f"{n[0]}, {n[1]}, {n[2]}: {n[3]}" for n in names], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("a peer's median time over ours: least to most over the workloads")
    axes.set_ylim(-0.7, len(names) - 0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
