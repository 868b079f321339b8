"""Metrics against values worked out by hand."""

import math
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer

from granvit.data.measures import words
from granvit.eval.baselines import rouge_l_matrix
from granvit.eval.metrics import box_iou, cer, cider, counts, exact, exact_text, iou, is_attribute, rouge_l, summarise


def caption(truth, answer, kind="natural", source="scenes"):
    return {
        "id": "1",
        "source": source,
        "task": "bbox2caption",
        "kind": kind,
        "box": [0.0, 0.0, 1.0, 1.0],
        "caption": truth,
        "answer": answer,
        "predicted_box": None,
    }


def box_answer(box, predicted, kind="natural", source="scenes"):
    return caption("a cat", "", kind, source) | {
        "task": "caption2bbox",
        "box": box,
        "predicted_box": predicted,
    }


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    # common subsequence "a red circle": 3 words of 4 and of 5 -> 2*3/(4+5)
    assert rouge_l("a red big circle", "a dark red round circle") == pytest.approx(6 / 9)
    assert rouge_l("a red circle", "") == 0


@given(st.text(st.characters(max_codepoint=127)))
@example("snake_case x-1 \x1c Don't  A.B")
def test_words_of_ascii_are_those_of_rouge_score(text):
    assert words(text) == DefaultTokenizer().tokenize(text)


def test_words_of_other_scripts():
    assert words("Naïve café") == ["naïve", "café"]
    assert words("Красный круг, ένας 한국 사람") == ["красный", "круг", "ένας", "한국", "사람"]
    assert words("हिन्दी, कि का! cafe\u0301 \u2764\ufe0f") == ["हिन्दी", "कि", "का", "café"]
    assert words("红色2圆。カ・ナ x_y") == ["红", "色", "2", "圆", "カ", "ナ", "x", "y"]
    assert rouge_l("красный большой круг", "красный круг") == pytest.approx(4 / 5)
    assert rouge_l("红色的圆", "红圆") == pytest.approx(4 / 6)
    assert rouge_l("café", "caf") == 0
    assert exact("Красный круг.", "красный круг")


def test_scripts_without_spaces_are_words_by_character_with_its_marks():
    assert words("น้ำเย็น") == ["น้ำ", "เ", "ย็", "น"]
    assert words("ຄົນ") == ["ຄົ", "ນ"] and words("ខ្មែរ") == ["ខ្", "មែ", "រ"] and words("မြန်မာ") == ["မြ", "န်", "မာ"]
    assert words("ｶﾀｶﾅ") == list("ｶﾀｶﾅ") and words("ꦧꦱ") == list("ꦧꦱ")
    assert words("می\u200cخواهم") == ["می\u200cخواهم"]  # a joiner parts no words
    assert 0 < rouge_l("สุนัขสีแดง", "สุนัขสีดำ") < 1


@pytest.mark.parametrize("text", ["한국 사람", "Ångström naïve", "→", "!", "🙂👍", "สุนัข", "a café"])
def test_equal_text_in_another_unicode_form_is_equal(text):
    truth, answer = unicodedata.normalize("NFD", text), unicodedata.normalize("NFC", text)
    assert rouge_l(truth, answer) == rouge_l(answer, truth) == 1
    assert exact(truth, answer) and exact_text(truth, answer) and cer([truth], [answer]) == 0
    assert rouge_l_matrix([truth], [answer]).item() == 1


@pytest.mark.parametrize(
    ("text", "seen"),
    [("co\u00adop", "coop"), ("\ufeff\u200fabc", "abc"), ("\u2764\ufe0f", "\u2764"), ("น้ำ\u200bเย็น", "น้ำเย็น")],
)
def test_what_can_not_be_seen_counts_for_nothing(text, seen):
    assert rouge_l(text, seen) == 1 and exact(text, seen) and exact_text(text, seen) and cer([text], [seen]) == 0


def test_signs_alone_are_compared_by_sign():
    assert rouge_l("→", "←") == 0 and not exact("→", "←") and rouge_l("→", "a") == rouge_l("a", "→") == 0
    assert exact("? !", "?!") and not exact("", "!")


def test_exact_ignores_case_and_punctuation_but_text_to_be_read_is_compared_to_the_letter():
    assert exact("A red circle.", "a red  circle")
    assert not exact("a red circle", "a circle red")
    assert not exact("***", "---") and exact("***", "***")
    assert exact_text("Total  12.50", "Total 12.50")
    assert not exact_text("Total", "TOTAL")


def test_cider_of_equal_long_captions_is_ten_and_of_foreign_words_zero():
    truths = ["a red striped circle on grass", "the blue dotted square near water", "five words in this text"]
    assert cider(truths, truths) == pytest.approx([10, 10, 10])
    assert cider(truths, ["x y z w", "x", ""]) == pytest.approx([0, 0, 0])


def test_cider_by_hand_on_single_words():
    # Only 1-grams exist and each word stands in one of two truths: idf log(2/1), cosine 1: 10 * 1/4.
    # "cat dog" against "cat": 1-gram cosine 1/sqrt(2) (clipped, CIDEr-D), penalty exp(-1/(2*36)).
    assert cider(["cat", "dog"], ["cat", "cat dog"]) == pytest.approx(
        [2.5, 2.5 / math.sqrt(2) * math.exp(-1 / 72)], rel=1e-6
    )


