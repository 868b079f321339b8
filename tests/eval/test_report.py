"""The report of a fabricated run: what stands in it, and that nobody's captions run as code."""

import base64
import errno
import io
import json
import re
import shlex
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from unittest.mock import Mock

import datasets
import pytest
from PIL import Image

from granvit.data.mixture import open_split
from granvit.data.page import as_data, shown
from granvit.eval.curves import draw_curves, panels, smooth
from granvit.eval.failures import failures
from granvit.eval.intervals import bootstrap, wilson
from granvit.eval.metrics import scored, summarise
from granvit.eval.names import CONTROL_WORDS, FLOOR_WORDS, METRICS
from granvit.eval.pictures import choose, compared, open_pictures
from granvit.eval.report import write_report
from granvit.eval.tables import attribute_metrics, headlines, size_metrics, table, tables

LEFT, RIGHT = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


def caption(name, truth, answer, source="photos", kind="natural"):
    base = {"id": name, "source": source, "kind": kind, "box": LEFT, "caption": truth}
    return base | {"task": "bbox2caption", "answer": answer, "predicted_box": None}


def box_answer(name, truth, box, source="photos", kind="natural"):
    return caption(name, truth, "" if box else HOSTILE, source, kind) | {
        "task": "caption2bbox",
        "predicted_box": box,
    }


PREDICTIONS = {
    "before": [
        caption("a", "a red circle", "nothing much"),
        box_answer("a", "a red circle", RIGHT),
    ],
    "pretrain": [
        caption("a", "a red circle", "a red circle"),
        caption("c", HOSTILE, "a blue square"),
        caption("b", "Total 12", HOSTILE, "pages", "ocr"),
    ],
    "pretrain other_image": [caption("a", "a red circle", "said blindly")],
    "adapt": [
        box_answer("a", "a red circle", LEFT),
        box_answer("c", HOSTILE, RIGHT),
        box_answer("b", "Total 12", None, "pages", "ocr"),
    ],
}


def metrics(caption_quality, box_quality):
    return {"bbox2caption_rouge_l": caption_quality, "caption2bbox_acc50": box_quality}


@pytest.fixture
def summary(tmp_path, gran_rows):
    return made_summary(tmp_path / "data", gran_rows)


def made_summary(data, gran_rows):
    """Of a run over a new dataset in the folder `data`."""
    rows = [("a", [(LEFT, "a red circle", "natural")], "photos"), ("b", [(LEFT, "Total 12", "ocr")], "pages")]
    rows.append(("c", [(LEFT, HOSTILE, "natural")], "photos"))
    rows.append(("unasked", [(LEFT, "x", "natural")], "photos"))
    datasets.DatasetDict({"test": gran_rows(rows)}).save_to_disk(data)
    measured = summarise(PREDICTIONS["pretrain"] + PREDICTIONS["adapt"])
    run = {
        "seed": 0,
        "stages": {
            "pretrain": {"before": metrics(0.1, 0.0), "after": measured, "other_image": metrics(0.2, 0.0)},
            "adapt": {"before": measured, "after": metrics(0.6, 0.3), "control": metrics(0.55, 0.2)},
        },
        "features": {"pretrain": {"effective_rank_before": 9.25, "effective_rank_after": 12.5}},
    }
    return {
        "preset": "smoke",
        "commit": "abc1234",
        "device": HOSTILE,
        "versions": {"torch": "2.13.0"},
        "seconds": 90.0,
        "peak_memory_mb": 2048.0,
        "data": {"path": str(data)},
        "floors": {"blind": metrics(0.25, 0.05), "whole_image": {"caption2bbox_acc50": 0.01}},
        "runs": [run],
        "mean": {"stages": run["stages"], "features": run["features"]},
    }


LINES = [
    {"stage": "pretrain", "step": 0, "evaluation": "before", **metrics(0.1, 0.0)},
    {
        "stage": "pretrain",
        "step": 1,
        "loss": 3.0,
        "loss_caption": 2.0,
        "loss_distill": 1.0,
        "features_effective_rank": 9.0,
    },
    {
        "stage": "pretrain",
        "step": 2,
        "loss": 2.0,
        "loss_caption": 1.5,
        "loss_distill": 0.5,
        "features_effective_rank": 9.5,
    },
    {"stage": "pretrain", "step": 2, "evaluation": "after", **metrics(0.4, 0.1)},
    {"stage": "pretrain", "step": 2, "evaluation": "other_image", **metrics(0.2, 0.0)},
    {"stage": "adapt", "step": 1, "loss": 1.0, "loss_caption": 1.0},
    {"stage": "adapt", "step": 3, "evaluation": "after", **metrics(0.6, 0.3)},
]


