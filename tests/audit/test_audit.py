"""The audit counts what is there, shows hostile text as text, and a model's doubts find planted captions."""

import io
import json
import math
import re
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scripted import FirstPixel, TextProcessor

from granvit.audit import cycle
from granvit.audit.cycle import auc, check_regions, log_likelihood
from granvit.audit.page import audit
from granvit.audit.planting import VARIANTS, plant
from granvit.audit.statistics import count
from granvit.data.__main__ import main
from granvit.data.loader import spread
from granvit.data.schema import FEATURES
from granvit.questions.packing import pack_questions
from granvit.questions.prompts import DESCRIBE_BOX, FIND_BOX, describe_box, find_box, parse_box
from granvit.questions.schema import Region, Sample

EVIL = "<script>alert(1)</script><img src=http://x.example/a.png onerror=alert(1)>"


def region(box=(0.1, 0.1, 0.5, 0.5), caption="a red ball", kind="natural") -> dict:
    return {"box": list(box), "caption": caption, "kind": kind, "score": None}


def row(name, *regions, caption=None, content=None) -> dict:
    buffer = io.BytesIO()
    noise = np.random.default_rng(sum(name.encode())).integers(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return {
        "id": name, "image": {"bytes": content or buffer.getvalue(), "path": None}, "width": 64, "height": 48,
        "caption": caption, "regions": list(regions), "source": "toy", "licence": "CC0-1.0",
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A dataset with everything that is wrong, and text from people who mean no good."""
    other = (0.6, 0.6, 0.9, 0.9)
    rows = [
        row("good", region(), region(other, "a blue box"), caption="two things"),
        row("twice", region(), region((0.1, 0.1, 0.5, 0.51), "A red ball!")),
        row(EVIL, region(caption=EVIL), region(other, "x" * 100_000), region((0, 0, 1, 1), "‮שלום\0 🙂" + "̈" * 500)),
        row("text", region((0, 0, 1, 0.1), "Total 12.50", "ocr")),
        row("boxes", region((0, 0, 2, 1)), region((0.5, 0.5, 0.5, 0.9)), region(caption=" "), region(), None),
        row("broken", region(), content=b"no picture"),
        row("nothing"),
        row("tiny", region((0.5, 0.5, 0.5001, 0.5001))),
    ]
    rows.append(dict(row("good", region()), image=rows[0]["image"]))
    data = datasets.Dataset.from_dict({name: [one[name] for one in rows] for name in FEATURES}, FEATURES)
    data.save_to_disk(str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [0, 2])
def test_numbers(folder, workers, monkeypatch):
    numbers = count(folder, "train", range(9), workers).numbers()
    wanted = {
        "rows": 9, "good": 7, "faulty": 3, "captioned": 1, "boxes_outside": 1, "boxes_empty": 1,
        "faults": {"box": 2, "region_caption": 1, "regions": 1, "image": 1, "empty_row": 1},
        "regions": {"natural": 10, "ocr": 1},
        "repeated_ids": 1, "repeated_pictures": 1, "repeated_boxes": 1, "repeated_captions_in_image": 1,
    }  # fmt: skip
    assert {name: numbers[name] for name in wanted} == wanted
    whole = {"rows": 9, "faulty": 3, "pictures": 7, "captioned": 1, "natural": 10, "ocr": 1}
    assert {name: numbers["sources"]["toy"][name] for name in whole} == whole
    assert list(numbers["sources"]) == ["toy"] and numbers["sources"]["toy"]["words"] > 20
    assert numbers["frequent_captions"][0] == ["a red ball", 6]
    assert numbers["regions_an_image"][-1] == 3 and len(numbers["fault_examples"]["box"]) == 2
    json.dumps(numbers)


def test_page_of_hostile_text_is_whole_and_small(folder, tmp_path):
    audit(folder, tmp_path / "out", workers=0)
    html = (tmp_path / "out" / "index.html").read_text()
    assert "<script>alert" not in html and "<img src=http" not in html and "&lt;script&gt;alert(1)" in html
    assert "x" * 301 not in html and "\0" not in html and len(html) < 3_000_000
    assert "default-src 'none'" in html and 'src="http' not in html and "prefers-color-scheme: dark" in html
    stored = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert stored["numbers"]["rows"] == 9 and "doubts" not in stored


def test_sources_are_named_as_text_and_cards_open_their_picture(tmp_path):
    rows = [row(str(i), region(), caption="a thing") | {"source": EVIL if i else "plain"} for i in range(3)]
    data = datasets.Dataset.from_dict({name: [r[name] for r in rows] for name in FEATURES}, FEATURES)
    data.save_to_disk(str(tmp_path / "data"))
    assert list(audit(tmp_path / "data", tmp_path / "out", workers=0)["numbers"]["sources"]) == [EVIL, "plain"]
    html = (tmp_path / "out" / "index.html").read_text()
    assert html.count("&lt;script&gt;alert(1)") >= 3 and "<script>alert" not in html
    opens = re.findall(r'popovertarget="([\w-]+)"', html)
    assert len(opens) == 3 and re.findall(r'popover id="([\w-]+)"><img src="data:image/jpeg', html) == opens


def test_rows_without_a_source_are_no_source_called_none(tmp_path):
    rows = [row(str(i), region(), caption="a thing") | {"source": name} for i, name in enumerate((None, "None", None))]
    data = datasets.Dataset.from_dict({name: [r[name] for r in rows] for name in FEATURES}, FEATURES)
    data.save_to_disk(str(tmp_path / "data"))
    numbers = audit(tmp_path / "data", tmp_path / "out", workers=0)["numbers"]
    assert {name: of["rows"] for name, of in numbers["sources"].items()} == {"": 2, "None": 1}
    assert (tmp_path / "out" / "index.html").read_text().count("no source named") == 3  # in the table and on cards


def test_an_empty_and_a_broken_dataset(tmp_path):
    rows = [row("broken", region(), content=b"x")]
    data = datasets.Dataset.from_dict({name: [one[name] for one in rows] for name in FEATURES}, FEATURES)
    data.save_to_disk(str(tmp_path / "data"))
    assert audit(tmp_path / "data", tmp_path / "out", workers=0)["numbers"]["faulty"] == 1
    assert (tmp_path / "out" / "index.html").exists()


def test_command_line_with_a_model(folder, tiny, tmp_path, capsys):
    model, processor = tiny(box_style="tokens", box_format="bins")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "run" / "export")
    command = ["audit", str(folder), "--output", str(tmp_path / "out"), "--workers", "0", "--device", "cpu"]
    assert main([*command, "--model", str(tmp_path / "run")]) == 0
    assert "captions checked" in capsys.readouterr().err
    stored = json.loads((tmp_path / "out" / "audit.json").read_text())
    scores = [doubt["score"] for doubt in stored["doubts"]]
    assert stored["checked"] == len(scores) == 11 and scores == sorted(scores) and np.isfinite(scores).all()
    assert {"cycle_iou", "said_rouge_l", "found_iou", "caption_gain", "box_gain"} == set(stored["doubts"][0]["parts"])
    html = (tmp_path / "out" / "index.html").read_text()
    assert "doubts most" in html and "<script>alert" not in html
    assert main([*command, "--model", str(tmp_path / "no")]) == 2
    assert main([*command[:2], "--images", "0", "--output", str(tmp_path / "none")]) == 2
    assert "error: images must be >= 1, got 0" in capsys.readouterr().err
    assert main(command) == 2  # it has something in it
    assert "error: output must be a new or an empty folder" in capsys.readouterr().err


# What a model doubts


def sample(number: int, captions: list[str]) -> Sample:
    """A picture whose first pixel says its number, with small boxes side by side."""
    image = torch.full((32, 64, 3), number, dtype=torch.uint8)
    width = 1 / len(captions)
    regions = [Region((i * width, 0.1, (i + 0.5) * width, 0.4), text, "natural") for i, text in enumerate(captions)]
    return Sample(f"s{number}", image, None, tuple(regions), "toy", "")


class Perfect(TextProcessor, FirstPixel):
    """Stands for a model and its processor that know the right caption of every box, and the box of every caption."""

    box_style, box_format, bins, device = "text", "text", 1000, torch.device("cpu")
    config = SimpleNamespace(parallel_boxes=False)

    def __init__(self, samples):
        self.truth = {s.image[0, 0, 0].item(): {region.box: region.caption for region in s.regions} for s in samples}
        self.images = [s.image[0, 0, 0].item() for s in samples]

    def __call__(self, questions, image_sizes, image_index):
        asked = list(zip(questions, image_index, strict=True))
        return SimpleNamespace(to=lambda device: {"asked": asked})

    def generate(self, asked, features, max_new_tokens, do_sample):
        return [self.right(question, features[0][image, 0].item()) for question, image in asked]

    def right(self, question, number):
        """The right answer to a question about the picture of this number."""
        truth = self.truth[number]
        if question.prompt.startswith(FIND_BOX):
            caption = question.prompt.removeprefix(FIND_BOX)
            boxes = [box for box, text in truth.items() if text == caption]
            return "[" + ", ".join(f"{side:.3f}" for side in boxes[0]) + "]" if boxes else "nowhere"
        asked = parse_box(question.prompt[len(DESCRIBE_BOX[0]) :])
        return min(truth.items(), key=lambda item: sum(abs(a - b) for a, b in zip(item[0], asked, strict=True)))[1]

    def likelihood(self, model, processor, samples, asked, batch_size):
        numbers = [s.image[0, 0, 0].item() for s in samples]
        return np.array([-1.0 if self.right(q, numbers[i]) == q.answer else -20.0 for i, q in asked])


@pytest.mark.parametrize("variant", ["other_image", "same_image", "one_word"])
def test_a_perfect_model_finds_every_planted_caption(monkeypatch, variant):
    names = ("red ball", "blue box", "green star")
    samples = [sample(i, [f"{name} {i}" for name in names]) for i in range(20)]
    perfect = Perfect(samples)
    monkeypatch.setattr(cycle, "log_likelihood", perfect.likelihood)
    monkeypatch.setattr(cycle, "IMAGES", 7)
    planted, wrong = plant(samples, variant)
    checked = [one for group in check_regions(perfect, perfect, planted, batch_size=5) for one in group]
    assert [(one.row, one.place) for one in checked] == [(i, k) for i in range(20) for k in range(3)]
    assert len(wrong) == 6
    parts = [[one for one in checked if ((one.row, one.place) in wrong) is is_wrong] for is_wrong in (True, False)]
    assert auc(*([one.score for one in part] for part in parts)) == 1
    for name in ("said_rouge_l", "found_iou", "caption_gain", "box_gain"):
        assert auc(*([one.parts[name] for one in part] for part in parts)) == 1, name
    # The model's own words found again know nothing of the given ones.
    assert all(one.parts["cycle_iou"] > 0.99 for one in checked)
    assert all(one.score == pytest.approx(19) for one in parts[1])


def test_an_only_image_has_nothing_to_be_compared_with(monkeypatch):
    samples = [sample(0, ["red ball"])]
    perfect = Perfect(samples)
    monkeypatch.setattr(cycle, "log_likelihood", perfect.likelihood)
    [[one]] = check_regions(perfect, perfect, samples)
    assert math.isnan(one.score) and one.parts["found_iou"] > 0.99
    assert list(check_regions(perfect, perfect, [])) == []


@pytest.mark.parametrize("style", [("tokens", "bins"), ("both", "text")])
def test_log_likelihood_is_the_models_own_loss_question_by_question(tiny, samples, style):
    model, processor = tiny(box_style=style[0], box_format=style[1])
    options = {"box_style": style[0], "box_format": style[1], "bins": processor.bins}
    asked = []
    for turn in range(5):
        for i in (2, 0, 1):
            for one in samples[i].regions:
                asked.append((i, describe_box(one.box, f"{one.caption} {turn}", 0, **options)))
                asked.append((i, find_box(one.caption, "<loc_1><loc_2><loc_3><loc_4>", 0)))
    values = log_likelihood(model, processor, samples, asked, 16)
    for value, (i, question) in list(zip(values, asked, strict=True))[::7]:
        batch = pack_questions([samples[i]], [[question]], processor, 4096)
        with torch.no_grad():
            loss = model(batch=batch).loss.item()
        assert value == pytest.approx(-loss * len(batch.targets), rel=1e-4)


def test_auc():
    assert auc([1, 2], [3, 4]) == 1 and auc([3, 4], [1, 2]) == 0 and auc([1], [1]) == 0.5
    assert auc([1, 3], [2, 3]) == pytest.approx((1 + 1 + 0 + 0.5) / 4) and math.isnan(auc([], [1]))
    assert auc([float("nan")], [0]) == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_planted_captions_are_wrong_and_the_rest_is_as_it_was(variant):
    samples = [sample(i, [f"red ball {i}", f"blue box {i}"]) for i in range(10)]
    planted, wrong = plant(samples, variant, share=0.3, seed=1)
    assert len(wrong) == 6 and plant(samples, variant, share=0.3, seed=1)[1] == wrong
    for number, (before, after) in enumerate(zip(samples, planted, strict=True)):
        for place, (old, new) in enumerate(zip(before.regions, after.regions, strict=True)):
            assert (old != new) is ((number, place) in wrong)
            assert (old.caption == new.caption) is (old == new or variant == "moved_box")


def test_spread():
    assert list(spread(10, None)) == list(range(10)) == list(spread(10, 10)) and list(spread(10, 3)) == [0, 3, 6]
