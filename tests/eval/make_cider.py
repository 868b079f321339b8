"""Makes cider.json: what pycocoevalcap's CIDEr-D gives, for tests without that package (104 MB).

`python tests/eval/make_cider.py`, in an environment with pycocoevalcap (1.2). It takes words between spaces.
"""

import json
import random
from importlib.metadata import version
from pathlib import Path

FILE = Path(__file__).with_name("cider.json")
WORDS = "a the red blue green striped dotted circle square star on left of near two three grass sign OPEN 24".split()


def caption(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choices(WORDS, weights=range(len(WORDS), 0, -1), k=draw.randint(least, most)))


def near(draw: random.Random, truth: str) -> str:
    """The truth with a few of its words dropped, replaced or said twice."""
    words = []
    for word in truth.split():
        words += {0: [], 1: [draw.choice(WORDS)], 2: [word, word]}.get(draw.randrange(10), [word])
    return " ".join(words)


def cases() -> dict[str, tuple[list[str], list[str]]]:
    """By name: truths, and an answer to each."""
    draw = random.Random(0)
    truths = [caption(draw, 1, 12) for _ in range(60)]
    long = [caption(draw, 20, 40) for _ in range(6)]
    few = ["a red circle on the left", "a red circle on the left", "a blue square", "star", "a", "two two two two two"]
    return {
        "near": (truths, [near(draw, truth) for truth in truths]),
        "equal": (truths, truths),
        "of the next": (truths, truths[1:] + truths[:1]),
        "long": (long, [near(draw, truth) for truth in long]),
        "odd": (
            few,
            ["", "a red red red red circle", "a blue square " * 9, "star star", "unknown words only", "two two two"],
        ),
        "empty truth": (["", "a cat sat on it", "a dog"], ["a cat", "", "a dog"]),
        "one truth": (["a red circle on grass"], ["a red circle on grass"]),
        "every truth alike": (["a red circle"] * 3, ["a red circle", "a circle", ""]),
    }


def main() -> None:
    from pycocoevalcap.cider.cider import Cider

    kept = []
    for name, (truths, answers) in cases().items():
        sides = ({i: [text] for i, text in enumerate(texts)} for texts in (truths, answers))
        scores = Cider().compute_score(*sides)[1]
        kept.append({"name": name, "truths": truths, "answers": answers, "scores": scores.tolist()})
    lines = ",\n".join(json.dumps(case) for case in kept)
    FILE.write_text(f'{{"pycocoevalcap": "{version("pycocoevalcap")}", "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
