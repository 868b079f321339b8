"""A run's report: runs/NAME/report/index.html, one self-contained file with curves, tables and pictures.

Drawn from the run's metrics.jsonl, report/summary.json and report/predictions.json; the pictures come from
the data set that summary.json names. Captions and answers are text from outside: Jinja escapes every value.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml
from markupsafe import escape

from granvit.data.loader import GranDataset
from granvit.data.mixture import open_split
from granvit.data.page import as_data, encoded, render
from granvit.eval.curves import draw_curves, panels
from granvit.eval.failures import failures
from granvit.eval.metrics import Prediction, place, scored
from granvit.eval.names import CONTROL_WORDS, FLOOR_WORDS, METRICS, STATES, stage_name
from granvit.eval.pictures import MAPS, card, choose, draw_maps, open_pictures, shown_picture
from granvit.eval.run_files import existing, read_lines, read_predictions, read_summary
from granvit.eval.tables import SOURCES, headlines, tables
from granvit.metrics_log import write_aside


def write_report(run_dir: str | Path) -> Path:
    """Render a run's report/index.html (and report/curves.png) and return its path.

    Of a run of several seeds, which has a folder seed-N for each, curves and pictures are the first one's and
    the figures the means. ValueError naming the first of metrics.jsonl, report/summary.json and
    report/predictions.json (but where there are no floors: nothing was asked of regions) that is missing or damaged.
    """
    run = Path(run_dir)
    report = run / "report"
    seeds = sorted(int(folder.name.removeprefix("seed-")) for folder in run.glob("seed-*"))
    first = run / f"seed-{seeds[0]}" if seeds else run
    lines = read_lines(existing(run, first / "metrics.jsonl"))
    summary = read_summary(existing(run, report / "summary.json"))
    curves = panels(lines, summary)
    answers = first / "report" / "predictions.json"
    predictions = read_predictions(existing(run, answers)) if summary["floors"] else {}
    states = _states(summary, predictions, first / "control" / "report" / "predictions.json")
    scores = {state: scored(several) for state, several in states.items()}

    answered = [stage for stage, state in states if state == "after"]
    groups = choose(predictions)
    asked = [prediction for group in groups for prediction in group["predictions"]]
    images = open_pictures(_test(summary["data"]["path"]), set(map(place, asked))) if asked else {}
    pictures = {where: shown_picture(image) for where, image in images.items()}
    seeing = {key: several for key, several in states.items() if key[1] not in ("text_only", "other_image")}
    named = {STATES[state][0].format(stage_name(stage)): several for (stage, state), several in seeing.items()}
    for group in groups:
        group["cards"] = [card(p, named, pictures[place(p)]["size"]) for p in group["predictions"]]
    natural = {place(p): p for p in asked if p["kind"] == "natural"}
    of_maps = sorted(natural.values(), key=lambda p: p["source"])[:: max(1, len(natural) // MAPS)][:MAPS]
    draw_curves(curves).savefig(report / "curves.png", dpi=110)
    html = render(
        "report.html",
        "granvit.eval",
        scripts=["curves.js"],
        title=f"GranViT: {run.resolve().name}",
        summary=summary,
        headlines=headlines(summary, scores),
        curves=encoded((report / "curves.png").read_bytes(), "png"),
        curves_data=as_data(curves),
        tables=tables(summary, scores),
        features={stage_name(name): values for name, values in summary["mean"].get("features", {}).items()},
        failures=failures(predictions[answered[-1]]) if answered else [],
        mistaken=stage_name(answered[-1]) if answered else None,
        pictures={where: {"name": f"p{i}"} | picture for i, (where, picture) in enumerate(pictures.items())},
        groups=[group | {"stage": stage_name(group["stage"])} for group in groups],
        maps=draw_maps(first, summary.get("config", {}), [(images[place(p)], p) for p in of_maps]),
        configuration=escape(yaml.safe_dump(summary.get("config", {}), sort_keys=False, allow_unicode=True)),
        export=(first / "export").relative_to(run) if (first / "export").is_dir() else None,
        sources=SOURCES if len({p["source"] for several in predictions.values() for p in several}) > SOURCES else None,
        quoted=shlex.quote,
        glossary={"Figures": METRICS, "Who answers": FLOOR_WORDS | CONTROL_WORDS},
    )
    page = report / "index.html"
    write_aside(page, html)
    return page


def _test(path: str | list[str]) -> GranDataset:
    """The test split. A run has kept to its fault budget already, and no fault ends the report."""
    return open_split([path] if isinstance(path, str) else path, "test", fault_budget=1.0)


def _states(
    summary: dict[str, Any], predictions: dict[str, list[Prediction]], control: Path
) -> dict[tuple[str, str], list[Prediction]]:
    """The answers that are known, by stage and state: before the first stage, after each also of the model blinded,
    and the control's."""
    stages = summary["mean"]["stages"]
    states = {(stage, "before"): predictions["before"] for stage in list(stages)[:1] if "before" in predictions}
    for stage in stages:
        kept = {"after": stage} | {state: f"{stage} {state}" for state in ("text_only", "other_image")}
        states |= {(stage, state): predictions[name] for state, name in kept.items() if name in predictions}
    if control.is_file():
        states["adapt", "control"] = read_predictions(control).get("adapt", [])
    return states
