"""A fabricated run, and the files from which its report is made."""

import json

import datasets

from granvit.eval.metrics import summarise

LEFT, RIGHT = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


def caption(name, truth, answer, source="photos", kind="natural"):
    base = {"id": name, "source": source, "kind": kind, "box": LEFT, "caption": truth}
    return base | {"task": "bbox2caption", "answer": answer, "predicted_box": None}


def box_answer(name, truth, box, source="photos", kind="natural"):
    return caption(name, truth, "" if box else HOSTILE, source, kind) | {
        "task": "caption2bbox",
        "predicted_box": box,
    }


PREDICTIONS = {
    "before": [
        caption("a", "a red circle", "nothing much"),
        box_answer("a", "a red circle", RIGHT),
    ],
    "pretrain": [
        caption("a", "a red circle", "a red circle"),
        caption("c", HOSTILE, "a blue square"),
        caption("b", "Total 12", HOSTILE, "pages", "ocr"),
    ],
    "pretrain other_image": [caption("a", "a red circle", "said blindly")],
    "adapt": [
        box_answer("a", "a red circle", LEFT),
        box_answer("c", HOSTILE, RIGHT),
        box_answer("b", "Total 12", None, "pages", "ocr"),
    ],
}


def metrics(caption_quality, box_quality):
    return {"bbox2caption_rouge_l": caption_quality, "caption2bbox_acc50": box_quality}


def made_summary(data, gran_rows):
    """Of a run over a new dataset in the folder `data`."""
    rows = [("a", [(LEFT, "a red circle", "natural")], "photos"), ("b", [(LEFT, "Total 12", "ocr")], "pages")]
    rows.append(("c", [(LEFT, HOSTILE, "natural")], "photos"))
    rows.append(("unasked", [(LEFT, "x", "natural")], "photos"))
    datasets.DatasetDict({"test": gran_rows(rows)}).save_to_disk(data)
    measured = summarise(PREDICTIONS["pretrain"] + PREDICTIONS["adapt"])
    run = {
        "seed": 0,
        "stages": {
            "pretrain": {"before": metrics(0.1, 0.0), "after": measured, "other_image": metrics(0.2, 0.0)},
            "adapt": {"before": measured, "after": metrics(0.6, 0.3), "control": metrics(0.55, 0.2)},
        },
        "features": {"pretrain": {"effective_rank_before": 9.25, "effective_rank_after": 12.5}},
    }
    return {
        "preset": "smoke",
        "commit": "abc1234",
        "device": HOSTILE,
        "versions": {"torch": "2.13.0"},
        "seconds": 90.0,
        "peak_memory_mb": 2048.0,
        "data": {"path": str(data)},
        "floors": {"blind": metrics(0.25, 0.05), "whole_image": {"caption2bbox_acc50": 0.01}},
        "runs": [run],
        "mean": {"stages": run["stages"], "features": run["features"]},
    }


LINES = [
    {"stage": "pretrain", "step": 0, "evaluation": "before", **metrics(0.1, 0.0)},
    {
        "stage": "pretrain",
        "step": 1,
        "loss": 3.0,
        "loss_caption": 2.0,
        "loss_distill": 1.0,
        "features_effective_rank": 9.0,
    },
    {
        "stage": "pretrain",
        "step": 2,
        "loss": 2.0,
        "loss_caption": 1.5,
        "loss_distill": 0.5,
        "features_effective_rank": 9.5,
    },
    {"stage": "pretrain", "step": 2, "evaluation": "after", **metrics(0.4, 0.1)},
    {"stage": "pretrain", "step": 2, "evaluation": "other_image", **metrics(0.2, 0.0)},
    {"stage": "adapt", "step": 1, "loss": 1.0, "loss_caption": 1.0},
    {"stage": "adapt", "step": 3, "evaluation": "after", **metrics(0.6, 0.3)},
]


def lay_out(run, summary, first=None):
    """Write a run's files; the curves and predictions into the folder of its first seed, if there is one."""
    for folder in (run, first or run):
        (folder / "report").mkdir(parents=True, exist_ok=True)
    (run / "report" / "summary.json").write_text(json.dumps(summary))
    ((first or run) / "report" / "predictions.json").write_text(json.dumps(PREDICTIONS))
    ((first or run) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return run
