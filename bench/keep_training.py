"""Keeps what finished smoke runs measured in bench/results/: training.json, smoke.png and README.md's tables.

    python bench/keep_training.py NAME=RUN [NAME=RUN ...]

RUN is a run's folder, NAME what README.md calls it; the first is the smoke preset as it is (`--seeds 3`), whose
pictures are shown.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)
import readme  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from granvit.data.loader import GranDataset  # noqa: E402
from granvit.eval.report import choose, is_right  # noqa: E402

KEPT = ("preset", "commit", "device", "versions", "peak_memory_mb", "floors", "mean")
ACROSS = 6  # pictures in a row


def keep(run: Path) -> dict[str, Any]:
    """What is worth keeping of a run's summary: figures and their spread, and no path of the machine."""
    summary = json.loads((run / "report" / "summary.json").read_text())
    kept = {name: summary[name] for name in KEPT}
    data = {name: value for name, value in summary["data"].items() if name != "path"}
    seeds = [{"seed": r["seed"], "seconds": r["seconds"], "stages": r["stages"]} for r in summary["runs"]]
    return kept | {"data": data, "seeds": seeds}


def draw(run: Path, path: Path) -> None:
    """Answers of the run's first seed to scenes, right and wrong ones as the report draws them at random."""
    summary = json.loads((run / "report" / "summary.json").read_text())
    first = next(iter(sorted(run.glob("seed-*"))), run)
    predictions = json.loads((first / "report" / "predictions.json").read_text())
    groups = [group for group in choose(predictions) if group["source"] == "scenes"]
    test = GranDataset(summary["data"]["path"], "test")
    rows = {name: i for i, name in enumerate(test.rows["id"])}
    figure, axes = plt.subplots(len(groups), ACROSS, figsize=(2.3 * ACROSS, 3.1 * len(groups)), layout="constrained")
    for row, group in zip(axes, groups, strict=True):
        right = [p for p in group["predictions"] if is_right(p)]
        wrong = [p for p in group["predictions"] if not is_right(p)]
        for axis, answer in zip(row, [*right[: ACROSS - 2], *wrong][:ACROSS], strict=True):
            image = test[rows[answer["id"]]].image
            axis.imshow(image)
            axis.set_axis_off()
            finds = answer["task"] == "caption2bbox"
            boxes = [(answer["box"], "#16a34a", "-")]
            if finds and answer["predicted_box"]:
                boxes.append((answer["predicted_box"], "#dc2626", "--"))
            for (x1, y1, x2, y2), colour, style in boxes:
                height, width = image.shape[:2]
                corner, size = (x1 * width, y1 * height), ((x2 - x1) * width, (y2 - y1) * height)
                axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linestyle=style, linewidth=2))
            said = f"“{answer['caption']}”" if finds else f"{answer['answer']}\n({answer['caption']})"
            axis.set_title(said, size=8, color="#15803d" if is_right(answer) else "#b91c1c", wrap=True)
        asked = "What is in the green box?\n(truth in brackets)" if group["task"] == "bbox2caption" else (
            "Where is it? found: red, dashed\n(truth: green)")
        share = f"{group['right']} of {group['of']} right"
        row[0].text(-0.08, 0.5, f"{asked}\n{share}", rotation=90, transform=row[0].transAxes, size=8, ha="right",
                    va="center", multialignment="center")  # fmt: skip
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    if len(sys.argv) < 2 or any("=" not in argument for argument in sys.argv[1:]):
        raise SystemExit(__doc__)
    runs = {name: Path(run) for name, run in (argument.split("=", 1) for argument in sys.argv[1:])}
    results = {name: keep(run) for name, run in runs.items()}
    (readme.RESULTS / "training.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(next(iter(runs.values())), readme.RESULTS / "smoke.png")
    readme.write()


if __name__ == "__main__":
    main()
