"""python bench/readme.py: writes the tables of README.md and docs/ anew from the files in bench/results/.

A table goes between its markers (`FILES`); docs/performance.md is written whole (performance.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import evidence_figures
import evidence_tables as evidence
from operator_tables import OPERATORS, comparisons, cpu_rows, others, tables_of
from performance import RESULTS, ROOT, gpu_results, is_rival, kept, markdown, spread, write_performance
from rows import versions_of

from granvit.eval.metrics import SIZES

BEGIN, END = "<!-- bench/readme.py writes from here: {} -->\n", "<!-- to here -->"


def write() -> None:
    """Replace what stands between the markers of each table. Raises ValueError where a file lacks one."""
    for file, tables in FILES.items():
        path = ROOT / file
        text = path.read_text()
        for name, table in tables.items():
            begin = text.index(BEGIN.format(name)) + len(BEGIN.format(name))
            end = text.index(END, begin)
            text = text[:begin] + "\n".join(table()) + "\n\n" + text[end:]
        path.write_text(text)
    write_performance()
    evidence_figures.draw(ROOT / "docs" / "figures")


# ---- the operators and the training step: bench/results/cpu-OPERATOR.json, DEVICE.json and DEVICE-training.json ----

SIX = {
    "images to normalised patches": ("pack_patches", ""),
    "features of boxes (RoIAlign), forward": ("roi_gather", "forward"),
    "the same, backward": ("roi_gather", "backward"),
    "attention pooling of boxes, both ways": ("region_attention", "forward+backward"),
    "files to packed batches": ("loader", ""),
    "training step": ("training", ""),
}
"""What README shows: (operator, how its mode begins)."""


def against_the_best(rows: list[dict[str, Any]], operator: str, mode: str) -> list[str]:
    """Two cells: the rivals that were fastest on a workload, and the range of their times over ours. Every workload
    that was measured counts."""
    best = []
    for group in comparisons([row for row in rows if row["operator"] == operator and row["mode"].startswith(mode)]):
        rivals = list(filter(is_rival, group))
        if rivals:
            best.append(min(rivals, key=lambda row: row["ratio"]))
    if not best:
        return ["", "not measured"]
    names = sorted({row["provider"].split(",")[0] for row in best})
    low, high = (f"{pick(row['ratio'] for row in best):.1f}" for pick in (min, max))
    return [" or ".join(names), low if low == high else f"{low} to {high}"]


def benchmarks() -> list[str]:
    """Six rows, each against the best rival on every workload of each kind of device."""
    devices = {"CPU, 2 cores": cpu_rows()}
    for device, rows in gpu_results().items():
        steps = [
            row
            for path in RESULTS.glob("*-training.json")
            for row in json.loads(path.read_text())
            if row["device"] == device
        ]
        devices[device] = rows + steps
    table = [
        [label, *(cell for rows in devices.values() for cell in against_the_best(rows, operator, mode))]
        for label, (operator, mode) in SIX.items()
    ]
    head = ["", *(cell for device in devices for cell in (f"{device}: best rival", "its time over ours"))]
    return markdown(head, table)


# ---- the training: bench/results/training.json ----


def cell(result: dict[str, Any], stage: str, when: str, metric: str) -> str:
    """Mean over the seeds in per cent, with the lowest and highest."""
    return spread([seed["stages"][stage][when][metric] for seed in result["seeds"]])


def kept_runs() -> dict[str, dict[str, Any]]:
    """What training.json keeps of finished runs, by name."""
    return json.loads((RESULTS / "training.json").read_text())


def default_run() -> dict[str, Any]:
    """The smoke preset as it is: the first run."""
    return next(iter(kept_runs().values()))


def reached() -> list[str]:
    """Five rows by six figures: the demo, each stage, and what is reached without seeing the image."""
    result = default_run()
    metrics = {
        "caption of a box: ROUGE-L": "bbox2caption_rouge_l",
        "exact": "bbox2caption_exact",
        "names the colour": "bbox2caption_colour",
        "the pattern": "bbox2caption_pattern",
        "the kind": "bbox2caption_kind",
        "box of a sentence: IoU of 0.5 or more": "caption2bbox_acc50",
    }
    states = {
        "after stage 1": ("pretrain", "after"),
        "**after stage 2**": ("adapt", "after"),
        "stage 2, shown another image": ("adapt", "other_image"),
        "stage 2 on a random, frozen encoder": ("adapt", "control"),
    }
    table = [[label, *(cell(result, *state, metric) for metric in metrics.values())] for label, state in states.items()]
    best = [max(floor.get(metric, 0) for floor in result["floors"].values()) for metric in metrics.values()]
    table.append(["best guess without the image", *(f"{100 * value:.1f}" for value in best)])
    times = sorted({f"{seed['seconds'] / 60:.0f}" for seed in result["seeds"]}, key=int)
    return [
        *markdown(["per cent", *metrics], table),
        "",
        f"Means of {len(result['seeds'])} seeds (lowest to highest) on {result['data']['evaluated']} test images; "
        f"{' to '.join(dict.fromkeys((times[0], times[-1])))} minutes a seed on two cores with other work "
        f"({result['device']}, commit {result['commit']}).",
    ]


def quick() -> list[str]:
    """How long the default run takes, and what it reaches after stage 2 beside what it is to be measured against."""
    result = kept_runs()["quick"]
    (seed,) = result["seeds"]
    stage = seed["stages"]["adapt"]
    best = {name: max(floor.get(name, 0) for floor in result["floors"].values()) for name in stage["after"]}

    def figure(name: str) -> str:
        reached, control, guess = (100 * of[name] for of in (stage["after"], stage["control"], best))
        return f"{reached:.0f} % ({control:.0f} on a random encoder, {guess:.0f} by the best guess)"

    return [
        f"Training and evaluations took {seed['seconds'] / 60:.1f} minutes on two cores ({result['device']}, commit "
        f"{result['commit']}). Captions' ROUGE-L was {figure('bbox2caption_rouge_l')}, patterns named right "
        f"{figure('bbox2caption_pattern')}, boxes found {figure('caption2bbox_acc50')}.",
    ]


def picture() -> list[str]:
    """The rates of right answers that the picture's answers were drawn from."""
    result = default_run()
    stages = result["seeds"][0]["stages"]
    captions = stages["pretrain"]["after"]["scenes/bbox2caption_exact"]
    boxes = stages["adapt"]["after"]["scenes/caption2bbox_acc50"]
    return [
        f"Of all answers about such pictures, {100 * captions:.0f} % of the captions and {100 * boxes:.0f} % of the "
        "boxes are right."
    ]


