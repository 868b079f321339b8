"""One big JSON file, an element at a time: whatever the window cuts, and whatever is wrong with the file."""

import json
import random

import pytest

from granvit.data.sources import stream
from granvit.data.sources.stream import elements

DATA = {
    "info": {"a": [1, {"b": "}]"}], "text": 'quote " backslash \\ bracket ['},
    "images": [{"id": 12345678, "name": "naïve 🐈"}, 1234567, "a string, longer than the window", None, True, -1.5e-3],
    "empty": [],
    "nothing": None,
    "annotations": [[[1, 2], [3]], {}, {"deep": {"er": [{}]}}],
}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_what_the_window_cuts_is_whole(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(stream, "CHUNK", chunk)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(DATA, indent=indent, ensure_ascii=bool(random.Random(chunk).getrandbits(1))))
    assert list(elements(str(file))) == [
        (key, element) for key, value in DATA.items() if isinstance(value, list) for element in value
    ]
    file.write_text(json.dumps(DATA["images"], indent=indent) + "\n")
    assert [element for _, element in elements(str(file))] == DATA["images"]


def test_a_byte_order_mark_is_read_over(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf [1, 2]")
    assert list(elements(str(file))) == [("", 1), ("", 2)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected one of { \\[, got 'its end'"),
        (b"3", "expected one of { \\[, got '3'"),
        (b'{"images": [1, 2', "expected one of , \\], got 'its end'"),
        (b'{"images": [1 2]}', "expected one of , \\], got '2'"),
        (b'{"images": [1,]}', "Expecting value"),
        (b'{"images": [{"a": "b]}', "Unterminated string"),
        (b'{"images" [1]}', "expected one of :"),
        (b"{1: [1]}", "a key must be a string"),
        (b"[1] [2]", "something follows its end"),
        (b'["\xff"]', "can't decode byte 0xff"),
        (b'["\xc3', "unexpected end of data"),
        (b"[" * 1_000_000, "recursion|nested"),
        (b'{"a":' * 1_000_000, "recursion|nested"),
        (b"[" + b"9" * 5000 + b"]", "digits"),
        (b'["' + b"a" * 3000 + b'"]', "more than 1000 characters"),
    ],
)
def test_what_is_no_json_is_said_with_the_file(tmp_path, monkeypatch, content, message):
    if b"aaa" in content:
        monkeypatch.setattr(stream, "MAX_VALUE", 1000)
        monkeypatch.setattr(stream, "CHUNK", 100)
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is not readable as JSON: .*({message})"):
        list(elements(str(file)))
