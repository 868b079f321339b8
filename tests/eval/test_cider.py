import json
import math
from pathlib import Path

import pytest

from granvit.eval.cider import cider_d

STORED = json.loads(Path(__file__).with_name("cider.json").read_text())["cases"]  # made by make_cider.py


@pytest.mark.parametrize("case", STORED, ids=lambda case: case["name"])
def test_it_equals_pycocoevalcaps(case):
    truths, answers = ([text.split() for text in case[side]] for side in ("truths", "answers"))
    assert cider_d(truths, answers) == pytest.approx(case["scores"], rel=1e-9, abs=1e-9)


def test_the_formula_by_hand():
    # Each word stands in one of two truths: idf log 2, which cancels. Of 1-grams 1 * 1 / (1 * sqrt 2), of longer ones
    # nothing; the answer is a word too long: exp(-1 / 72).
    expected = 10 / 4 / math.sqrt(2) * math.exp(-1 / 72)
    assert cider_d([["cat"], ["dog"]], [["cat", "dog"], []]) == pytest.approx([expected, 0])


def test_a_repeated_word_earns_nothing():
    truths = [["a", "red", "cat"], ["two", "blue", "dogs"]]
    once, often = (cider_d(truths, [["red"] * times, []])[0] for times in (1, 5))
    assert 0 < often < once


def test_no_captions_have_no_scores():
    assert cider_d([], []).shape == (0,)


def test_each_truth_takes_an_answer():
    with pytest.raises(ValueError, match="2 truths and 1 answers"):
        cider_d([["a"], ["b"]], [["a"]])