SOURCES = {"shapes": "scenes", "new combinations": "scenes-heldout", "text": "pages", "photographs": "photographs"}
"""What docs/results.md calls the sources of the sample set."""

CAPTION_METRICS = {
    "ROUGE-L, all": "bbox2caption_rouge_l",
    "exact, all": "bbox2caption_exact",
    **{f"{name} of shapes": f"bbox2caption_{name}" for name in ("colour", "pattern", "kind", "size")},
    **{f"ROUGE-L, {label}": f"{source}/bbox2caption_rouge_l" for label, source in SOURCES.items()},
}
BOX_METRICS = {
    "all": "caption2bbox_acc50",
    **{label: f"{source}/caption2bbox_acc50" for label, source in SOURCES.items()},
    **{f"{size} boxes": f"caption2bbox_acc50_{size}" for size in SIZES},
    "mean IoU, all": "caption2bbox_miou",
}


def states(result: dict[str, Any], metrics: dict[str, str]) -> list[str]:
    """The model in each of its states, every control and every floor, by some metrics."""
    labels = [
        ("**after stage 1**", "pretrain", "after"),
        ("after stage 1, shown another test image", "pretrain", "other_image"),
        ("after stage 1, text alone", "pretrain", "text_only"),
        ("**after stage 2**", "adapt", "after"),
        ("after stage 2, shown another test image", "adapt", "other_image"),
        ("after stage 2, text alone", "adapt", "text_only"),
        ("stage 2 on a random, frozen encoder", "adapt", "control"),
        ("before stage 1", "pretrain", "before"),
    ]
    rows = [
        [label, *(cell(result, stage, when, metric) for metric in metrics.values())] for label, stage, when in labels
    ]
    for floor, values in result["floors"].items():
        cells = [f"{100 * values[metric]:.1f}" if metric in values else "" for metric in metrics.values()]
        if any(cells):
            rows.append([f"floor: {floor.replace('_', ' ')}", *cells])
    return markdown(["", *metrics], rows)


def variants(results: dict[str, Any]) -> list[str]:
    """The recipe with other forms of self-distillation, and what became of the features."""
    head = ["run", "seeds", "stage 1 captions", "stage 2 captions", "stage 2 boxes", "effective rank"]
    head += ["standard deviation"]
    rows = []
    for name, result in results.items():
        features = result["mean"]["features"]["pretrain"]
        cells = [
            cell(result, stage, "after", metric)
            for stage, metric in (
                ("pretrain", "bbox2caption_rouge_l"),
                ("adapt", "bbox2caption_rouge_l"),
                ("adapt", "caption2bbox_acc50"),
            )
        ]
        rank = f"{features['effective_rank_before']:.1f} -> {features['effective_rank_after']:.1f}"
        spread = f"{features['std_before']:.2f} -> {features['std_after']:.2f}"
        rows.append([name, str(len(result["seeds"])), *cells, rank, spread])
    return markdown(head, rows)


