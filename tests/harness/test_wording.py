"""Benchmarks' prompts in the model's words, and its answers in theirs."""

import pytest

from granvit.harness.wording import cut, read_prompt, region_question, write_answer

REC = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. Please provide the bounding box coordinate of the "
    "region this sentence describes: "
)
GROUNDING = "Locate every object that matches the description {} in the image. Report bbox coordinates in JSON format."
CAPTION = (
    "Describe the content contained within the normalized bounding box coordinates {} in no more than 10 words."
)


@pytest.fixture(scope="module")
def processor(tiny):
    return tiny(box_format="bins", box_style="tokens")[1]


@pytest.mark.parametrize(
    ("prompt", "sentence", "form"),
    [
        (REC + "the dog, left", "the dog, left", "relative"),
        (REC + "<ref>the dog</ref>", "the dog", "relative"),
        (GROUNDING.format('"a dog"'), "a dog", "per mille"),
        (GROUNDING.format('"a dog", "the one on the left"'), "a dog, the one on the left", "per mille"),
    ],
)
def test_what_asks_for_a_box_becomes_the_models_own_question(processor, prompt, sentence, form):
    wording = read_prompt(prompt, processor)
    assert wording.question == processor.ask_where(sentence) and wording.form == form


def test_a_box_in_a_prompt_is_named_as_the_model_was_taught(processor):
    wording = read_prompt(CAPTION.format("[0.125, 0.25, 0.5, 0.75]"), processor)
    assert wording.question == processor.ask_what((0.125, 0.25, 0.5, 0.75)) and wording.form == "text"
    with pytest.raises(ValueError, match=r"accepted is a box \[x1, y1, x2, y2\] relative"):
        read_prompt(CAPTION.format("[125, 250, 500, 750]"), processor)


def test_other_prompts_stay_as_they_are(processor):
    question = read_prompt("<image>\nWhat colour is the <region>?", processor).question
    assert (question.prompt, question.boxes) == ("What colour is the region?", ())
    for empty in ("<image>", REC + " ", GROUNDING.format('" "')):
        with pytest.raises(ValueError, match="empty"):
            read_prompt(empty, processor)


def test_boxes_are_written_as_benchmarks_read_them(processor):
    answer = "<loc_0><loc_4><loc_8><loc_15>"
    assert write_answer(answer, "relative", processor) == "[0.031250, 0.281250, 0.531250, 0.968750]"
    assert write_answer(answer, "per mille", processor) == '[{"bbox_2d": [31.25, 281.25, 531.25, 968.75]}]'
    assert write_answer(f"at {answer} or not", "text", processor) == (
        "at [0.031250, 0.281250, 0.531250, 0.968750] or not"
    )
    backwards = "<loc_8><loc_4><loc_0><loc_15>"
    assert write_answer(backwards, "relative", processor) == write_answer("no", "per mille", processor) == "[]"
    assert write_answer(backwards, "text", processor) == backwards


def test_boxes_as_text_keep_their_digits(tiny):
    processor = tiny(box_format="text")[1]
    assert write_answer("[0.005, 0.2, 1.0, .95]", "relative", processor) == "[0.005000, 0.200000, 1.000000, 0.950000]"
    assert write_answer("[0.005, 0.2, 1.0, .95]", "per mille", processor) == '[{"bbox_2d": [5, 200, 1000, 950]}]'


def test_a_region_in_pixels_becomes_a_question_about_its_box(processor):
    asked = region_question([50, 20, 25, 40], 200, 80, processor)
    assert asked.question == processor.ask_what((0.25, 0.25, 0.375, 0.75)) and asked.form == "text"
    cut_off = region_question([-3, 20, 300, 61], 200, 80, processor).question
    assert cut_off == processor.ask_what((0.0, 0.25, 1.0, 1.0))
    with pytest.raises(ValueError, match="no area"):
        region_question([250, 20, 25, 40], 200, 80, processor)
    with pytest.raises(ValueError, match="four numbers"):
        region_question([1, 2, 3], 200, 80, processor)


def test_answers_end_where_the_benchmark_says():
    assert cut("a dog\n\nUSER: and", ["USER:", "\n\n", ""]) == "a dog"
    assert cut(" a dog ", "ASSISTANT:") == "a dog" == cut("a dog", ())
