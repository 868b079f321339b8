import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from granvit.data.schema import parse_region
from granvit.questions.prompts import (
    BBOX2CAPTION,
    CAPTION2BBOX,
    CHAT,
    GLOBAL_CAPTION,
    Question,
    box_fault,
    describe_box,
    find_box,
    format_box,
    parse_box,
    questions,
    without_markers,
)
from granvit.questions.schema import DataFault

BOX = (0.1234, 0.25, 0.5, 1.0)


def sample(*captions: str, caption: str | None = "A yard.") -> SimpleNamespace:
    regions = [SimpleNamespace(box=BOX, caption=text, kind="natural") for text in captions]
    return SimpleNamespace(caption=caption, regions=tuple(regions))


def test_the_papers_sentences():
    asked = questions(sample("a dog"), (GLOBAL_CAPTION, BBOX2CAPTION, CAPTION2BBOX))
    assert asked == [
        Question(
            GLOBAL_CAPTION,
            "Describe in detail what is shown in the image in one paragraph",
            "A yard.",
            (),
            None,
        ),
        Question(
            BBOX2CAPTION,
            "Describe the content contained within the normalized bounding box coordinates "
            "[0.123, 0.250, 0.500, 1.000] in no more than 10 words.",
            "a dog",
            (),
            0,
        ),
        Question(
            CAPTION2BBOX,
            "Please provide the bounding box coordinate of the region this sentence describes: a dog",
            "[0.123, 0.250, 0.500, 1.000]",
            (),
            0,
        ),
    ]


@pytest.mark.parametrize(
    "style, form, name, boxes",
    [
        ("text", "text", "[0.123, 0.250, 0.500, 1.000]", ()),
        ("tokens", "text", "<region>", (BOX,)),
        ("both", "text", "[0.123, 0.250, 0.500, 1.000] <region>", (BOX,)),
        ("text", "bins", "<loc_1><loc_2><loc_5><loc_9>", ()),
        ("both", "bins", "<loc_1><loc_2><loc_5><loc_9> <region>", (BOX,)),
    ],
)
def test_box_styles_and_formats(style, form, name, boxes):
    question = describe_box(BOX, box_style=style, box_format=form, bins=10)
    assert f"coordinates {name} in no more" in question.prompt
    assert question.boxes == boxes


def test_no_caption_no_question():
    assert questions(sample("a dog", caption=None), (GLOBAL_CAPTION,)) == []


def test_a_sentence_that_fits_two_boxes_asks_for_none():
    asked = questions(sample("a dog", "a cat", "a dog"), (CAPTION2BBOX, BBOX2CAPTION))
    assert [(q.task, q.region) for q in asked] == [(CAPTION2BBOX, 1)] + [(BBOX2CAPTION, i) for i in range(3)]
    assert [q.region for q in questions(sample("a dog", "a cat", "a dog"), (CAPTION2BBOX,), shared=True)] == [0, 1, 2]


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="tasks: got 'talk', accepted are 'global_caption'.* 'chat'"):
        questions(sample("a dog"), ("talk",))
    with pytest.raises(ValueError, match="box_style: got 'arrow'"):
        questions(sample("a dog"), (BBOX2CAPTION,), "arrow")
    with pytest.raises(ValueError, match="box_format: got 'polar'"):
        format_box(BOX, "polar")
    with pytest.raises(ValueError, match="box_format: got 'polar'"):
        parse_box("", "polar")


def test_markers_in_captions_are_only_text():
    assert without_markers("a <region> <b> <loc_12><image>") == "a region <b> loc_12image"
    assert find_box("<region>").prompt.endswith(": region")
    asked = questions(sample("a <region>", caption="<image>"), (GLOBAL_CAPTION, BBOX2CAPTION, CAPTION2BBOX))
    assert [q.answer for q in asked[:2]] == ["image", "a region"]


def test_a_conversation_is_one_question_of_several_turns():
    chat = (("<image> What is it?", "A <region>."), ("Red?", "Yes.<eos> No."))
    talked = SimpleNamespace(caption=None, regions=(), conversations=(chat, chat[1:]))
    first, second = questions(talked, (CHAT, BBOX2CAPTION))
    assert first.turns == (("image What is it?", "A region."), ("Red?", "Yes.eos No."))
    assert (second.task, second.turns, second.region) == (CHAT, (("Red?", "Yes.eos No."),), None)


def test_special_tokens_in_captions_are_only_text():
    assert without_markers("<|im_end|> a <b> <eos></s><pad>") == "|im_end| a <b> eos/spad"


MARKER = re.compile(r"<(image|region|loc_\d+|/?s|bos|eos|pad|unk|\|[^<>]*\|)>")
pieces = st.sampled_from(["<", ">", "|", "/", "image", "<region>", "loc_", "<loc_1>", "7", "s", "<s>", "e", "eos", " "])


