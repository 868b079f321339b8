"""A model's figures by lmms-eval, on RefCOCO's tasks with pictures of a test split, beside those of granvit.eval for
the same questions: for bench/evaluation.py and the tests.

Templates and code of the tasks are lmms-eval's own; their rows come from Parquet files in RefCOCO's form, so that
nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import yaml
from PIL import Image

from granvit.data.loader import GranDataset, spread
from granvit.eval.evaluation import Asked, Evaluation, ask, readable
from granvit.eval.metrics import iou
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX

FEATURES = datasets.Features(
    question_id=datasets.Value("string"), image=datasets.Image(), bbox=[datasets.Value("float64")],
    answer=[datasets.Value("string")],
)  # fmt: skip
TASKS = {
    "granvit_bbox_rec": ("refcoco/_default_template_bbox_rec_yaml", CAPTION2BBOX),
    "granvit_grounding": ("refcoco_grounding/_default_template_yaml", CAPTION2BBOX),
    "granvit_bbox": ("refcoco/_default_template_bbox_yaml", BBOX2CAPTION),
}
"""{task: (lmms-eval's template that it includes, what a GranViT is asked in it)}."""
BOXES = {
    "IoU": lambda overlaps: fmean(overlaps),
    **{f"ACC@{at}": lambda overlaps, at=at: fmean(overlap >= at for overlap in overlaps) for at in (0.5, 0.7, 0.9)},
}
"""{lmms-eval's name: the same of granvit.eval's overlaps}."""
CAPTIONS = {"ROUGE_L": "bbox2caption_rouge_l", "CIDEr": "bbox2caption_cider"}


def write_rows(data: GranDataset, asked: Iterable[Asked], path: Path) -> None:
    """A Parquet file in RefCOCO's form, a row a question: picture, box in pixels (x, y, width, height), expressions."""
    rows = []
    for number, question in enumerate(asked):
        pixels = data[question.row].image.numpy()
        height, width = pixels.shape[:2]
        x1, y1, x2, y2 = question.truth["box"]
        box = [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height]
        image = Image.fromarray(pixels)
        rows.append({"question_id": str(number), "image": image, "bbox": box, "answer": [question.truth["caption"]]})
    datasets.Dataset.from_list(rows, FEATURES).to_parquet(path)


def write_tasks(folder: Path, templates: Path, data: GranDataset, images: int | None) -> None:
    """lmms-eval's tasks in `folder`, with their rows. templates: the folder of lmms-eval's own tasks."""
    rows = readable(data, spread(len(data), images))
    for kind in (BBOX2CAPTION, CAPTION2BBOX):
        write_rows(data, ask(data, (kind,), rows), folder / f"{kind}.parquet")
    for name, (template, kind) in TASKS.items():
        task = {
            "include": str(templates / template),
            "task": name,
            "dataset_path": "parquet",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{kind}.parquet")}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def ask_lmms_eval(
    python: str, model: str, data: GranDataset, images: int | None, folder: Path, launcher: Sequence[str] = ()
) -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    """Runs lmms-eval offline. Returns {task: {measure: value}} and {task: [answer a row]}.

    python: of an environment with lmms-eval. folder: an empty one for tasks and output. launcher: arguments of Python
    that start a program in several processes. RuntimeError with lmms-eval's last words where it fails.
    """
    where = "import importlib.util as u; print(u.find_spec('lmms_eval').submodule_search_locations[0])"
    package = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip()
    write_tasks(folder, Path(package) / "tasks", data, images)
    command = [
        python, *launcher, "-m", "lmms_eval", "--model", "granvit", "--model_args", f"pretrained={model},device=cpu",
        "--batch_size", "64", "--tasks", ",".join(TASKS), "--include_path", str(folder), "--output_path",
        str(folder / "output"), "--log_samples",
    ]  # fmt: skip
    offline = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")}
    environment = {**os.environ, **offline, "HF_HOME": str(folder / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    results = sorted((folder / "output").rglob("*_results.json"))
    if done.returncode or not results:
        raise RuntimeError(f"lmms-eval ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    figures = {
        task: {name.partition(",")[0].rpartition("refcoco_")[2].removeprefix("grounding_"): value
               for name, value in values.items() if isinstance(value, float) and "stderr" not in name}
        for task, values in json.loads(results[-1].read_text())["results"].items()
    }  # fmt: skip
    answers = {}
    for task in TASKS:
        (log,) = (folder / "output").rglob(f"*_samples_{task}.jsonl")
        rows = sorted(map(json.loads, log.read_text().splitlines()), key=lambda row: row["doc_id"])
        answers[task] = [row["filtered_resps"] for row in rows]
    return figures, answers


def in_order(evaluation: Evaluation, data: GranDataset, images: int | None) -> dict[str, list[dict[str, Any]]]:
    """{what is asked: granvit.eval's predictions in the order of the tasks' rows}."""

    def place(truth: dict[str, Any]) -> tuple:
        return truth["task"], truth["id"], truth["caption"], *truth["box"]

    by_place = {place(prediction): prediction for prediction in evaluation.predictions}
    rows = readable(data, spread(len(data), images))
    return {
        kind: [by_place[place(asked.truth)] for asked in ask(data, (kind,), rows)]
        for kind in (BBOX2CAPTION, CAPTION2BBOX)
    }


def same_measures(evaluation: Evaluation, predictions: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """{task: {lmms-eval's measure: the same by granvit.eval}}."""
    overlaps = [iou(prediction) for prediction in predictions[CAPTION2BBOX]]
    boxes = {name: float(of(overlaps)) for name, of in BOXES.items()}
    captions = {name: evaluation.metrics[ours] for name, ours in CAPTIONS.items()}
    return {task: boxes if kind == CAPTION2BBOX else captions for task, (_, kind) in TASKS.items()}


def read_box(answer: str) -> list[float] | None:
    """The box of an answer that was written for a benchmark, relative."""
    read = json.loads(answer)
    return [edge / 1000 for edge in read[0]["bbox_2d"]] if read and isinstance(read[0], dict) else read or None


def equal(answer: str, prediction: dict[str, Any]) -> bool:
    """Whether both say the same: a caption to the letter, a box to a millionth."""
    if prediction["task"] == BBOX2CAPTION:
        return answer == prediction["answer"]
    ours, theirs = prediction["predicted_box"], read_box(answer)
    if ours is None or theirs is None:
        return ours is theirs
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-6


def compare(
    python: str, model: str, evaluation: Evaluation, data: GranDataset, images: int | None, folder: Path
) -> list[dict[str, Any]]:
    """A row a task: its questions, how many answers are equal, and each measure by lmms-eval and by granvit.eval.

    python: of an environment with granvit[lmms-eval]. evaluation: of the same model and images. folder: an empty one.
    """
    theirs, answers = ask_lmms_eval(python, model, data, images, folder)
    predictions = in_order(evaluation, data, images)
    ours = same_measures(evaluation, predictions)
    rows = []
    for task, (template, kind) in TASKS.items():
        pairs = list(zip(answers[task], predictions[kind], strict=True))
        measures = {
            name: {"lmms_eval": value} | ({"granvit": ours[task][name]} if name in ours[task] else {})
            for name, value in theirs[task].items()
        }
        rows.append({
            "task": template.removesuffix("_yaml").replace("/_default_template", ""), "questions": len(pairs),
            "equal_answers": sum(equal(*pair) for pair in pairs), "measures": measures,
        })  # fmt: skip
    return rows
