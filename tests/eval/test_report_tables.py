"""The tables and headlines of a report: which columns, which intervals."""

import pytest
from reported import LEFT, RIGHT, box_answer, caption

from granvit.eval.intervals import bootstrap, wilson
from granvit.eval.metrics import scored, summarise
from granvit.eval.pictures import choose
from granvit.eval.tables import attribute_metrics, headlines, size_metrics, table, tables


def test_headlines_give_the_distance_to_what_sees_nothing(summary):
    captions, boxes, kept = headlines(summary, {})
    rouge = 100 * summary["mean"]["stages"]["pretrain"]["after"]["bbox2caption_rouge_l"]
    distance = {other["who"]: other["distance"] for other in captions["against"]}
    assert distance == pytest.approx({"blind floor": rouge - 25, "another image": rouge - 20})
    assert boxes["value"] == 30 and boxes["against"][1]["who"] == "random encoder"
    assert boxes["against"][1]["distance"] == pytest.approx(10)
    assert kept["against"][0]["distance"] == pytest.approx(60 - rouge)


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