NOT_YET = "Not measured yet at three seeds."


def choices() -> list[str]:
    """Choices of the small presets taken back: what captions of test scenes name right, and boxes, after stage 2."""
    rows = [row for row in kept("perception.json") if row["stage"] == "adapt"]
    if not rows:
        return [NOT_YET]
    metrics = [*(f"bbox2caption_{name}" for name in ("colour", "pattern", "kind")), "caption2bbox_acc50"]
    table = []
    for change in dict.fromkeys(row["change"] for row in rows):
        runs = [row for row in rows if row["change"] == change]
        table.append([change, str(len(runs)), *(spread([run[metric] for run in runs]) for metric in metrics)])
    return [
        *markdown(["", "seeds", "colour", "pattern", "kind", "boxes, ACC@0.5"], table),
        "",
        f"Per cent, of up to {max(row['scenes'] for row in rows)} test scenes, after stage 2 ({rows[0]['device']}, "
        f"commit {', '.join(sorted({row['commit'] for row in rows}))}, `python bench/perception.py`).",
    ]


def instruct() -> list[str]:
    """What the chat template and the stage align are worth with a frozen Instruct model."""
    rows = kept("instruct.json")
    if not rows:
        return [NOT_YET]
    what = {
        "raw": ["raw text", "projector"],
        "template": ["chat template", "projector"],
        "pretrain": ["chat template", "encoder and projector, 1e-5"],
        "align": ["chat template", "projector for the first half (align), then as above"],
    }
    first = next(iter(rows.values()))
    steps = [step for step, _ in first["nats_a_token"]]
    table = [[*what[name], *(f"{dict(row['nats_a_token'])[step]:.2f}" for step in steps)] for name, row in rows.items()]
    return [
        *markdown(["questions", "what learns", *(f"step {step}" for step in steps)], table),
        "",
        f"Nats a token of the answers about boxes of test images, one seed ({first['device']}, commit "
        f"{first['commit']}, `python bench/instruct.py`).",
    ]


def training() -> list[str]:
    default = default_run()
    minutes = default["seeds"][0]["seconds"] / 60
    return [
        f"The smoke preset, {len(default['seeds'])} seeds (mean, lowest to highest), {default['data']['evaluated']} "
        "test images that training never saw, in per cent.",
        "",
        "Captions of boxes:",
        "",
        *states(default, CAPTION_METRICS),
        "",
        "Boxes of sentences, ACC@0.5 where nothing else is said:",
        "",
        *states(default, BOX_METRICS),
        "",
        "What stage 1 does to the encoder's features (granvit.train.distill.feature_statistics):",
        "",
        *variants(kept_runs()),
        "",
        f"The first seed's training, control and evaluations took {minutes:.1f} minutes on two cores that had other "
        f"work, and at most {default['peak_memory_mb'] / 1024:.1f} GiB "
        f"({default['device']}, {versions_of(default)}, commit {default['commit']}); every figure is in "
        "[bench/results/training.json](../bench/results/training.json).",
    ]


# ---- a run measured from start to end: bench/results/evaluation.json ----

STATES = {
    "trained": "after both stages",
    "control": "stage 2 on a random encoder",
    "untrained": "before stage 1",
}
"""{name in the file: how the table calls it}, as bench/evaluation.py writes them."""
WHOLE = {
    "captions of boxes: ROUGE-L": "bbox2caption_rouge_l",
    **{title: f"bbox2caption_{name}" for title, name in {
        "exact": "exact", "names the colour": "colour", "the pattern": "pattern", "the kind": "kind"
    }.items()},
    "boxes of sentences: mean IoU": "caption2bbox_miou",
    "ACC@0.5": "caption2bbox_acc50",
}  # fmt: skip


def end_to_end() -> dict[str, Any]:
    return json.loads((RESULTS / "evaluation.json").read_text())