def lay_out(run, summary, first=None):
    """Write a run's files; the curves and predictions into the folder of its first seed, if there is one."""
    for folder in (run, first or run):
        (folder / "report").mkdir(parents=True, exist_ok=True)
    (run / "report" / "summary.json").write_text(json.dumps(summary))
    ((first or run) / "report" / "predictions.json").write_text(json.dumps(PREDICTIONS))
    ((first or run) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return run


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory, gran_rows):
    """The report's path."""
    folder = tmp_path_factory.mktemp("report")
    return write_report(lay_out(folder / "<b>run", made_summary(folder / "data", gran_rows)))


@pytest.fixture(scope="module")
def page(written):
    return Page(written.read_text(encoding="utf-8"))


def test_captions_answers_and_names_are_text_and_never_markup(page):
    kinds = [attributes.get("type", "ours") for tag, attributes in page.tags if tag == "script"]
    assert sorted(kinds) == ["application/json", "ours"]
    assert not [tag for tag, _ in page.tags if tag in ("iframe", "object", "link", "base", "form")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "GranViT: <b>run" in page.text
    # as the caption asked about (twice), as the model's answer, in place of a box, and as the device's name
    assert "".join(page.text).count(HOSTILE) == 5
    assert [a.get("aria-label") for tag, a in page.tags if tag == "svg"].count(HOSTILE) == 2
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_the_scripts_write_text_and_never_markup():
    for package, name in (("granvit.data", "page.js"), ("granvit.eval", "curves.js")):
        script = files(package).joinpath("html", name).read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(", script)


def test_names_of_data_in_the_curves_cannot_end_their_block():
    block = as_data({"name": HOSTILE + "&"})
    assert "<" not in block and json.loads(block) == {"name": HOSTILE + "&"}


def test_long_texts_are_cut():
    assert shown("x" * 300) == "x" * 300 and shown("x" * 301) == "x" * 300 + " …"


def test_the_page_is_self_contained(page):
    addresses = [a[name] for tag, a in page.tags for name in ("src", "href") if name in a]
    pictures = {a for a in addresses if a.startswith("data:")}
    assert all(a.startswith(("data:image/", "#")) for a in addresses)
    opened = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in pictures]
    assert {(p.format, p.size) for p in opened if p.format == "JPEG"} == {("JPEG", (48, 32))}
    assert sum(tag == "image" for tag, _ in page.tags) == 3  # each once, however often it is shown
    targets = {a["id"] for _, a in page.tags if "id" in a}
    assert {a[1:] for a in addresses if a.startswith("#")} <= targets  # of the page's own parts and pictures


def test_boxes_are_drawn_in_the_pictures_pixels(page):
    shown = [
        (a["class"].split()[-1], *(float(a[k]) for k in ("x", "y", "width", "height")))
        for t, a in page.tags
        if t == "rect"
    ]
    left, right = (0.0, 0.0, 24.0, 32.0), (24.0, 0.0, 24.0, 32.0)
    assert [r[1:] for r in shown if r[0] == "model"] == [right, left, right]  # of a before and after, of c
    assert {r[1:] for r in shown if r[0] == "truth"} == {left}


def test_a_question_has_its_answers_before_and_after(page):
    text = " ".join(" ".join(page.text).split())
    before, after = r"before stage 1 · ✗ ", r" after stage {} · ✓ "
    assert re.search(f"a red circle {before}ROUGE-L 0 nothing much{after.format(1)}ROUGE-L 100 a red circle", text)
    assert "said blindly" not in text
    assert re.search(f"a red circle {before}IoU 0.00{after.format(2)}IoU 1.00", text)



def test_tables_hold_floors_controls_and_states(page):
    text = " ".join(" ".join(page.text).split())
    rouge = 100 * summarise(PREDICTIONS["pretrain"])["bbox2caption_rouge_l"]
    assert re.search(r"blind: knows kind and size 25\.0", text)
    assert re.search(r"after stage 1, shown another image 20\.0", text)
    assert re.search(rf"after stage 1 {rouge:.1f}", text)
    assert re.search(r"stage 2 on a random frozen encoder 20\.0", text)
    assert "before stage 2" not in text  # the end of stage 1 stands there already
    glossary = METRICS | FLOOR_WORDS | CONTROL_WORDS
    assert all(name in text and words in text for name, words in glossary.items())
    assert "1.5 minutes" in text and "2.0 GiB" in text and "9.25 12.50" in text


def test_a_run_of_several_seeds_shows_the_first_ones_curves_and_the_range(tmp_path, summary):
    other = json.loads(json.dumps(summary["runs"][0])) | {"seed": 1}
    other["stages"]["adapt"]["after"] = metrics(0.5, 0.1)
    summary["runs"].append(other)
    summary["config"] = {"output": "my runs/it's"}
    run = tmp_path / "run"
    text = " ".join(
        Page(write_report(lay_out(run, summary, run / "seed-0")).read_text(encoding="utf-8")).text
    )
    assert "10.0 to 30.0" in text and "those of seed 0" in text
    (command,) = re.findall("granvit train .*?(?= --output)", text)
    assert shlex.split(command)[-1] == "my runs/it's/config.yaml"
    assert (run / "report" / "curves.png").is_file()


def test_headlines_give_the_distance_to_what_sees_nothing(summary):
    captions, boxes, kept = headlines(summary, {})
    rouge = 100 * summary["mean"]["stages"]["pretrain"]["after"]["bbox2caption_rouge_l"]
    distance = {other["who"]: other["distance"] for other in captions["against"]}
    assert distance == pytest.approx({"blind floor": rouge - 25, "another image": rouge - 20})
    assert boxes["value"] == 30 and boxes["against"][1]["who"] == "random encoder"
    assert boxes["against"][1]["distance"] == pytest.approx(10)
    assert kept["against"][0]["distance"] == pytest.approx(60 - rouge)


def test_pictures_are_right_and_wrong_ones_of_every_source_with_their_number():
    right = [caption(f"r{i % 10}", "cat", "cat") for i in range(30)]
    wrong = [caption(f"w{i % 2}", "cat", "dog") for i in range(7)]
    (group,) = choose({"pretrain": right + wrong, "adapt": []})
    assert (group["right"], group["of"]) == (30, 37)
    assert [p["answer"] for p in group["predictions"]] == ["cat"] * 3 + ["dog"] * 2
    assert len({p["id"] for p in group["predictions"]}) == 5  # each of another picture
    assert [(g["source"], g["task"]) for g in choose(PREDICTIONS)] == [
        ("photos", "bbox2caption"),
        ("pages of text", "bbox2caption"),
        ("photos", "caption2bbox"),
        ("pages of text", "caption2bbox"),
    ]


def test_curves_put_the_stages_one_after_the_other(summary):
    during = {"stage": "adapt", "step": 2, "evaluation": "during", "held_out_loss": 1.25, **metrics(0.5, 0.2)}
    rates = [line | {"rate": 0.5} if "loss" in line else line for line in LINES]
    curves = panels([*rates, during], summary | {"config": {"pretrain": {"learning_rate": 0.004}}})
    assert [stage["name"] for stage in curves["stages"]] == ["stage 1", "stage 2"]
    drawn = {panel["title"].partition(" (")[0]: panel for panel in curves["panels"]}
    training, held_out = drawn["Loss of the answers"]["series"]
    assert training["parts"] == [[(1, 2.0), (2, 1.5)], [(3, 1.0)]] and held_out["parts"] == [[(4, 1.25)]]
    assert drawn["Learning rate"]["series"][0]["parts"] == [[(1, 0.002), (2, 0.002)], [(3, 0.5)]]
    rouge = drawn["Captions of boxes: ROUGE-L"]
    ends, few = rouge["series"]
    assert sum(ends["parts"], []) == [(0, 10.0), (2, 40.0), (5, 60.0)] and not ends["joined"]
    assert few["parts"] == [[(4, 50.0)]] and few["joined"]
    assert {level["name"]: level["value"] for level in rouge["levels"]} == pytest.approx(
        {"blind caption": 25, "another image shown": 20}
    )
    figure = draw_curves(panels([*rates, during], summary))
    axis = next(axis for axis in figure.axes if axis.get_title(loc="left").startswith("Captions"))
    assert axis.lines[0].get_linestyle() == "None" and list(axis.lines[0].get_xdata()) == [0, 2, 5]


def test_conversations_have_a_curve_where_regions_have_none():
    lines = [{"stage": "sft", "step": 1, "loss": 2.0, "loss_caption": 2.0}]
    lines += [
        {"stage": "sft", "step": step, "evaluation": when, "chat_token_accuracy": share}
        for step, when, share in ((0, "before", 0.1), (1, "after", 0.4), (1, "other_image", 0.3))
    ]
    stages = {"sft": {"other_image": {"chat_token_accuracy": 0.3}}}
    _, panel = panels(lines, {"floors": {}, "mean": {"stages": stages}})["panels"]
    assert "conversations" in panel["title"] and panel["series"][0]["parts"] == [[(0, 10.0), (1, 40.0)]]
    assert panel["levels"] == [{"name": "another image shown", "value": 30.0}]


def test_long_series_are_thinned_and_keep_their_mean():
    lines = [{"stage": "pretrain", "step": step, "loss": 1.0, "loss_caption": step % 7} for step in range(1, 20_001)]
    (part,) = panels(lines, {"floors": {}, "mean": {"stages": {}}})["panels"][0]["series"][0]["parts"]
    assert len(part) <= 1500 and sum(value for _, value in part) / len(part) == pytest.approx(3, abs=0.01)


def test_smooth_starts_at_the_first_value_and_keeps_a_constant():
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth([1.0, 2.0])[1] == pytest.approx((0.09 * 1 + 0.1 * 2) / 0.19)


@pytest.mark.parametrize("missing", ["metrics.jsonl", "report/summary.json", "report/predictions.json"])
def test_an_unfinished_run_is_said(tmp_path, summary, missing):
    run = lay_out(tmp_path / "run", summary)
    (run / missing).unlink()
    with pytest.raises(ValueError, match=f"no finished run: {missing} is missing"):
        write_report(run)


SUMMARY, ANSWERS = "report/summary.json", "report/predictions.json"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (SUMMARY, lambda text: text[:-9], "Expecting"),
        (SUMMARY, lambda text: "[]", "it is [], not an object"),
        (SUMMARY, lambda text: text.replace('"floors"', '"lost"'), "it has no floors"),
        (SUMMARY, lambda text: text.replace('"runs": [', '"runs": [3, '), "runs[0] is 3, not an object"),
        (SUMMARY, lambda text: text.replace('"control"', '"lost"', 1), "runs[0].stages.adapt has no control"),
        (SUMMARY, lambda text: text.replace("0.01", "NaN"), "whole_image.caption2bbox_acc50 is nan, not a finite"),
        (SUMMARY, lambda text: text.replace("0.25", "1e308"), "blind.bbox2caption_rouge_l is 1e+308, not"),
        (SUMMARY, lambda text: text.replace("0.01", "1.5"), "whole_image.caption2bbox_acc50 is 1.5, not from 0 to 1"),
        (ANSWERS, lambda text: text + "}", "Extra data"),
        (ANSWERS, lambda text: '{"before": null}', "before is None, not a list"),
        (ANSWERS, lambda text: text.replace('"answer"', '"lost"', 1), "before[0] has no answer"),
        (ANSWERS, lambda text: text.replace("0.5", "NaN", 1), "before[0].box[2] is nan, not a finite number"),
        (ANSWERS, lambda text: text.replace("[0.5, 0.0,", "[", 1), "before[1].predicted_box has 2 values, not 4"),
        ("metrics.jsonl", lambda text: "3\n" + text, "line 1 is 3, not an object"),
        ("metrics.jsonl", lambda text: text.replace('"step": 0', '"step": null', 1), "line 1.step is None, not"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path, summary, name, change, message):
    path = lay_out(tmp_path / "run", summary) / name
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged: .*{re.escape(message)}"):
        write_report(tmp_path / "run")


def test_a_cut_last_line_and_a_run_without_stages_have_a_report(tmp_path, summary, monkeypatch):
    summary["runs"][0]["stages"] = summary["mean"]["stages"] = {}
    run = lay_out(tmp_path / "run", summary)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "adapt", "step": 4, "evaluation": "during", **metrics(1e308, 0.5)}))
        file.write('\n{"stage": "adapt", "st')
    (run / "metrics.jsonl").write_bytes(b"\xff\n" + (run / "metrics.jsonl").read_bytes())  # a broken byte
    page = write_report(run)
    text = page.read_text(encoding="utf-8")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(Path, "replace", Mock(side_effect=OSError(errno.EIO, "killed")))
        write_report(run)
    assert page.read_text(encoding="utf-8") == text


