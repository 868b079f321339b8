"""Keeps what finished smoke runs measured in bench/results/: training.json, smoke.png and the tables in README, docs/.

    python bench/keep_training.py NAME=RUN [NAME=RUN ...]

RUN is a run's folder, NAME what docs/results.md calls it; the first is the smoke preset as it is (`--seeds 3`), whose
pictures are shown.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)
import readme  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from torch import Tensor  # noqa: E402

from granvit.data.loader import GranDataset  # noqa: E402
from granvit.eval.metrics import Prediction  # noqa: E402
from granvit.eval.pictures import is_right  # noqa: E402
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX  # noqa: E402

KEPT = ("preset", "commit", "device", "versions", "peak_memory_mb", "floors", "mean")
ACROSS = 6  # pictures in a row


def keep(run: Path) -> dict[str, Any]:
    """What is worth keeping of a run's summary: figures and their spread, and no path of the machine."""
    summary = json.loads((run / "report" / "summary.json").read_text())
    kept = {name: summary[name] for name in KEPT}
    data = {name: value for name, value in summary["data"].items() if name != "path"}
    seeds = [{"seed": r["seed"], "seconds": r["seconds"], "stages": r["stages"]} for r in summary["runs"]]
    return kept | {"data": data, "seeds": seeds}


def sampled(answers: list[Prediction], number: int) -> list[Prediction]:
    """`number` of the answers in the true proportion of right and wrong ones, drawn by lot (seeded) among either, the
    right ones first."""
    right, wrong = ([p for p in answers if is_right(p) is value] for value in (True, False))
    share = round(number * len(right) / len(answers))
    lot = random.Random(0)
    return lot.sample(right, share) + lot.sample(wrong, number - share)


def draw(run: Path, path: Path) -> None:
    """Answers of the run's first seed to scenes: captions after stage 1 above, boxes after stage 2 below. Each row's
    title says how many of all answers were right."""
    summary = json.loads((run / "report" / "summary.json").read_text())
    first = next(iter(sorted(run.glob("seed-*"))), run)
    predictions = json.loads((first / "report" / "predictions.json").read_text())
    test = GranDataset(summary["data"]["path"], "test")
    rows = {name: i for i, name in enumerate(test.rows["id"])}
    asked = {
        ("pretrain", BBOX2CAPTION): "What is in the green box? Above: the answer, the truth in brackets.",
        ("adapt", CAPTION2BBOX): "Where is what the sentence says? Red, dashed: the answer; green: the truth.",
    }
    figure = plt.figure(figsize=(2.3 * ACROSS, 3.4 * len(asked)), layout="constrained")
    for part, ((stage, task), question) in zip(figure.subfigures(len(asked)), asked.items(), strict=True):
        answers = [p for p in predictions[stage] if p["task"] == task and p["source"] == "scenes"]
        right = sum(map(is_right, answers))
        part.suptitle(f"{question} {right} of {len(answers)} answers are right.", size=10)
        shown = sampled(answers, min(ACROSS, len(answers)))
        for axis, answer in zip(part.subplots(1, ACROSS), shown, strict=False):
            show(axis, answer, test[rows[answer["id"]]].image)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def show(axis: plt.Axes, answer: Prediction, image: Tensor) -> None:
    """One answer on its image [H, W, 3]: green where it is right, red where it is wrong."""
    axis.imshow(image)
    axis.set_axis_off()
    finds = answer["task"] == CAPTION2BBOX
    boxes = [(answer["box"], "#16a34a", "-")]
    if finds and answer["predicted_box"]:
        boxes.append((answer["predicted_box"], "#dc2626", "--"))
    height, width = image.shape[:2]
    for (x1, y1, x2, y2), colour, style in boxes:
        corner, size = (x1 * width, y1 * height), ((x2 - x1) * width, (y2 - y1) * height)
        axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linestyle=style, linewidth=2))
    said = f"“{answer['caption']}”" if finds else f"{answer['answer']}\n({answer['caption']})"
    axis.set_title(said, size=8, color="#15803d" if is_right(answer) else "#b91c1c", wrap=True)


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
