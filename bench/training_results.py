"""Keeps what finished smoke runs measured in bench/results/training.json, and writes README.md's tables from it.

    python bench/training_results.py DEFAULT_RUN [NAME=RUN ...]

DEFAULT_RUN is the folder of the smoke preset's run (`--seeds 3`); a NAME=RUN is the same with another form of
self-distillation: `none` (--pretrain.distill 0) or `mse` (--distill.target mse --distill.alpha 0.9, the paper's).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "training.json"
BEGIN, END = "<!-- bench/training_results.py writes from here", "<!-- to here -->"
KEPT = ("preset", "commit", "device", "versions", "peak_memory_mb", "floors", "mean")


def keep(run: Path) -> dict[str, Any]:
    """What is worth keeping of a run's summary: figures and their spread, and no path of the machine."""
    summary = json.loads((run / "report" / "summary.json").read_text())
    kept = {name: summary[name] for name in KEPT}
    data = {name: value for name, value in summary["data"].items() if name != "path"}
    seeds = [{"seed": r["seed"], "seconds": r["seconds"], "stages": r["stages"]} for r in summary["runs"]]
    return kept | {"data": data, "seeds": seeds}


def cell(result: dict[str, Any], stage: str, when: str, metric: str) -> str:
    """Mean over the seeds in per cent, with the lowest and highest."""
    values = [100 * seed["stages"][stage][when][metric] for seed in result["seeds"]]
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.1f}{spread}"


def claims(result: dict[str, Any]) -> list[str]:
    """Both stages beside every floor and control, as a Markdown table."""
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
    rows = [
        ("**after stage 1**", "pretrain", "after"),
        ("after stage 1, shown another test image", "pretrain", "other_image"),
        ("after stage 1, text alone", "pretrain", "text_only"),
        ("**after stage 2**", "adapt", "after"),
        ("after stage 2, shown another test image", "adapt", "other_image"),
        ("after stage 2, text alone", "adapt", "text_only"),
        ("stage 2 on a frozen random encoder", "adapt", "control"),
        ("before stage 1", "pretrain", "before"),
    ]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for label, stage, when in rows:
        lines.append(f"| {label} | " + " | ".join(cell(result, stage, when, m) for m in columns.values()) + " |")
    for floor, metrics in result["floors"].items():
        cells = [f"{100 * metrics[m]:.1f}" if m in metrics else "" for m in columns.values()]
        lines.append(f"| floor: {floor.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return lines


def distillations(results: dict[str, Any]) -> list[str]:
    """Stage 1 with each self-distillation, and what became of the features, as a Markdown table."""
    columns = ("stage 1 captions", "stage 1 captions, natural", "stage 2 boxes", "effective rank", "standard deviation")
    lines = ["| self-distillation | seeds | " + " | ".join(columns) + " |", "|---|" + "---|" * (len(columns) + 1)]
    for name, result in results.items():
        features = result["mean"]["features"]["pretrain"]
        cells = [
            str(len(result["seeds"])),
            cell(result, "pretrain", "after", "bbox2caption_rouge_l"),
            cell(result, "pretrain", "after", "natural_bbox2caption_rouge_l"),
            cell(result, "adapt", "after", "caption2bbox_acc50"),
            f"{features['effective_rank_before']:.1f} -> {features['effective_rank_after']:.1f}",
            f"{features['std_before']:.2f} -> {features['std_after']:.2f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def markdown(results: dict[str, Any]) -> str:
    default = results["standardized"]
    minutes = max(seed["seconds"] for seed in default["seeds"]) / 60
    versions = ", ".join(f"{name} {version}" for name, version in default["versions"].items())
    return "\n".join(
        [
            f"Smoke preset, {len(default['seeds'])} seeds (mean, lowest to highest), {default['data']['evaluated']} "
            "test images that training never saw. Captions of boxes by ROUGE-L, boxes of sentences by ACC@IoU 0.5, "
            "both in per cent.",
            "",
            *claims(default),
            "",
            *distillations(results),
            "",
            f"At most {minutes:.1f} minutes a seed and {default['peak_memory_mb'] / 1024:.1f} GB on two cores "
            f"({default['device']}, {versions}, commit {default['commit']}); every figure is in "
            "[bench/results/training.json](bench/results/training.json).",
        ]
    )


def main() -> None:
    if len(sys.argv) < 2 or any("=" not in other for other in sys.argv[2:]):
        raise SystemExit(__doc__)
    runs = {"standardized": sys.argv[1]} | dict(other.split("=", 1) for other in sys.argv[2:])
    results = {name: keep(Path(run)) for name, run in runs.items()}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    readme = ROOT / "README.md"
    text = readme.read_text()
    begin, end = text.index(BEGIN), text.index(END)
    begin = text.index("\n", begin)
    readme.write_text(f"{text[:begin]}\n{markdown(results)}\n{text[end:]}")


if __name__ == "__main__":
    main()