def test_faults_of_rows_that_are_not_shown_end_no_report(tmp_path, summary, gran_rows):
    """A run of a raised fault budget has kept to it; its report must not count again by another."""
    shown = [("a", [(LEFT, "a red circle", "natural")], "photos"), ("b", [(LEFT, "Total 12", "ocr")], "pages")]
    shown.append(("c", [(LEFT, HOSTILE, "natural")], "photos"))
    broken = [("broken", [(LEFT, "x", "natural")], "photos")] * 5
    datasets.DatasetDict({"test": gran_rows(broken + shown)}).save_to_disk(tmp_path / "faulty")
    summary["data"]["path"] = str(tmp_path / "faulty")
    assert write_report(lay_out(tmp_path / "run", summary)).is_file()


def test_a_dataset_that_lacks_a_shown_image_is_named(tmp_path, summary):
    run = lay_out(tmp_path / "run", summary)
    strangers = {"pretrain": [caption("stranger", "x", "y")]}
    (run / "report" / "predictions.json").write_text(json.dumps(strangers))
    with pytest.raises(ValueError, match="has no test image 'stranger'"):
        write_report(run)


def test_pictures_are_those_of_a_predictions_dataset(tmp_path, gran_rows):
    """Datasets that are mixed may have pictures of equal ids."""
    sizes = {"wide": (60, 20), "high": (20, 60)}
    for name, size in sizes.items():
        rows = gran_rows([("a", [(LEFT, "x", "natural")], "photos", size)])
        datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / name)
    test = open_split([str(tmp_path / name) for name in sizes], "test")
    images = open_pictures(test, {(name, "a") for name in sizes})
    assert {name: image.size for (name, _), image in images.items()} == sizes


