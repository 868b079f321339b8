"""Floors on toy sets whose best blind answers are known."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from granvit.eval.baselines import best_box, best_caption, floors, rouge_l_matrix, spread
from granvit.eval.metrics import rouge_l

SMALL, LARGE = (0.0, 0.0, 0.1, 0.1), (0.1, 0.1, 0.9, 0.9)


def dataset(regions, source="toy"):
    """A GranDataset's stand-in: one image a region, and one faulty row (None)."""
    rows = [
        SimpleNamespace(id=str(i), source=source, regions=(SimpleNamespace(box=b, caption=c, kind=k),))
        for i, (b, c, k) in enumerate(regions)
    ]
    return [None, *rows]


def test_rouge_l_matrix_equals_the_library():
    rng = random.Random(0)
    vocabulary = ["a", "red", "blue", "circle", "on", "the", "left", "Total:", "12.50", "-", "naïve"]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(0, 12))) for _ in range(40)]
    texts += ["", " ".join(rng.choices(vocabulary[:3], k=64)), " ".join(rng.choices(vocabulary[:3], k=63))]
    expected = np.array([[rouge_l(reference, candidate) for reference in texts] for candidate in texts])
    np.testing.assert_allclose(rouge_l_matrix(texts, texts), expected, atol=1e-12)


def test_best_caption_is_the_one_nearest_to_all_not_the_most_frequent():
    captions = ["dog", "dog", "a red circle here", "a red square here", "a red star here"]
    assert best_caption(captions) in captions[2:]
    assert best_caption(["dog", "cat", "cat"]) == "cat"


def test_best_box_overlaps_most_boxes():
    boxes = np.array([[0, 0, 0.1, 0.1], [0.5, 0.5, 0.9, 0.9], [0.5, 0.5, 0.9, 0.95], [0.5, 0.5, 0.9, 0.85]])
    assert best_box(boxes).tolist() == [0.5, 0.5, 0.9, 0.9]


def test_floors_on_a_toy_set():
    train = dataset(
        [(SMALL, "a small red mouse", "natural")] * 30
        + [(LARGE, "a large grey elephant", "natural")] * 29
        + [(SMALL, "Total", "ocr")] * 5
    )
    test = dataset([(SMALL, "a small red mouse", "natural"), (LARGE, "a large grey elephant", "natural")])
    result = floors(train, test)
    assert result["most_frequent"]["bbox2caption_exact"] == 0.5
    assert result["blind"]["bbox2caption_exact"] == 1.0  # the size gives it away
    assert result["blind"]["caption2bbox_acc50"] == 0.5  # SMALL, the likelier box, is right once
    assert result["whole_image"]["caption2bbox_miou"] == pytest.approx((0.01 + 0.64) / 2)
    assert result["centre_box"]["caption2bbox_miou"] == pytest.approx((0 + 0.25 / 0.64) / 2)
    mean = (30 * np.array(SMALL) + 29 * np.array(LARGE)) / 59
    side = mean[2] - mean[0]
    overlap = (mean[2] - 0.1) ** 2  # the mean box starts before 0.1 and ends inside LARGE
    small = (0.1 - mean[0]) ** 2 / (side**2 + 0.01 - (0.1 - mean[0]) ** 2)
    large = overlap / (side**2 + 0.64 - overlap)
    assert result["mean_box"]["caption2bbox_miou"] == pytest.approx((small + large) / 2)
    assert "caption2bbox_acc50" not in result["most_frequent"]


def test_a_size_class_with_few_regions_falls_back_on_its_kind():
    train = dataset([(SMALL, "a small red mouse", "natural")] * 30 + [(LARGE, "whale", "natural")] * 3)
    test = dataset([(LARGE, "a small red mouse", "natural")])
    assert floors(train, test)["blind"]["bbox2caption_exact"] == 1.0


def test_a_kind_that_training_lacks_still_gets_an_answer():
    train = dataset([(SMALL, "a mouse", "natural")])
    result = floors(train, dataset([(SMALL, "Total 5", "ocr")]))
    assert result["blind"]["ocr_cer"] > 0.5 and result["blind"]["caption2bbox_acc50"] == 1


@pytest.mark.parametrize("empty", ["train", "test"])
def test_a_split_without_regions_is_named(empty):
    full = dataset([(SMALL, "a mouse", "natural")])
    splits = {"train": full, "test": full} | {empty: [None]}
    with pytest.raises(ValueError, match=f"{empty} has no region"):
        floors(**splits)


def test_a_limit_spreads_over_the_whole_split():
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread(range(3), None) == spread(range(3), 5) == [0, 1, 2]
    train = dataset([(SMALL, "a mouse", "natural")])
    test = dataset([(SMALL, "a mouse", "natural"), (SMALL, "a cat", "natural"), (SMALL, "a cat", "natural")])
    assert floors(train, test, limit=2)["blind"]["bbox2caption_exact"] == 0  # rows 0 (faulty) and 2