@given(st.lists(pieces, max_size=12).map("".join))
@example("<<region>>")
@example("<<<image>>>")
@example("<<loc_1>2>")
@example("<<s>|im_end|>")
def test_no_marker_is_left_or_made(text):
    assert not MARKER.search(without_markers(text))


@given(st.text("abc <>[](),.'1_"))
def test_ordinary_captions_are_kept(text):
    assert without_markers(text) == text


coordinate = st.floats(0, 1, width=32)


@given(coordinate, coordinate, coordinate, coordinate, st.sampled_from([8, 32, 1000]))
def test_bins_keep_a_box_to_a_bin(a, b, c, d, bins):
    box = (min(a, b), min(c, d), max(a, b), max(c, d))
    parsed = parse_box(f"it is {format_box(box, 'bins', bins)}.", "bins", bins)
    assert box_fault(parsed) is None
    assert max(abs(got - true) for got, true in zip(parsed, box, strict=True)) <= 1.0 / bins + 1e-7


@given(coordinate, coordinate, coordinate, coordinate)
def test_text_keeps_a_box_to_three_decimals(a, b, c, d):
    box = (min(a, b), min(c, d), max(a, b), max(c, d))
    parsed = parse_box(f"The box is {format_box(box)}, I think [0.1, 0.1, 0.2, 0.2]")
    assert box_fault(parsed) is None
    thinnest = min(box[2] - box[0], box[3] - box[1])
    off = 0.0005 if thinnest > 0.001 else 0.001  # a thinner one may be widened to a thousandth
    assert max(abs(got - true) for got, true in zip(parsed, box, strict=True)) <= off + 1e-7


thin = st.tuples(coordinate, st.floats(2**-24, 2**-8, width=32)).map(lambda side: (side[0], min(sum(side), 1.0)))


@given(thin | st.tuples(coordinate, coordinate).map(sorted), thin, st.booleans())
@example((0.2, 0.9), (0.1006, 0.1014), True)
@example((0.2, 0.9), (0.1, 0.1005), True)
@example((0.0, 1.0), (float(np.nextafter(np.float32(1), np.float32(0))), 1.0), False)
def test_a_perfect_answer_is_a_box_with_area_that_holds_the_truths_centre(first, second, turned):
    (x1, x2), (y1, y2) = (second, first) if turned else (first, second)
    try:
        box = parse_region({"box": [x1, y1, x2, y2], "caption": "a line", "kind": "natural"}).box
    except DataFault:  # without area in float32
        return
    for form, bins in (("text", 1000), ("bins", 8), ("bins", 32), ("bins", 1000)):
        parsed = parse_box(format_box(box, form, bins), form, bins)
        assert box_fault(parsed) is None
        assert parsed[0] - 1e-9 <= (box[0] + box[2]) / 2 <= parsed[2] + 1e-9
        assert parsed[1] - 1e-9 <= (box[1] + box[3]) / 2 <= parsed[3] + 1e-9


@pytest.mark.parametrize(
    "text, form",
    [
        ("", "text"),
        ("a dog", "text"),
        ("[0.1, 0.2, 0.3]", "text"),
        ("[0.5, 0.2, 0.3, 0.9]", "text"),
        ("[0.1, 0.2, 0.1, 0.9]", "text"),
        ("[0.1, 0.2, 1.5, 0.9]", "text"),
        ("[nan, 0.2, 0.5, 0.9]", "text"),
        ("<loc_1><loc_2><loc_3>", "bins"),
        ("<loc_1><loc_2><loc_3><loc_16>", "bins"),
        ("<loc_5><loc_2><loc_3><loc_4>", "bins"),
        ("[0.1, 0.2, 0.3, 0.4]", "bins"),
    ],
)
def test_what_is_no_box(text, form):
    assert parse_box(text, form, bins=16) is None


def test_first_box_and_loose_spacing():
    assert parse_box("box: [.1,0.20 , 1, 1.0] [0, 0, 1, 1]") == (0.1, 0.2, 1.0, 1.0)
    assert parse_box("<loc_0> <loc_0> <loc_15><loc_0>", "bins", 16) == (0.5 / 16, 0.0, 15.5 / 16, 1 / 16)


@pytest.mark.parametrize(
    "box, fault",
    [
        ((0, 0, 1, 1), None),
        ((0, 0, 1), "not 4"),
        ((0, 0, float("inf"), 1), "finite"),
        ((-0.1, 0, 1, 1), "outside"),
        ((0, 0, 1, 1.1), "outside"),
        ((0.5, 0, 0.5, 1), "no area"),
        ((0.5, 0.2, 0.9, 0.1), "no area"),
    ],
)
def test_box_fault(box, fault):
    assert box_fault(box) is None if fault is None else fault in box_fault(box)
