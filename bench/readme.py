"""python bench/readme.py: writes README.md's tables anew from the files in bench/results/."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench/readme.py writes from here: {} -->\n", "<!-- to here -->"


def write() -> None:
    """Replace what stands between the markers of each table. Raises ValueError where README.md lacks one."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, lines in (("training", training()), ("kernels", kernels())):
        begin = text.index(BEGIN.format(name)) + len(BEGIN.format(name))
        end = text.index(END, begin)
        text = text[:begin] + "\n" + "\n".join(lines) + "\n\n" + text[end:]
    readme.write_text(text)


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---|" + "---|" * (len(head) - 1)] + [
        "| " + " | ".join(row) + " |" for row in rows
    ]


# ---- the kernels: bench/results/cpu-OPERATOR.json ----


def workload(row: dict[str, Any]) -> tuple:
    """What the rows of one comparison have in common."""
    return row["operator"], row["mode"], row["workload"], row["device"], row["versions"]["torch"], row["commit"]


def kernels() -> list[str]:
    """A row a workload: our median, and how many times as long each peer's is."""
    rows, machines = [], set()
    for path in sorted(RESULTS.glob("cpu-*.json")):
        for key, group in groupby(sorted(json.loads(path.read_text()), key=workload), workload):
            operator, mode, what, device, torch, commit = key
            times = {row["provider"]: row["median"] for row in group}
            ours = times.pop("granvit")
            peers = ", ".join(f"{peer} **{time / ours:.1f}**" for peer, time in times.items())
            isa = device.split(", ")[1]
            rows.append([operator, mode, what, f"{1000 * ours:.1f}", peers, isa, torch])
            machines.add(f"{device} (commit {commit})")
    head = ["operator", "mode", "workload", "ours, ms", "a peer takes times as long", "ISA", "torch"]
    return [
        f"Medians of alternating runs in one process, on {'; '.join(sorted(machines))}.",
        "",
        *markdown(head, rows),
    ]


# ---- the training: bench/results/training.json ----


def cell(result: dict[str, Any], stage: str, when: str, metric: str) -> str:
    """Mean over the seeds in per cent, with the lowest and highest."""
    values = [100 * seed["stages"][stage][when][metric] for seed in result["seeds"]]
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.1f}{spread}"


def claims(result: dict[str, Any]) -> list[str]:
    """Both stages beside every floor and control."""
    columns = {
        "captions, all": "bbox2caption_rouge_l",
        "captions, natural": "natural_bbox2caption_rouge_l",
        "captions, held-out combinations": "scenes-heldout/bbox2caption_rouge_l",
        "captions, text": "ocr_bbox2caption_rouge_l",
        "boxes, all": "caption2bbox_acc50",
        "boxes, natural": "natural_caption2bbox_acc50",
        "boxes, held-out combinations": "scenes-heldout/caption2bbox_acc50",
        "boxes, text": "ocr_caption2bbox_acc50",
    }
    states = [
        ("**after stage 1**", "pretrain", "after"),
        ("after stage 1, shown another test image", "pretrain", "other_image"),
        ("after stage 1, text alone", "pretrain", "text_only"),
        ("**after stage 2**", "adapt", "after"),
        ("after stage 2, shown another test image", "adapt", "other_image"),
        ("after stage 2, text alone", "adapt", "text_only"),
        ("stage 2 on a frozen random encoder", "adapt", "control"),
        ("before stage 1", "pretrain", "before"),
    ]
    rows = [
        [label, *(cell(result, stage, when, metric) for metric in columns.values())] for label, stage, when in states
    ]
    for floor, metrics in result["floors"].items():
        cells = [f"{100 * metrics[metric]:.1f}" if metric in metrics else "" for metric in columns.values()]
        rows.append([f"floor: {floor.replace('_', ' ')}", *cells])
    return markdown(["", *columns], rows)


def variants(results: dict[str, Any]) -> list[str]:
    """The recipe with other forms of self-distillation, and what became of the features."""
    head = ["run", "seeds", "stage 1 captions", "natural", "stage 2 captions", "stage 2 boxes", "natural"]
    head += ["effective rank", "standard deviation"]
    rows = []
    for name, result in results.items():
        features = result["mean"]["features"]["pretrain"]
        cells = [
            cell(result, stage, "after", metric)
            for stage, metric in (
                ("pretrain", "bbox2caption_rouge_l"),
                ("pretrain", "natural_bbox2caption_rouge_l"),
                ("adapt", "bbox2caption_rouge_l"),
                ("adapt", "caption2bbox_acc50"),
                ("adapt", "natural_caption2bbox_acc50"),
            )
        ]
        rank = f"{features['effective_rank_before']:.1f} -> {features['effective_rank_after']:.1f}"
        spread = f"{features['std_before']:.2f} -> {features['std_after']:.2f}"
        rows.append([name, str(len(result["seeds"])), *cells, rank, spread])
    return markdown(head, rows)


def training() -> list[str]:
    results = json.loads((RESULTS / "training.json").read_text())
    default = next(iter(results.values()))
    minutes = default["seeds"][0]["seconds"] / 60
    versions = ", ".join(f"{name} {version}" for name, version in default["versions"].items())
    return [
        f"The smoke preset, {len(default['seeds'])} seeds (mean, lowest to highest), {default['data']['evaluated']} "
        "test images that training never saw. Captions of boxes by ROUGE-L, boxes of sentences by ACC@IoU 0.5, "
        "both in per cent.",
        "",
        *claims(default),
        "",
        *variants(results),
        "",
        f"The first seed's training, control and evaluations took {minutes:.1f} minutes on two cores, and at most "
        f"{default['peak_memory_mb'] / 1024:.1f} GiB "
        f"({default['device']}, {versions}, commit {default['commit']}); every figure is in "
        "[bench/results/training.json](bench/results/training.json).",
    ]


if __name__ == "__main__":
    write()