def test_cer_is_edits_over_characters_of_the_whole_corpus():
    assert cer(["abcd", "ef"], ["abxd", ""]) == pytest.approx(3 / 6)
    assert cer(["ab"], ["abcdef"]) == pytest.approx(2.0)


def test_box_iou_by_hand():
    assert float(box_iou([0, 0, 2, 2], [1, 1, 3, 3])) == pytest.approx(1 / 7)
    assert float(box_iou([0, 0, 1, 1], [0, 0, 1, 1])) == 1
    assert float(box_iou([0, 0, 1, 1], [1, 1, 0, 0])) == 0  # inverted
    assert float(box_iou([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5])) == 0  # no area
    assert box_iou(np.zeros((3, 1, 4)), np.zeros((2, 4))).shape == (3, 2)


def test_a_box_that_could_not_be_parsed_counts_as_wrong_and_is_counted():
    truth = [0.0, 0.0, 0.5, 0.5]
    metrics = summarise([box_answer(truth, None), box_answer(truth, truth), box_answer(truth, [0.0, 0.0, 0.5, 0.2])])
    assert iou(box_answer(truth, None)) == 0
    assert metrics["caption2bbox_unparsed"] == pytest.approx(1 / 3)
    assert metrics["caption2bbox_acc50"] == pytest.approx(1 / 3)
    assert metrics["caption2bbox_miou"] == pytest.approx((0 + 1 + 0.4) / 3)
    assert metrics["caption2bbox_f1"] == pytest.approx(2 * 1 / (2 + 3))


def test_thresholds_of_iou():
    truth = [0.0, 0.0, 1.0, 1.0]
    metrics = summarise([box_answer(truth, [0.0, 0.0, 1.0, side]) for side in (0.92, 0.8, 0.52, 0.1)])
    rates = {name: metrics[f"caption2bbox_{name}"] for name in ("acc50", "acc75", "acc90", "f1")}
    assert rates == pytest.approx({"acc50": 3 / 4, "acc75": 2 / 4, "acc90": 1 / 4, "f1": (9 + 7 + 1) / 40})


def test_an_overlap_of_one_half_is_a_hit():
    assert summarise([box_answer([0, 0, 1, 1], [0, 0, 1, 0.5])])["caption2bbox_acc50"] == 1
    assert summarise([box_answer([0, 0, 1, 1], [0, 0, 1, 0.499])])["caption2bbox_acc50"] == 0


def test_summarise_keeps_kinds_and_sources_apart():
    predictions = [
        caption("a red circle", "a red circle"),
        caption("a blue square", "x", source="scenes-heldout"),
        caption("Total 12", "Total 21", kind="ocr", source="pages"),
        box_answer([0, 0, 1, 1], [0, 0, 1, 1], kind="ocr", source="pages"),
    ]
    metrics = summarise(predictions)
    assert metrics["bbox2caption_exact"] == pytest.approx(1 / 3)
    assert metrics["natural_bbox2caption_exact"] == pytest.approx(1 / 2)
    assert metrics["ocr_bbox2caption_rouge_l"] == pytest.approx(1 / 2)
    assert metrics["scenes/bbox2caption_rouge_l"] == 1
    assert metrics["scenes-heldout/bbox2caption_rouge_l"] == 0
    assert metrics["ocr_cer"] == metrics["pages/ocr_cer"] == pytest.approx(2 / 8)
    assert metrics["ocr_exact"] == 0
    assert metrics["ocr_caption2bbox_acc50"] == metrics["pages/caption2bbox_miou"] == 1
    assert "natural_caption2bbox_acc50" not in metrics and "scenes/ocr_cer" not in metrics
    assert all(isinstance(value, float) for value in metrics.values())
    assert counts(predictions)["bbox2caption"] == 3 and counts(predictions)["pages/caption2bbox"] == 1


def test_summarise_of_nothing_is_empty():
    assert summarise([]) == {}


def test_attributes_are_shares_of_captions_that_name_one():
    predictions = [
        caption("large striped red ball", "striped red star"),
        caption("a red ball with stripes", "red striped ball on the left", source="scenes-heldout"),
        caption("red and blue ball", "red ball"),  # two colours: not asked
        caption("dotted blue ring", "dotted blue ring red"),
        caption("a red ball", "a red ball", source="mine"),  # no vocabulary
    ]
    metrics = summarise(predictions)
    assert metrics["bbox2caption_colour"] == pytest.approx(2 / 3)
    assert metrics["scenes/bbox2caption_kind"] == pytest.approx(2 / 3)
    assert metrics["bbox2caption_pattern"] == metrics["scenes-heldout/bbox2caption_kind"] == 1
    assert metrics["bbox2caption_size"] == 0
    assert not [name for name in metrics if name.startswith("mine/") and is_attribute(name)]
    own = {"mine": {"sound": {"moo": "cow", "moos": "cow", "miaow": "cat"}}}
    metrics = summarise([caption("it moos", "moo", source="mine")], own)
    assert metrics["mine/bbox2caption_sound"] == 1 and "bbox2caption_kind" not in metrics


def test_boxes_by_the_size_of_the_true_one():
    tiny, large = [0.0, 0.0, 0.1, 0.1], [0.0, 0.0, 0.35, 0.36]
    metrics = summarise([box_answer(tiny, large), box_answer(large, large)])
    assert metrics["caption2bbox_acc50_tiny"] == 0 and metrics["natural_caption2bbox_miou_large"] == 1
    assert "caption2bbox_acc50_medium" not in metrics