def test_attributes_and_sizes_have_tables(summary):
    answers = [caption("a", "striped red ball", "red star", "scenes")]
    answers.append(box_answer("a", "striped red ball", LEFT, "scenes"))
    states = summary["mean"]["stages"]["pretrain"]
    states["after"] = summarise(answers)
    summary["floors"] = {"most_frequent_words": {"bbox2caption_colour": 0.2, "scenes/bbox2caption_colour": 0.2}}
    scores = {("pretrain", "after"): scored(answers)}
    attributes, sizes = (table(summary, "", make, scores) for make in (attribute_metrics(summary), size_metrics()))
    assert attributes["heads"] == [["colour", 1], ["kind", 1], ["pattern", 1]]
    assert sizes["heads"] == [["ACC@0.5, large", 1], ["mean IoU, large", 1]]  # all are not text
    rows = {row["who"]: [cell["text"] for cell in row["cells"]] for row in attributes["rows"]}
    assert rows["after stage 1"] == ["100.0", "0.0", "0.0"] and rows["most frequent words"] == ["20.0", "", ""]


def test_cells_say_how_sure_they_are_and_no_bar_where_less_is_better(summary):
    answers = [caption(f"{i}", "a cat", "a cat" if i % 2 else "dogs", "pages", "ocr") for i in range(10)]
    made = {t["title"]: t for t in made_tables(summary, answers)}
    (row,) = [row for row in made["Captions of boxes"]["rows"] if row["who"] == "after stage 1"]
    rouge, *_, exact, _ = row["cells"]
    assert made["Captions of boxes"]["columns"][0] == {"label": "all", "number": 10, "images": 10}
    assert rouge["text"] == "50.0" and rouge["bar"] == 50 and rouge["value"] == 0.5
    low, high = map(float, rouge["spread"].split(" to "))
    assert 10 <= low < 50 < high <= 90 and exact["spread"] == rouge["spread"]  # each is right or wrong
    assert made["Text regions, to the letter"]["heads"] == [["CER (less is better)", 1], ["to the letter", 1]]
    cer, _ = made["Text regions, to the letter"]["rows"][-1]["cells"]
    assert cer["bar"] == 0 and cer["text"]
    boxes = made_tables(summary, [box_answer("a", "a cat", None)])[1]
    assert boxes["heads"][-1] == ["unparsed (less is better)", 1]
    unparsed = boxes["rows"][-1]["cells"][-1]
    assert unparsed["bar"] == 0 and unparsed["text"] == "100.0"