def whole() -> list[str]:
    """A row a measure, a column a model: the probe's, granvit.eval's and lmms-eval's."""
    result = end_to_end()
    probe = {(row["target"], row["encoder"]): row["metrics"] for row in result["probe"]["rows"] if row["grid"] == "1x1"}
    models = result["models"]
    encoders = {name: name if ("kind", name) in probe else "untrained" for name in models}  # the control's may be that
    tasks = {
        name: {task["task"]: {measure: values["lmms_eval"] for measure, values in task["measures"].items()}
               for task in model["tasks"]}
        for name, model in models.items()
    }  # fmt: skip
    measures: list[tuple[str, str, Callable[[str], float]]] = [
        *(("" if number else "probe", f"{target}, linear",
           lambda name, target=target: probe[target, encoders[name]]["linear_top1"])
          for number, target in enumerate(("colour", "pattern", "kind"))),
        ("", "kind, nearest region (R@1)", lambda name: probe["kind", encoders[name]]["retrieval_r1"]),
        *(("" if number else "granvit.eval", title, lambda name, metric=metric: models[name]["figures"][metric])
          for number, (title, metric) in enumerate(WHOLE.items())),
        ("lmms-eval", "boxes, `refcoco_bbox_rec_*`: IoU", lambda name: tasks[name]["refcoco_bbox_rec"]["IoU"]),
        ("", "ACC@0.5", lambda name: tasks[name]["refcoco_bbox_rec"]["ACC@0.5"]),
        ("", "captions, `refcoco_bbox_*`: ROUGE_L", lambda name: tasks[name]["refcoco_bbox"]["ROUGE_L"]),
    ]  # fmt: skip
    table = [[by, measure, *(f"{100 * value(name):.1f}" for name in STATES)] for by, measure, value in measures]
    questions = models["trained"]["tasks"][0]["questions"]
    return [
        *markdown(["by", "per cent", *STATES.values()], table),
        "",
        f"Run: {result['run']}. The probe: {result['probe']['counts']['test']['regions']:,} test regions, one vector a "
        f"region; the rest: {questions} questions of each task on {result['images']} test images "
        f"({result['device']}, commit {result['commit']}, `python bench/evaluation.py RUN --python PYTHON`).",
    ]


def public() -> list[str]:
    """A row a measure of a RefCOCO task: by lmms-eval, and by granvit.eval where it has the same."""
    result = end_to_end()
    tasks = result["models"]["trained"]["tasks"]
    table = []
    for task in tasks:
        for number, (name, values) in enumerate(task["measures"].items()):
            table.append([
                "" if number else f"`{task['task']}_*`", name,
                *(f"{values[by]:.4f}" if by in values else "" for by in ("lmms_eval", "granvit")),
            ])  # fmt: skip
    equal = {
        name: ", ".join(f"{task['equal_answers']} of {task['questions']}" for task in result["models"][name]["tasks"])
        for name in STATES
    }
    return [
        *markdown(["task", "measure", "lmms-eval", "granvit.eval"], table),
        "",
        f"Run: {result['run']}, on {result['images']} test images. Equal answers, task by task: {equal['trained']}; of "
        f"the control {equal['control']}; before stage 1 {equal['untrained']}. {result['device']}, "
        f"{versions_of(result)}, commit {result['commit']}.",
    ]


def probed() -> list[str]:
    """What the features of smoke's encoder tell, beside itself before training and plain pixels."""
    result = end_to_end()["probe"]
    columns = {"linear": "linear_top1", "kNN": "knn_top1", "R@1": "retrieval_r1", "mAP": "retrieval_map"}
    table = [
        [row["target"], row["encoder"], row["grid"]]
        + [f"{100 * row['metrics'][name]:.1f}" for name in columns.values()]
        for row in sorted(result["rows"], key=lambda row: (row["target"], row["grid"]))
    ]
    test = result["counts"]["test"]
    return [
        *markdown(["of regions", "encoder", "grid", *columns], table),
        "",
        f"Per cent, of {test['regions']:,} regions of {test['images']:,} test images ({result['device']}, commit "
        f"{result['commit']}, `python bench/evaluation.py RUN --python PYTHON`).",
    ]


FILES: dict[str, dict[str, Callable[[], list[str]]]] = {
    "README.md": {
        "picture": picture,
        "quick": quick,
        "benchmarks": benchmarks,
        "reached": reached,
        "evidence": evidence.summary,
    },
    "docs/results.md": {"training": training},
    "docs/evaluation.md": {"whole": whole, "probe": probed, "public": public},
    "docs/training.md": {"choices": choices, "instruct": instruct},
    "docs/evidence.md": {
        **{name: partial(evidence.table, name) for name in evidence.TABLES},
        "probe": evidence.probe,
        "parts": evidence.parts,
        "asked": evidence.asked,
        "pace": evidence.pace,
        "speed": evidence.speed,
        "audits": evidence.audits,
        "photographs": evidence.photographs,
    },
    "docs/kernels.md": {**{name: partial(tables_of, name) for name in OPERATORS}, "others": others},
}
"""{file: {the name in its markers: what makes its lines}}."""


if __name__ == "__main__":
    write()
