"""LLaVA's conversations in, Gran dataset out: one row a picture, every fault named, memory bounded."""

import json
import logging
import tracemalloc

import pytest
from converting import convert, picture, write_json

from granvit.data.__main__ import main
from granvit.data.batches import PackLoader
from granvit.data.filters import Filter
from granvit.data.loader import GranDataset
from granvit.data.records import Notes
from granvit.data.schema import CHAT_FEATURES, FEATURES
from granvit.data.sources.llava import Llava

COCO = "coco/train2017/000000033471.jpg"


def item(image=COCO, *turns: str, **changes) -> dict:
    """An item whose turns are human's and gpt's by turns."""
    turns = turns or ("<image>\nWhat is it?", "A bus.")
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": "000000033471", "image": image, "conversations": said} | changes


def said(row) -> list[list[str]]:
    assert all([t["role"] for t in one] == ["user", "assistant"] * (len(one) // 2) for one in row["conversations"])
    return [[turn["content"] for turn in one] for one in row["conversations"]]


@pytest.fixture
def folder(tmp_path):
    for name in (COCO, "gqa/images/17.jpg", "a.jpg"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture())
    (tmp_path / "secret.jpg").write_bytes(picture())
    return tmp_path


def llava(folder, *items) -> Llava:
    return Llava(write_json(folder / "chat.json", list(items)), str(folder / "images"), licence="CC-BY-4.0")


def parts(text: str) -> list[dict]:
    """A turn's text as chat templates take it."""
    told = [{"type": "text", "text": text.removeprefix("<image>")}]
    return [{"type": "image"}, *told] if text.startswith("<image>") else told


def test_words_of_other_tools(folder):
    usual = item("a.jpg", "<image>\nWho?", "A man.")
    turns = [{"role": role, "content": text} for role, text in (("user", "<image>\nWho?"), ("assistant", "A man."))]
    named = [{"from": "USER" if turn["role"] == "user" else "assistant", "value": turn["content"]} for turn in turns]
    for number, other in enumerate(
        (
            item("./a.jpg", conversations=turns),
            item(None, conversations=named, images=["a.jpg"]),
            {"messages": turns, "images": "a.jpg"},
            {"messages": [turn | {"content": parts(turn["content"])} for turn in turns], "images": [{"path": "a.jpg"}]},
        )
    ):
        summary, rows = convert(llava(folder, usual, other), folder / f"out{number}")
        assert list(rows) == ["llava/a.jpg"] and said(rows["llava/a.jpg"]) == [["Who?", "A man."]] * 2
        assert not summary.faulty and not summary.dropped


def test_a_row_a_picture_with_all_of_its_conversations(folder):
    summary, rows = convert(
        llava(
            folder,
            item("a.jpg", "Who?\n<image>", "A man."),
            item(COCO, "<image>\nWhat is it?", "A bus.", "Which colour?", "Red, I <think>."),
            item("a.jpg", "Where?", "In a\ntown.  "),
            item([COCO]),
        ),
        folder / "out",
    )
    assert list(rows) == ["llava/a.jpg", f"llava/{COCO}"]
    assert said(rows["llava/a.jpg"]) == [["Who?", "A man."], ["Where?", "In a\ntown.  "]]
    assert said(rows[f"llava/{COCO}"]) == [
        ["What is it?", "A bus.", "Which colour?", "Red, I <think>."],
        ["What is it?", "A bus."],
    ]
    row = rows["llava/a.jpg"]
    assert (row["regions"], row["caption"], row["source"], row["licence"]) == ([], None, "llava", "CC-BY-4.0")
    assert row["image"] == {"bytes": picture(), "path": "a.jpg"}
    assert (summary.read, summary.kept, summary.conversations, summary.faulty) == (2, 2, 4, 0)
    assert ("conversations written", 4) in summary.lines()


def test_text_alone_is_kept_a_row_a_conversation(folder, tmp_path):
    text = item("a.jpg", "Who are you?", "A model.")
    del text["image"]
    source = llava(folder, text, item(), item(None, "Hi", "Hello."), item("", "1 + 1?", "2.", "Sure?", "Yes."))
    summary, rows = convert(source, folder / "out")
    assert list(rows) == ["llava/text/0", f"llava/{COCO}", "llava/text/2", "llava/text/3"]
    assert (summary.kept, summary.conversations, summary.faulty) == (4, 4, 0) and not summary.dropped
    row = rows["llava/text/3"]
    assert said(row) == [["1 + 1?", "2.", "Sure?", "Yes."]]
    assert [row[name] for name in ("image", "width", "height", "caption", "regions")] == [None] * 4 + [[]]
    data = GranDataset(folder / "out")
    for i, shape in enumerate([(0, 0, 3), (32, 48, 3), (0, 0, 3), (0, 0, 3)]):
        assert (data[i].image.numel() > 0) == (data.annotations(i).image.numel() > 0) == (shape[0] > 0)
        assert len(data[i].conversations) == 1
    assert convert(Filter(str(folder / "out"), short_side=0, min_regions=0), tmp_path / "kept")[1] == rows


SAID = {"from": "human", "value": "What?"}
BUS = {"from": "gpt", "value": "A bus."}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (3, "image must be a path"),
        (item(7), "image must be a path"),
        (item("\ud800.jpg"), "image must be a path"),
        (item(["a.jpg", COCO]), "has 2 images"),
        (item(None), "says <image>, but names none"),
        (item("a.jpg", "<image><image> Which is larger?", "This."), "says <image> 2 times"),
        (item("a.jpg", "<image> Which?", "This.", "And <image>?", "No."), "says <image> 2 times"),
        (item(conversations=None), "conversations must be a list of objects"),
        (item(conversations=[SAID, "A bus."]), "conversations must be a list of objects"),
        (item(conversations=[]), "roles must be user, assistant"),
        (item(conversations=[SAID]), "roles must be user, assistant"),
        (item(conversations=[BUS, SAID]), "['assistant', 'user']"),
        (item(conversations=[SAID, BUS, BUS, SAID]), "['user', 'assistant', 'assistant', 'user']"),
        (item(conversations=[{"from": "system", "value": "Be brief."}, SAID, BUS]), "['system', 'user', 'assistant']"),
        (item(conversations=[{"value": "What?"}, BUS]), "['None', 'assistant']"),
        (item(conversations=[{"from": ["human"], "value": "What?"}, BUS]), "human"),
        (item(conversations=[SAID, {"from": "gpt"}]), "value must be a string, got None"),
        (item(conversations=[SAID, {"from": "gpt", "value": " \n"}]), "turn 1: content must be a string with text"),
        (item("a.jpg", "<image>\n", "A bus."), "turn 0: content must be a string with text"),
        (item("a.jpg", "What?", "\ud800"), "turn 1"),
        (item("../secret.jpg"), "image must lie in"),
        (item("/etc/passwd"), "image must lie in"),
        (item("images/a\0.jpg"), "can't be read"),
        (item("none.jpg"), "is no file"),
        (item(conversations=[{"from": "human", "value": [{"type": "video"}]}, BUS]), "value must be a string, got [{"),
    ],
)
def test_every_fault_is_named_and_costs_its_item_alone(folder, bad, message, caplog):
    with caplog.at_level(logging.WARNING):
        summary, rows = convert(llava(folder, item(), bad, item("gqa/images/17.jpg")), folder / "out")
    (told,) = [record.message for record in caplog.records]
    assert f"{folder / 'chat.json'}[1]" in told and message in told
    assert list(rows) == [f"llava/{COCO}", "llava/gqa/images/17.jpg"]
    assert (summary.read, summary.kept, summary.faulty) == (3, 2, 1)