def made_tables(summary, answers):
    """All of a report whose only stage ended with these answers."""
    summary["mean"]["stages"] = {"pretrain": {"after": summarise(answers)}}
    summary["runs"] = [{"seed": 0, "stages": summary["mean"]["stages"]}]
    return tables(summary, {("pretrain", "after"): scored(answers)})


def test_of_few_images_a_mean_has_no_interval_and_a_share_one_of_so_many_answers(summary):
    answers = [caption(f"{i}", "a cat", "a dog" if i % 3 else "a cat") for i in range(9)] * 2
    made = made_tables(summary, answers)[0]
    rouge, *_, exact, _ = made["rows"][-1]["cells"]
    assert rouge["spread"] == "" and made["columns"][0]["images"] == 9
    assert exact["spread"] == "{:.1f} to {:.1f}".format(*(100 * end for end in wilson(1 / 3, 9)))


@pytest.mark.parametrize(
    ("right", "interval"), [(0.5, lambda scores: bootstrap(scores)), (1.0, lambda scores: wilson(1.0, 20))]
)
def test_alike_answers_about_an_image_make_a_share_no_surer(summary, right, interval):
    """The headline too."""
    answers = [box_answer(f"{i}", "a cat", LEFT if i < 20 * right else RIGHT) for i in range(20)] * 6
    scores = {("adapt", "after"): scored(answers)}
    summary["mean"]["stages"]["adapt"]["after"] = summary["runs"][0]["stages"]["adapt"]["after"] = summarise(answers)
    wanted = "{:.1f} to {:.1f}".format(*(100 * end for end in interval(scores["adapt", "after"]["caption2bbox_acc50"])))
    claim = next(claim for claim in headlines(summary, scores) if claim["unit"] == "ACC@0.5")
    made = next(made for made in tables(summary, scores) if made["title"] == "Boxes of sentences")
    shown = next(row for row in made["rows"] if row["who"] == "after stage 2")["cells"][0]["spread"]
    assert claim["spread"] == shown == wanted and claim["number"] == 120


