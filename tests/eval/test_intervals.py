"""Intervals against what defines them."""

import math
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest

from granvit.eval.intervals import bootstrap, wilson
from granvit.eval.metrics import Score, is_share, scored, summarise


@pytest.mark.parametrize(("right", "number"), [(0, 5), (1, 5), (157, 450), (450, 450), (1, 1)])
def test_wilsons_bounds_are_the_shares_that_a_test_at_5_percent_just_allows(right, number):
    z = NormalDist().inv_cdf(0.975)
    low, high = wilson(right / number, number)
    assert 0 <= low <= right / number <= high <= 1
    for bound in (low, high):
        distance = abs(right / number - bound)
        assert distance == pytest.approx(z * math.sqrt(bound * (1 - bound) / number), abs=1e-9)


def test_the_bootstrap_of_a_mean_is_that_of_the_central_limit():
    values = np.random.default_rng(1).uniform(size=400)
    scores = [Score(("", str(i)), value) for i, value in enumerate(values)]
    low, high = bootstrap(scores)
    half = 1.96 * stdev(values) / math.sqrt(len(values))
    assert (low + high) / 2 == pytest.approx(fmean(values), abs=0.2 * half)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert bootstrap(scores) == (low, high)
    # ten equal answers about a picture say no more than one of them
    assert bootstrap([score for score in scores for _ in range(10)]) == pytest.approx((low, high))


def test_the_bootstrap_knows_that_regions_of_an_image_are_alike():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2, 400).astype(float)
    low, high = bootstrap([Score(i, value) for i, value in enumerate(values)])
    half = 1.96 * (values.var() / 400) ** 0.5
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)
    wide = bootstrap([Score(i // 9, value) for i, value in enumerate(np.repeat(values, 9))])
    assert wide == pytest.approx((low, high)), "nine like regions an image say no more than one"


def test_ratios_are_resampled_as_ratios():
    long, short = Score(("", "long"), 0, 90), Score(("", "short"), 10, 10)
    assert bootstrap([long, short]) == (0.0, 1.0)  # twice the long one, twice the short one


def test_nothing_has_no_interval():
    for interval in (lambda: bootstrap([]), lambda: wilson(0.0, 0)):
        with pytest.raises(ValueError, match="at least 1 answer"):
            interval()
    for share in (1.01, -0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="a share is from 0 to 1"):
            wilson(share, 5)


def test_metrics_are_sums_of_scores_and_shares_are_known_by_name():
    base = {"id": "a", "source": "scenes", "kind": "ocr", "box": [0, 0, 1, 1], "predicted_box": None}
    truths = (("ab", "ab"), ("abcdef", "xbcdef"))
    asked = [base | {"task": "bbox2caption", "caption": c, "answer": a} for c, a in truths]
    box_task = base | {"task": "caption2bbox", "caption": "x", "answer": ""}
    asked += [box_task | {"predicted_box": box} for box in (None, [0, 0, 1, 1])]
    metrics, scores = summarise(asked), scored(asked)
    assert metrics.keys() == scores.keys()
    assert metrics["ocr_cer"] == pytest.approx(1 / 8) and metrics["caption2bbox_f1"] == pytest.approx(2 / 3)
    for name, values in scores.items():
        whole = {score.weight for score in values} == {1.0} and {score.value for score in values} <= {0.0, 1.0}
        assert whole or not is_share(name), name
    assert is_share("scenes/bbox2caption_colour") and is_share("chat_token_accuracy")
    means = ("ocr_cer", "caption2bbox_miou_small", "natural_bbox2caption_rouge_l", "caption2bbox_f1")
    assert not any(map(is_share, means))
