"""The tables of docs/evidence.md, from bench/results/evidence.json (bench/evidence.py). Called by bench/readme.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

from evidence_variants import LONG_RANDOM, ONE_QUESTION, ONE_STEP, PART, RANDOM, TOKENS, UNDISTILLED, WHOLE, WIDE
from performance import kept, markdown, spread

NOT_YET = "Not measured yet: `python bench/evidence.py`."
Row = dict[str, Any]
Figure = Callable[[Row], "float | None"]
Columns = dict[str, Figure]
"""{title: a figure of a row, a share or None where it has none}."""


def at(*keys: str) -> Figure:
    """What lies in a row under keys within keys."""

    def value(row: Row) -> float | None:
        for key in keys:
            row = row.get(key, {})
        return None if isinstance(row, dict) else row

    return value


def share(part: str, whole: str) -> Figure:
    """One of an audit's counts over another, of regions that are not text."""
    return lambda row: row["audit"]["natural"][part] / row["audit"]["natural"][whole]


def right_left_out(row: Row) -> float:
    """The share of the regions with right captions, not text, that an audit left out."""
    of = row["audit"]["natural"]
    return (of["left_out"] - of["wrong_left_out"]) / (of["checked"] - of["wrong"])


ENCODER: Columns = {
    "kind, linear": at("encoder", "probe", "kind linear 1x1"),
    "kind, neighbours": at("encoder", "probe", "kind knn 1x1"),
}
SAID = {
    "captions, ROUGE-L": "natural_bbox2caption_rouge_l",
    "kind": "bbox2caption_kind",
    "kind, new combinations": "scenes-heldout/bbox2caption_kind",
    "boxes, ACC@0.5": "natural_caption2bbox_acc50",
    "ACC@0.75": "natural_caption2bbox_acc75",
}
"""{title: metric} of what a model says after a stage."""
ALL: Columns = ENCODER | {title: at("adapt", "metrics", metric) for title, metric in SAID.items()}
STEP: Columns = {
    **{title: ALL[title] for title in ("boxes, ACC@0.5", "ACC@0.75")},
    "ACC@0.9": at("adapt", "metrics", "natural_caption2bbox_acc90"),
    "mean IoU": at("adapt", "metrics", "natural_caption2bbox_miou"),
    "no box": at("adapt", "metrics", "natural_caption2bbox_unparsed"),
    "captions, kind": ALL["kind"],
}
AUDIT: Columns = {
    "regions left out": share("left_out", "checked"),
    "wrong among them": share("wrong_left_out", "left_out"),
    "of all wrong ones": share("wrong_left_out", "wrong"),
    "of all right ones": right_left_out,
}

TABLES: dict[str, tuple[tuple[str, ...], Columns]] = {
    "distillation": (
        (WHOLE, UNDISTILLED, "lambda 0.3", "lambda 3", "alpha 0.9", "alpha 0.999",
         "target mse", "target cosine", "target layer_norm",
         "crops as fine as the image", "crops of four times the patches"), ALL,
    ),
    "questions": (
        (WHOLE, "boxes as location tokens", "boxes as location and region tokens", "no cell positions", ONE_QUESTION),
        ALL,
    ),
    "tuned": ((WHOLE, "encoder tuned in stage 2"), ALL),
    "scaling": ((WHOLE, "1/8 of the images", PART, "1/2 of the images", WIDE), ALL),
    "one step": ((TOKENS, ONE_STEP), STEP),
    "quality": (
        (PART, "10 % wrong", "10 % wrong, audited", "30 % wrong", "30 % wrong, audited",
         "30 % wrong, audited by itself"), ALL,
    ),
}  # fmt: skip
"""{the name in the markers: (the variants, the columns)} of a table. The others are held to the first variant."""


def runs_of(variant: str, size: str = "small") -> list[Row]:
    """The rows of a variant; "floors" is of the data."""
    return [row for row in kept("evidence.json") if row["size"] == size and row["variant"] == variant]


def figures(rows: Sequence[Row], figure: Figure) -> list[float]:
    return [value for row in rows if (value := figure(row)) is not None]


def cells(rows: Sequence[Row], columns: Columns) -> list[str]:
    """The mean and range of each figure."""
    return [spread(figures(rows, figure)) for figure in columns.values()]


def differences(rows: Sequence[Row], measure: Sequence[Row], figure: Figure) -> list[float]:
    """By how many points a variant's figure differs from that of the run of the same seed that it is held to."""
    theirs = {row["seed"]: figure(row) for row in measure}
    pairs = [(figure(row), theirs.get(row["seed"])) for row in rows]
    return [100 * (mine - other) for mine, other in pairs if mine is not None and other is not None]