def test_sources_of_equal_figures_keep_their_columns_and_a_column_of_the_same_answers_is_dropped(summary):
    sources = {"cats": 4, "dogs": 8, "birds": 20}
    answers = [caption(f"{s} {i}", "x", "x" if i % 2 else "y", s) for s, n in sources.items() for i in range(n)]
    columns = made_tables(summary, answers)[0]["columns"]
    rouge = [(column["label"], column["number"]) for column in columns][: len(columns) - 2]
    assert rouge == [("all", 32), *sorted(sources.items())]  # "not text" is all
    both = [caption("a", "x", "x"), caption("a", "x", "x", kind="ocr")]  # as many, of the same image and equal
    assert [column["label"] for column in made_tables(summary, both)[0]["columns"][:3]] == ["all", "not text", "text"]


def test_of_many_sources_those_of_the_most_questions_are_shown(summary):
    answers = [caption("a", "a cat", "" if k else "a cat", f"source {i}") for i in range(12) for k in range(1 + i)]
    wanted = sorted(f"source {i}" for i in range(4, 12))
    shown = made_tables(summary, answers)[0]["columns"]
    assert [column["label"] for column in shown if "source" in column["label"]] == wanted
    assert [group["source"] for group in choose({"pretrain": answers})] == wanted


def test_failures_say_what_is_mistaken_for_what():
    answers = [caption(f"{i}", "striped red ball", said, "scenes") for i, said in enumerate(["red star", "blue ball"])]
    answers += [caption("2", "plain blue ball", "blue ball", "scenes"), caption("3", "a red thing", "x", "photos")]
    colour = next(f for f in failures(answers) if f["attribute"] == "colour")
    assert (colour["asked"], colour["right"], colour["confusions"]) == (3, 2, [("red", "blue", 1)])
    assert [(row["thing"], row["right"], row["said"]) for row in colour["rows"]] == [
        ("red", 1, [("blue", 1)]),
        ("blue", 1, []),
    ]
    (red, _) = next(f for f in failures(answers * 9) if f["attribute"] == "colour")["rows"]
    assert (red["asked"], red["low"], red["high"]) == (18, *wilson(0.5, 2)), "of two images"
    pattern = next(f for f in failures(answers) if f["attribute"] == "pattern")
    assert ("striped", "none named", 2) in pattern["confusions"]


