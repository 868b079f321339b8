"""The report of a fabricated run: what stands in it, and that nobody's captions run as code."""

import base64
import io
import json
import re
import shlex
from html.parser import HTMLParser
from importlib.resources import files

import datasets
import pytest
from PIL import Image
from reported import HOSTILE, LEFT, LINES, PREDICTIONS, caption, lay_out, made_summary, metrics

from granvit.data.mixture import open_split
from granvit.data.page import as_data, shown
from granvit.eval.curves import draw_curves, panels, smooth
from granvit.eval.failures import failures
from granvit.eval.intervals import wilson
from granvit.eval.metrics import summarise
from granvit.eval.names import CONTROL_WORDS, FLOOR_WORDS, METRICS
from granvit.eval.pictures import choose, compared, open_pictures
from granvit.eval.report import write_report


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




def test_pictures_are_those_of_a_predictions_dataset(tmp_path, gran_rows):
    """Datasets that are mixed may have pictures of equal ids."""
    sizes = {"wide": (60, 20), "high": (20, 60)}
    for name, size in sizes.items():
        rows = gran_rows([("a", [(LEFT, "x", "natural")], "photos", size)])
        datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / name)
    test = open_split([str(tmp_path / name) for name in sizes], "test")
    images = open_pictures(test, {(name, "a") for name in sizes})
    assert {name: image.size for (name, _), image in images.items()} == sizes


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
