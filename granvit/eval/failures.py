"""What a model says in place of what is there: each attribute that captions name, and what it is mistaken for."""

from __future__ import annotations

from collections import Counter
from typing import Any

from granvit.data.sample import ATTRIBUTES
from granvit.eval.intervals import interval
from granvit.eval.metrics import Prediction, Score, Vocabularies, named, place
from granvit.questions.prompts import BBOX2CAPTION

CONFUSIONS = 3  # that are named of each thing, and in the line about the whole attribute


def failures(predictions: list[Prediction], vocabularies: Vocabularies = ATTRIBUTES) -> list[dict[str, Any]]:
    """For each attribute of the vocabularies, over the captions that name one thing of it: {"attribute", "asked",
    "right", "confusions": [(true, said, times)], "rows": [{"thing", "asked", "right", "low", "high", "said": [(what,
    times)]}]}, the confusions the most frequent first, rows by the share that is right, least first.

    An answer that names several things of the attribute counts as wrong, as `metrics.attributes` has it.
    """
    said: dict[str, dict[str, list[tuple[str, Score]]]] = {}
    for prediction in predictions:
        if prediction["task"] != BBOX2CAPTION:
            continue
        for attribute, words in vocabularies.get(prediction["source"], {}).items():
            truth, answer = named(prediction["caption"], words), named(prediction["answer"], words)
            if len(truth) == 1:
                answers = said.setdefault(attribute, {}).setdefault(next(iter(truth)), [])
                score = Score(place(prediction), float(truth == answer))
                answers.append((" and ".join(sorted(answer)) or "none named", score))
    return [_attribute(attribute, things) for attribute, things in said.items()]


def _attribute(attribute: str, said: dict[str, list[tuple[str, Score]]]) -> dict[str, Any]:
    rows = []
    things = {thing: Counter(what for what, _ in answers) for thing, answers in said.items()}
    for thing, answers in things.items():
        asked, right = answers.total(), answers[thing]
        low, high = interval([score for _, score in said[thing]], share=True)
        wrong = [pair for pair in answers.most_common() if pair[0] != thing]
        rows.append(
            {"thing": thing, "asked": asked, "right": right, "low": low, "high": high, "said": wrong[:CONFUSIONS]}
        )
    rows.sort(key=lambda row: (row["right"] / row["asked"], row["thing"]))
    confusions = Counter(
        {(thing, what): times for thing, answers in things.items() for what, times in answers.items() if what != thing}
    )
    return {
        "attribute": attribute,
        "asked": sum(row["asked"] for row in rows),
        "right": sum(row["right"] for row in rows),
        "confusions": [(*pair, times) for pair, times in confusions.most_common(CONFUSIONS)],
        "rows": rows,
    }
