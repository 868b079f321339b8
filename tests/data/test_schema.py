"""Rows are checked: every fault has its kind and says what is wrong."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from granvit.data.schema import conversation_turns, parse_conversation, parse_region, parse_row
from granvit.questions.schema import DataFault

REGION = {"box": [0.1, 0.2, 0.5, 0.6], "caption": "red ball", "kind": "natural", "score": None}


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def row(**changes) -> dict:
    pixels = np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3)
    base = {
        "id": "a",
        "image": {"bytes": encoded(Image.fromarray(pixels)), "path": None},
        "width": 16,
        "height": 12,
        "caption": "a scene",
        "regions": [REGION],
        "source": "scenes",
        "licence": "CC0-1.0",
    }
    return base | changes


def test_a_good_row():
    sample = parse_row(row())
    assert sample.image.shape == (12, 16, 3)
    assert np.array_equal(sample.image.numpy().ravel(), np.arange(12 * 16 * 3).astype(np.uint8))
    assert sample.regions[0].box == (0.1, 0.2, 0.5, 0.6)
    assert (sample.id, sample.caption, sample.source, sample.licence) == ("a", "a scene", "scenes", "CC0-1.0")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"box": [0.1, float("nan"), 0.5, 0.6]}, "box", "finite"),
        ({"box": [0.1, 0.2, float("inf"), 0.6]}, "box", "finite"),
        ({"box": [0.1, 0.2, 0.5]}, "box", "4 finite"),
        ({"box": None}, "box", "4 finite"),
        ({"box": [0.1, 0.2, 0.5, True]}, "box", "finite"),
        ({"box": [0.5, 0.2, 0.1, 0.6]}, "box", "x1 < x2"),
        ({"box": [0.1, 0.2, 0.1, 0.6]}, "box", "x1 < x2"),
        ({"box": [0.1, 0.2, 1.2, 0.6]}, "box", "in \\[0, 1\\]"),
        ({"box": [10, 20, 50, 60]}, "box", "in \\[0, 1\\]"),
        ({"box": [1.0, 0.2, 1.0005, 0.6]}, "box", "x1 < x2"),
        ({"caption": ""}, "region_caption", "text"),
        ({"caption": " \n"}, "region_caption", "text"),
        ({"caption": None}, "region_caption", "text"),
        ({"kind": "text"}, "region_kind", "natural, ocr"),
        ({"score": float("nan")}, "region_score", "finite"),
        ({"box": [0.1, 0.2, 10**400, 0.6]}, "box", "finite"),
        ({"box": [0.5, 0.5, 0.5 + 1e-9, 0.6]}, "box", "in float32 too"),
        ({"box": [0.5, 0.5, 0.6, 0.5 + 1e-9]}, "box", "in float32 too"),
        ({"score": 10**400}, "region_score", "finite"),
        ({"score": 1e39}, "region_score", "finite"),  # inf in float32
        ({"caption": "half a \ud800 pair"}, "region_caption", "Unicode"),
    ],
)
def test_region_faults(changes, kind, message):
    with pytest.raises(DataFault, match=message) as caught:
        parse_region(REGION | changes)
    assert caught.value.kind == kind


def test_a_box_just_past_the_edge_is_cut():
    assert parse_region(REGION | {"box": [-0.0005, 0, 1.0005, 1]}).box == (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"id": ""}, "id"),
        ({"id": None}, "id"),
        ({"id": "\ud800"}, "id"),
        ({"caption": ""}, "caption"),
        ({"caption": "\udc80"}, "caption"),
        ({"width": 12, "height": 16}, "size"),
        ({"width": None}, "size"),
        ({"caption": None, "regions": []}, "empty_row"),
        ({"image": None}, "image"),
        ({"image": {"bytes": "text", "path": 3}}, "image"),
        ({"source": 5}, "source"),
        ({"licence": ["CC0"]}, "licence"),
        ({"image": {"bytes": b"no image", "path": None}}, "image"),
        ({"image": {"bytes": None, "path": "/nowhere.png"}}, "image"),
        ({"image": {"bytes": encoded(Image.new("RGB", (1, 1))), "path": None}}, "image_shape"),
        ({"image": {"bytes": encoded(Image.new("L", (20000, 10))), "path": None}}, "image_shape"),
    ],
)
def test_row_faults(changes, kind):
    with pytest.raises(DataFault) as caught:
        parse_row(row(**changes))
    assert caught.value.kind == kind


def test_a_bad_region_is_raised_or_dropped():
    regions = [REGION, REGION | {"caption": ""}, REGION | {"box": [0, 0, 0, 0]}]
    with pytest.raises(DataFault, match=r"regions\[1\]: caption"):
        parse_row(row(regions=regions))
    faults = []
    assert len(parse_row(row(regions=regions), drop=faults.append).regions) == 1
    assert [fault.kind for fault in faults] == ["region_caption", "box"]


def turn(role: str, content) -> dict:
    return {"role": role, "content": content}


CHAT = [turn("user", "What is it?"), turn("assistant", "A ball."), turn("user", "Red?"), turn("assistant", "Yes.")]


def test_conversations_are_optional_and_enough():
    assert parse_row(row()).conversations == () == parse_row(row(conversations=None)).conversations
    sample = parse_row(row(caption=None, regions=[], conversations=[CHAT, CHAT[:2]]))
    assert sample.conversations == ((("What is it?", "A ball."), ("Red?", "Yes.")), (("What is it?", "A ball."),))
    assert [conversation_turns(one) for one in sample.conversations] == [CHAT, CHAT[:2]]


@pytest.mark.parametrize(
    ("turns", "kind", "message"),
    [
        ("text", "conversations", "list of turns"),
        ([CHAT[0], 3], "conversations", "list of turns"),
        ([], "conversation_roles", r"got \[\]"),
        (CHAT[:1], "conversation_roles", "to an assistant's, got \\['user'\\]"),
        (CHAT[:3], "conversation_roles", "'user', 'assistant', 'user'"),
        (CHAT[1:3], "conversation_roles", "'assistant', 'user'"),
        ([CHAT[0], CHAT[0]], "conversation_roles", "'user', 'user'"),
        ([turn("system", "Be brief."), *CHAT], "conversation_roles", "'system', 'user'"),
        ([turn(["user"], "What?"), CHAT[1]], "conversation_roles", "user"),
        ([CHAT[0], turn("assistant", " \n")], "conversation_text", "turn 1: content must be a string with text"),
        ([CHAT[0], turn("assistant", None)], "conversation_text", "turn 1"),
        ([turn("user", "\ud800"), CHAT[1]], "conversation_text", "turn 0.*Unicode"),
    ],
)
def test_conversation_faults(turns, kind, message):
    with pytest.raises(DataFault, match=message) as caught:
        parse_conversation(turns)
    assert caught.value.kind == kind
    faults = []
    assert len(parse_row(row(conversations=[CHAT, turns]), drop=faults.append).conversations) == 1
    assert [str(fault).partition(":")[0] for fault in faults] == ["conversations[1]"]


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(Image, "open", lambda *args, **options: pytest.fail("opened, which waits for ever"))
    with pytest.raises(DataFault, match="regular file, got '.*fifo'") as caught:
        parse_row(row(image={"bytes": None, "path": str(tmp_path / "fifo")}))
    assert caught.value.kind == "image"


def test_a_file_is_read_by_its_path(tmp_path):
    (tmp_path / "a.png").write_bytes(row()["image"]["bytes"])
    assert parse_row(row(image={"bytes": None, "path": str(tmp_path / "a.png")})).image.shape == (12, 16, 3)


def test_the_size_is_that_after_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = {"bytes": encoded(Image.new("RGB", (16, 12)), "JPEG", exif=exif), "path": None}
    assert parse_row(row(image=turned, width=12, height=16)).image.shape == (16, 12, 3)
    with pytest.raises(DataFault, match="width and height are 16x12, the image is 12x16 as EXIF turns it"):
        parse_row(row(image=turned))


@pytest.mark.parametrize(
    ("width", "height", "kind"),
    [(10**18, 3, "image_pixels"), (2**63 - 1, 2**63 - 1, "image_pixels"), (20_000, 10, "image_shape")],
)
def test_impossible_sizes_are_seen_without_the_picture(width, height, kind):
    with pytest.raises(DataFault) as caught:
        parse_row(row(width=width, height=height), decode=False)
    assert caught.value.kind == kind
