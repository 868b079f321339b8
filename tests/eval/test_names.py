"""The words for figures: those of the code, of docs/metrics.md and of what commands print are the same."""

import re
from pathlib import Path

from granvit.eval.metrics import SIZES, summarise
from granvit.eval.names import CONTROL_WORDS, FLOOR_WORDS, FLOORS, METRICS, STATES, figure_name
from granvit.eval.tables import tables

DOCS = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def cells(section):
    """The rows of a section's table, without its head."""
    rows = re.findall(r"^\| ?(.*?) \|$", DOCS.partition(f"## {section}")[2].partition("\n## ")[0], re.M)
    return [row.split(" | ") for row in rows[1:] if not row.startswith("---")]


def test_the_docs_call_figures_by_the_names_of_the_code():
    rows = cells("Names")
    assert [called for _, called, _ in rows] == list(METRICS)
    for figures, called, meaning in rows:
        assert meaning.startswith(METRICS[called])
        first = re.findall(r"`(\w+)`", figures)[:1]
        assert all(figure_name(name)[1].split(", ")[-1] == called.split(", ")[0] for name in first)
    assert dict(cells("Floors")) == FLOOR_WORDS and list(FLOOR_WORDS) == list(FLOORS.values())
    assert {called: done for _, called, done in cells("Controls")} == CONTROL_WORDS
    for state, called, _ in cells("Controls"):
        assert STATES[state.strip("`")][0].endswith(called)


def test_every_figure_of_an_evaluation_has_a_name_of_the_glossary():
    words = {word for called in METRICS for word in called.split(", ")}
    predictions = []
    for kind, source, caption in (("natural", "scenes", "a small red striped disc"), ("ocr", "a/b", "Total")):
        for box in ([0, 0, 0.1, 0.1], [0, 0, 0.2, 0.2], [0, 0, 0.3, 0.3], [0, 0, 1, 1]):
            truth = {"id": "a", "source": source, "kind": kind, "caption": caption, "box": box, "answer": ""}
            predictions += [truth | {"task": "bbox2caption", "predicted_box": None}]
            predictions += [truth | {"task": "caption2bbox", "predicted_box": box}]
    figures = summarise(predictions)
    assert {name.rpartition("_")[2] for name in figures} > {*SIZES, "colour", "cer"}
    names = {name: figure_name(name) for name in [*figures, "chat_token_accuracy", "features_effective_rank"]}
    assert {word for _, called in names.values() for word in called.split(", ")} <= words
    stages = {"pretrain": {"after": figures | {"chat_token_accuracy": 0.5}}}
    made = tables({"floors": {}, "mean": {"stages": stages}, "runs": [{"stages": stages}]}, {})  # the report's
    heads = [called.removesuffix(" (less is better)") for table in made for called, _ in table["heads"]]
    assert len(made) == 6 and {word for called in heads for word in called.split(", ")} <= words
    assert {of for of, _ in names.values()} == {"all", "not text", "text", "scenes (drawn)", "a/b"}
    assert figure_name("/bbox2caption_exact") == ("no source named", "exact")
    assert [figure_name(name)[0] for name in ("", "x/", "a\nb", "a\nb/ocr_cer")] == ["all", "x", "all", "a\nb"]
    assert names["natural_caption2bbox_acc75"] == ("not text", "ACC@0.75")
    assert names["ocr_exact"] != names["ocr_bbox2caption_exact"] == ("text", "exact")