def source(rows: Sequence[Row]) -> str:
    devices, commits = (", ".join(sorted({row[key] for row in rows})) for key in ("device", "commit"))
    return f"Mean of the seeds (lowest to highest): {devices}, commit {commits}, `python bench/evidence.py`."


def with_pair(rows: Sequence[Row], measure: Sequence[Row]) -> list[Row]:
    """The rows whose seed there is in both."""
    seeds = {row["seed"] for row in measure}
    return [row for row in rows if row["seed"] in seeds]


def table(name: str) -> list[str]:
    """What the first variant reaches, and a line for each other one: by how many points it differs. Where another has
    fewer seeds, what the first reaches with these has a line, too."""
    variants, columns = TABLES[name]
    measure = runs_of(variants[0])
    others = {variant: rows for variant in variants[1:] if (rows := with_pair(runs_of(variant), measure))}
    if not others:
        return [NOT_YET]
    lines = [[f"{variants[0]}, per cent", str(len(measure)), *cells(measure, columns)]]
    fewer = {frozenset(row["seed"] for row in rows) for rows in others.values()} - {
        frozenset(r["seed"] for r in measure)
    }
    for seeds in sorted(fewer, key=len):
        label = f"the same, seed {' and '.join(map(str, sorted(seeds)))} alone"
        lines.append([label, str(len(seeds)), *cells([row for row in measure if row["seed"] in seeds], columns)])
    for variant, rows in others.items():
        points = (spread(differences(rows, measure, figure), 1, sign="+") for figure in columns.values())
        lines.append([variant, str(len(rows)), *points])
    return [
        *markdown(["", "seeds", *columns], lines), "",
        "Of variants: points more or less than the run of the same seed that they are held to. "
        + source([*measure, *(row for rows in others.values() for row in rows)]),
    ]  # fmt: skip


def audits() -> list[str]:
    """How many wrong captions an audit left out."""
    variants = TABLES["quality"][0][1:]
    lines = [
        [variant, str(len(rows)), *cells(rows, AUDIT)]
        for variant in variants
        if (rows := [row for row in runs_of(variant) if "audit" in row])
    ]
    return markdown(["per cent", "seeds", *AUDIT], lines) if lines else [NOT_YET]


def probed() -> Iterator[tuple[str, str, list[Row], str, str]]:
    """What was probed: vectors of a box, features, the runs, and under which names a run's row has them."""
    before, after = runs_of(RANDOM), runs_of(WHOLE)
    for grid, vectors, pixels in (("1x1", "one vector", "mean colour"), ("7x7", "7 x 7 vectors", "7 x 7 pixels")):
        yield vectors, "before stage 1", before, "probe", grid
        yield vectors, "after stage 1", after, "probe", grid
        yield vectors, pixels, after[:1], "pixels", grid


def probe() -> list[str]:
    """What features tell of regions before and after stage 1, beside plain pixels."""
    before, after = runs_of(RANDOM), runs_of(WHOLE)
    if not before or not after:
        return [NOT_YET]
    titles = {"linear": "linear", "knn": "neighbours"}
    columns = {
        f"{what}, {title}": f"{what} {way}" for what in ("colour", "pattern", "kind") for way, title in titles.items()
    }
    lines = []
    for vectors, label, rows, encoder, grid in probed():
        of = {title: at("encoder", encoder, f"{name} {grid}") for title, name in columns.items()}
        lines.append([vectors, label, *cells(rows, of)])
    counts = after[0]["encoder"]["counts"]
    return [
        *markdown(["per cent", "features", *columns], lines),
        "",
        f"{source([*before, *after])} {counts['train']['regions']:,} regions to learn from, "
        f"{counts['test']['regions']:,} to tell.",
    ]


def parts() -> list[str]:
    """The method without its stages."""
    whole, columns = runs_of(WHOLE), {title: at("metrics", metric) for title, metric in SAID.items()}
    lines = []
    for label, rows, stage in (
        ("after stage 1", whole, "pretrain"), ("after stage 2", whole, "adapt"),
        ("stage 2 alone, on a random encoder", runs_of(RANDOM), "adapt"),
        ("the same with stage 1's steps, too", runs_of(LONG_RANDOM), "adapt"),
    ):  # fmt: skip
        if rows:
            lines.append([label, str(len(rows)), *cells([row[stage] for row in rows], columns)])
    if not lines:
        return [NOT_YET]
    lines.append(["best guess without the image", "", *(best("floors", metric) for metric in SAID.values())])
    return [
        *markdown(["per cent", "seeds", *columns], lines),
        "",
        source([*whole, *runs_of(RANDOM), *runs_of(LONG_RANDOM)]),
    ]


def best(of: str, metric: str) -> str:
    """The best guess without the image."""
    known = [guess[metric] for row in runs_of("floors") for guess in row[of].values() if metric in guess]
    return spread(sorted(known)[-1:])


