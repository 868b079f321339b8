"""Floors on toy sets whose best blind answers are known."""

import random

import numpy as np
import pytest

from granvit.data.loader import GranDataset
from granvit.eval.baselines import best_box, best_caption, floors, rouge_l_matrix
from granvit.eval.metrics import rouge_l

SMALL, LARGE = (0.0, 0.0, 0.125, 0.125), (0.125, 0.125, 0.875, 0.875)


@pytest.fixture
def dataset(gran_rows):
    """dataset([(box, caption, kind), ...]) -> a GranDataset with one image a region."""
    return lambda regions: GranDataset(gran_rows([(str(i), [region]) for i, region in enumerate(regions)]))


def test_rouge_l_matrix_equals_rouge_l():
    rng = random.Random(0)
    vocabulary = ["a", "red", "blue", "circle", "on", "the", "left", "Total:", "12.50", "-", "naïve", "круг", "红色"]
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


def test_floors_on_a_toy_set(dataset):
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
    assert result["whole_image"]["caption2bbox_miou"] == pytest.approx((0.125**2 + 0.75**2) / 2)
    assert result["centre_box"]["caption2bbox_miou"] == pytest.approx((0 + 0.5**2 / 0.75**2) / 2)
    mean = (
        30 * np.array(SMALL) + 29 * np.array(LARGE)
    ) / 59  # from (m, m) to (n, n), over the corner of both
    m, n = mean[0], mean[2]
    small, large = (0.125 - m) ** 2, (n - 0.125) ** 2
    expected = small / ((n - m) ** 2 + 0.125**2 - small) + large / ((n - m) ** 2 + 0.75**2 - large)
    assert result["mean_box"]["caption2bbox_miou"] == pytest.approx(expected / 2)
    assert "caption2bbox_acc50" not in result["most_frequent"]
    assert "bbox2caption_exact" not in result["mean_box"]


def test_floors_answer_the_questions_that_the_model_is_asked(gran_rows, dataset):
    """A sentence that fits two regions of an image is asked for both."""
    twice = [(SMALL, "a mouse", "natural"), (LARGE, "a mouse", "natural"), (LARGE, "a whale", "natural")]
    result = floors(dataset(twice), GranDataset(gran_rows([("0", twice)])))
    assert result["blind"]["caption2bbox_acc50"] == pytest.approx(2 / 3)  # LARGE, asked for twice
    assert result["blind"]["bbox2caption_exact"] == pytest.approx(2 / 3)


def test_a_size_class_with_few_regions_falls_back_on_its_kind(dataset):
    train = dataset([(SMALL, "a small red mouse", "natural")] * 30 + [(LARGE, "whale", "natural")] * 3)
    test = dataset([(LARGE, "a small red mouse", "natural")])
    assert floors(train, test)["blind"]["bbox2caption_exact"] == 1.0


def test_a_kind_that_training_lacks_still_gets_an_answer(dataset):
    result = floors(dataset([(SMALL, "a mouse", "natural")]), dataset([(SMALL, "Total 5", "ocr")]))
    assert result["blind"]["ocr_cer"] > 0.5 and result["blind"]["caption2bbox_acc50"] == 1


def test_a_limit_spreads_over_the_whole_split(dataset):
    train = dataset([(SMALL, "a mouse", "natural")])
    test = dataset([(SMALL, "a mouse", "natural")] + [(SMALL, "a cat", "natural")] * 3)
    assert floors(train, test, limit=2)["blind"]["bbox2caption_exact"] == 0.5  # rows 0 and 2
    assert floors(train, test, limit=9)["blind"]["bbox2caption_exact"] == 0.25


def test_rows_that_no_model_is_asked_about_are_left_out(gran_rows, dataset):
    rows = [("0", [(SMALL, "a mouse", "natural")]), ("broken", [(LARGE, "a whale", "natural")])]
    test = GranDataset(gran_rows(rows), fault_budget=0.5)
    assert floors(dataset([(SMALL, "a mouse", "natural")]), test)["blind"]["bbox2caption_exact"] == 1


def test_splits_without_regions(dataset):
    full, none = dataset([(SMALL, "a mouse", "natural")]), dataset([])
    assert floors(none, full).keys() == {"centre_box", "whole_image"}  # nothing to fit the others on
    assert floors(none, full)["whole_image"] == floors(full, full)["whole_image"]
    with pytest.raises(ValueError, match="test has no region"):
        floors(full, none)


def test_chance_is_what_most_training_captions_name(gran_rows):
    train = [("a striped red ball", "scenes")] * 3 + [("a plain blue ring", "scenes")] * 2
    train += [("a blue moon", "sky")] * 9
    test = [("dotted red ring", "scenes-heldout"), ("striped red ball", "scenes-heldout"), ("a blue moon", "sky")]
    train, test = (
        GranDataset(gran_rows([(str(i), [(LARGE, text, "natural")], source) for i, (text, source) in enumerate(rows)]))
        for rows in (train, test)
    )
    chance = floors(train, test)["most_frequent_words"]
    assert chance["bbox2caption_colour"] == 1 and chance["scenes-heldout/bbox2caption_kind"] == 0.5
    assert not [name for name in chance if "rouge" in name or "sky" in name]