def test_items_nested_too_deeply_are_no_crash(folder):
    deep = '[{"image": "a.jpg", "conversations": ' + "[" * 100_000
    (folder / "deep.json").write_text(deep)
    assert main(["convert", "llava", f"{folder}/deep.json", "--images", f"{folder}", "--output", f"{folder}/out"]) == 2


@pytest.mark.parametrize(
    ("known", "left"),
    [("coco/33471", "gqa/images/17.jpg"), ("vg/17", COCO), (f"llava/{COCO}", "gqa/images/17.jpg")],
)
def test_pictures_are_left_out_by_ids_that_others_know(folder, known, left):
    source = llava(folder, item(), item("gqa/images/17.jpg"))
    summary, rows = convert(source, folder / "out", exclude=[known])
    assert list(rows) == [f"llava/{left}"] and summary.dropped == {"excluded": 1}


def test_workers_make_the_same(folder):
    source = llava(folder, *(item(name) for name in (COCO, "a.jpg", "gqa/images/17.jpg")))
    one = convert(source, folder / "one")[1]
    assert convert(source, folder / "two", workers=2, shard_rows=1)[1] == one


def test_filter_keeps_conversations(folder, tmp_path):
    _, rows = convert(llava(folder, item(), item("a.jpg")), folder / "out")
    kept = Filter(str(folder / "out"), short_side=0, min_regions=0)
    assert kept.features == CHAT_FEATURES
    summary, filtered = convert(kept, tmp_path / "kept")
    assert filtered == rows and summary.conversations == 2
    assert FEATURES.keys() < filtered["llava/a.jpg"].keys()


def test_chats_are_read_measured_and_packed(folder, tiny, monkeypatch):
    monkeypatch.setenv("GRANVIT_CACHE", str(folder / "cache"))
    text = item(None, "Hi", "Hello.")
    source = llava(folder, item("a.jpg"), item(COCO, "What?", "A <region>.", "Sure?", "Yes."), text, item(COCO))
    convert(source, folder / "out")
    _, processor = tiny()
    options = {"capacity": 120, "packs": 1, "workers": 0, "epochs": 1}
    loader = PackLoader(GranDataset(folder / "out"), processor, {"chat": 1.0}, **options)
    (batch,) = list(loader)
    answers = processor.tokenizer.decode(batch.packed.targets)
    assert sorted(answers.split("<eos>")) == ["", "A bus.", "A bus.", "A region.", "Hello.", "Yes."]
    assert len(batch.samples) == 3 and len(batch.packed.images) == 2 and not batch.samples[2].image.numel()
    asked = [processor.turn_ids(processor.questions(loader.dataset[row], ["chat"])) for row in (0, 1, 2)]
    lengths = [sum(len(ids) for turn in turns for ids in turn) for questions in asked for turns in questions]
    assert loader.lengths.question.tolist() == lengths
    assert int((batch.packed.image_index >= 0).sum()) == int(loader.lengths.image.sum() + loader.lengths.question.sum())
    with pytest.raises(ValueError, match="no image with a question of"):
        PackLoader(GranDataset(folder / "out"), processor, {"bbox2caption": 1.0}, **options)


def test_big_files_are_read_an_item_at_a_time(folder):
    items = (json.dumps(item(f"{number}.jpg", "What?", "A bus. " * 200)) for number in range(10_000))
    (folder / "big.json").write_text("[" + ",".join(items) + "]")
    (folder / "scratch").mkdir()
    tracemalloc.start()
    records = Llava(str(folder / "big.json"), str(folder)).records(Notes(), folder / "scratch")
    assert sum(1 for _ in records) == 10_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8_000_000 < (folder / "big.json").stat().st_size