def summary() -> list[str]:
    """What README says of it."""
    variants = (WHOLE, RANDOM, UNDISTILLED, TOKENS, ONE_STEP)
    whole, random, undistilled, tokens, step = map(runs_of, variants)
    if not all((whole, random, undistilled, tokens, step)):
        return [NOT_YET]

    tokens, step = with_pair(tokens, step), with_pair(step, tokens)
    fewer = "" if len(step) == len(whole) else f"; of boxes in one step, of {len(step)}"

    def mean(rows: Sequence[Row], title: str) -> str:
        return f"{100 * fmean(figures(rows, ALL[title])):.0f} %"

    kind, said, box, close = "kind, linear", "kind", "boxes, ACC@0.5", "ACC@0.75"
    return [
        f"In runs with a shorter stage 1, one vector of the encoder tells a linear probe a drawn shape's kind in "
        f"{mean(random, kind)} of cases before it, in {mean(whole, kind)} after it, and without self-distillation in "
        f"{mean(undistilled, kind)}. After a longer stage 2 captions name it in {mean(whole, said)} and "
        f"{spread(figures(whole, ALL[box]), digits=0)} % of the boxes are found; on a random encoder "
        f"{mean(random, said)} and {mean(random, box)}.",
        f"With twice the steps of stage 2 {mean(tokens, box)} of the boxes are found token by token, and "
        f"{mean(step, box)} in one step (`--model.parallel-boxes`); with an IoU of 0.75 {mean(tokens, close)} and "
        f"{mean(step, close)}. One step is {spread([fmean(faster(step))], 1)} times as fast.",
        f"Means of {len(whole)} seeds{fewer}. Ranges, and every part by itself, "
        "scaling, wrong captions: [docs/evidence.md](docs/evidence.md).",
    ]


def faster(rows: Sequence[Row]) -> list[float]:
    """How many times as many boxes are told in one step."""
    return [row["boxes_a_second"]["one step"] / row["boxes_a_second"]["token by token"] for row in rows]


def photographs() -> list[str]:
    """What is said of pictures that are not drawn."""
    metrics = {
        "captions, ROUGE-L": "natural_bbox2caption_rouge_l", "boxes, ACC@0.5": "natural_caption2bbox_acc50",
        "mean IoU": "natural_caption2bbox_miou",
    }  # fmt: skip
    runs = {WHOLE: runs_of(WHOLE), "a random encoder": runs_of(RANDOM)}
    if not all(runs.values()):
        return [NOT_YET]
    columns = {title: at("photographs", metric) for title, metric in metrics.items()}
    lines = [[label, str(len(rows)), *cells(rows, columns)] for label, rows in runs.items()]
    guesses = [best("floors_photographs", metric) for metric in metrics.values()]
    lines.append(["best guess without the image", "", *guesses])
    return [
        *markdown(["per cent", "seeds", *columns], lines),
        "",
        source([row for rows in runs.values() for row in rows]),
    ]


def asked() -> list[str]:
    """How much was learnt from: as many steps hold more or fewer questions."""
    lines = []
    for variant in (*TABLES["scaling"][0], *TABLES["questions"][0][1:]):
        for row in runs_of(variant)[:1]:
            numbers = [row["regions"], *(row[stage]["regions_asked"] for stage in ("pretrain", "adapt"))]
            lines.append([variant, *(f"{number:,}" for number in numbers)])
    if not lines:
        return [NOT_YET]
    return markdown(["", "regions in the data", "questions about them in stage 1", "in stage 2"], lines)


def pace() -> list[str]:
    """What one question a sample costs, beside all of an image's."""
    rows = runs_of(ONE_QUESTION)
    paces = [spread(figures(rows, at(f"{stage}_pace")), 1, 2) for stage in ("pretrain", "adapt")]
    if not rows:
        return [NOT_YET]
    each = [
        f"{fmean(figures(of, at('pretrain', 'regions_asked'))) / fmean(figures(of, at('pretrain', 'images'))):.1f}"
        for of in (runs_of(WHOLE), rows)
    ]
    return [
        f"The whole method asks about {each[0]} regions of an image at once in stage 1, one question a sample about "
        f"{each[1]}. Its steps take {paces[0]} times as long in stage 1, {paces[1]} times in stage 2, and it takes "
        "fewer of them, so that it trains for as long."
    ]


def speed() -> list[str]:
    """How fast boxes are told."""
    rows = runs_of(ONE_STEP)
    if not rows:
        return [NOT_YET]
    ways = {way: figures(rows, at("boxes_a_second", way)) for way in ("one step", "token by token")}
    return [
        f"On one thread of the CPU, images encoded before: {spread(ways['one step'], 1, 0)} boxes a second in one "
        f"step, {spread(ways['token by token'], 1, 0)} token by token: {spread(faster(rows), 1, 2)} times as many."
    ]