def test_the_same_question_is_compared_and_no_other():
    asked = caption("a", "a cat", "a cat")
    others = {"then": [caption("b", "a cat", "1"), caption("a", "a dog", "2"), asked | {"answer": "3"}], "never": []}
    others["of another set"] = [asked | {"dataset": "wide"}]
    assert {who: p["answer"] for who, p in compared(asked, others).items()} == {"then": "3"}


def test_negative_values_are_in_the_picture_of_the_curves(summary):
    line = {"stage": "pretrain", "step": 1, "loss": -2.0, "loss_caption": -2.0}
    (axis, *_) = draw_curves(panels([line], summary)).axes
    assert axis.get_ylim()[0] < -2
    assert draw_curves(panels(LINES, summary)).axes[0].get_ylim()[0] == 0


@pytest.mark.browser
def test_in_a_browser_negative_and_missing_values_and_single_steps_have_their_place(tmp_path, summary, tab):
    run = lay_out(tmp_path / "run", summary)
    (run / "metrics.jsonl").write_text(json.dumps({"stage": "pretrain", "step": 1, "loss": -2.0, "loss_caption": -2.0}))
    tab.goto(write_report(run).as_uri())
    panel = tab.locator(".curve-panel").first
    assert panel.locator("text[y='214']").all_text_contents() == ["0", "1"]
    assert panel.locator("text[text-anchor='end']").all_text_contents() == ["-2", "-1", "0"]
    assert all(20 <= float(mark.get_attribute("cy")) <= 198 for mark in panel.locator("circle.blue").all())

    table = tab.locator("table.figures").first
    cells = table.locator("tbody tr td:nth-child(2)")
    for number, value in enumerate(("nan", "inf")):
        cells.nth(number).evaluate("(cell, value) => { cell.dataset.value = value; }", value)
    for _ in ("descending", "ascending"):
        table.locator("thead tr:last-child th").nth(1).click()
        assert [cell.get_attribute("data-value") for cell in cells.all()][-2:] == ["nan", "inf"]


@pytest.mark.browser
def test_in_a_browser_tables_sort_and_curves_are_smoothed(written, tab):
    tab.goto(written.as_uri())
    first = tab.locator("table.figures").first
    shares = first.locator("tbody tr td:nth-child(2)")

    def column():
        return [float(cell.get_attribute("data-value")) for cell in shares.all()]

    as_it_was = column()
    head = first.locator("thead tr:last-child th").nth(1)
    for order, wanted in (("descending", sorted(as_it_was, reverse=True)), ("ascending", sorted(as_it_was))):
        head.click()
        assert head.get_attribute("aria-sort") == order and column() == wanted
    head.press("Enter")
    assert column() == as_it_was

    curve = tab.locator("#curves path.curve").first
    smooth = curve.get_attribute("d")
    tab.locator("#smoothing").fill("0")
    assert curve.get_attribute("d") != smooth and tab.locator("#smoothing-value").inner_text() == "0.00"
    assert curve.get_attribute("d") == tab.locator("#curves path.raw").first.get_attribute("d")

    for width in (1280, 390):
        tab.set_viewport_size({"width": width, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    colours = []
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        colours.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours[0] != colours[1]
    assert tab.said == [] and tab.hosts == set() and tab.title() == "GranViT: <b>run"
