"""evaluate() with a model whose answers are scripted."""

import pytest
import torch
from scripted import TextProcessor

from granvit.data.loader import GranDataset
from granvit.eval import evaluate
from granvit.eval.evaluation import ask, other_images
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX, questions

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


class Inputs(dict):
    def to(self, device):
        return self


class Processor(TextProcessor):
    """Stands for GranViTProcessor: hands questions and images through to the scripted model."""

    def questions(self, sample, tasks, shared=False):
        return questions(sample, tasks, shared=shared)

    def __call__(self, images, questions, image_index):
        return Inputs(images=images, questions=questions, image_index=image_index)


class Scripted(torch.nn.Module):
    """Answers by a function of a question and the colour of its image's first pixel (None without an
    image)."""

    device = torch.device("cpu")

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.batches = []
        self.modes = set()
        self.lengths = []

    def generate(self, images, questions, image_index, max_new_tokens, do_sample):
        self.batches.append((len(images or ()), len(questions)))
        self.modes.add(self.training)
        self.lengths.append(max_new_tokens)
        shown = [None] * len(questions) if images is None else [images[i] for i in image_index]
        colours = [None if s is None else tuple(s[0, 0].tolist()) for s in shown]
        return [self.answer(q, colour) for q, colour in zip(questions, colours, strict=True)]


@pytest.fixture
def dataset(gran_rows):
    rows = [
        ("a", [(LEFT, "a cat", "natural"), (RIGHT, "a dog", "natural")], "photos"),
        ("b", [(LEFT, "Total 12", "ocr")], "pages"),
        ("c", [(RIGHT, "a bird", "natural"), (LEFT, "a bird", "natural")], "photos"),
        ("d", [(LEFT, "Sum 3", "ocr")], "pages"),
    ]
    return GranDataset(gran_rows(rows))


def colours(dataset):
    return {tuple(dataset[i].image[0, 0].tolist()): dataset[i].id for i in range(len(dataset))}


def test_an_oracle_is_right_everywhere(dataset):
    model = Scripted(lambda question, colour: question.answer)
    evaluation = evaluate(model, Processor(), dataset)
    assert evaluation.metrics["bbox2caption_exact"] == evaluation.metrics["caption2bbox_acc50"] == 1
    assert evaluation.metrics["ocr_cer"] == 0 and evaluation.metrics["caption2bbox_unparsed"] == 0
    assert len([p for p in evaluation.predictions if p["task"] == BBOX2CAPTION]) == 6
    # "a bird" fits two regions of one image, and is asked for both: that is how these questions are counted
    assert len([p for p in evaluation.predictions if p["task"] == CAPTION2BBOX]) == 6
    one = next(p for p in evaluation.predictions if p["caption"] == "a dog" and p["task"] == CAPTION2BBOX)
    assert one == {
        "id": "a",
        "source": "photos",
        "task": CAPTION2BBOX,
        "kind": "natural",
        "box": list(RIGHT),
        "caption": "a dog",
        "answer": "[0.500, 0.000, 1.000, 1.000]",
        "predicted_box": list(RIGHT),
    }


def test_wrong_and_unreadable_answers_are_counted(dataset):
    answers = {"a cat": "[0.0, 0.0, 0.5, 1.0]", "a dog": "no idea", "Total 12": "[0.9, 0.9, 0.1, 0.1]"}
    model = Scripted(
        lambda q, _: next((box for text, box in answers.items() if q.prompt.endswith(text)), "[0.5, 0, 1, 1]")
    )
    metrics = evaluate(model, Processor(), dataset, tasks=(CAPTION2BBOX,)).metrics
    assert metrics["caption2bbox_acc50"] == pytest.approx(2 / 6)  # of "a bird" one
    assert metrics["caption2bbox_unparsed"] == pytest.approx(2 / 6)
    assert metrics["natural_caption2bbox_unparsed"] == pytest.approx(1 / 4)
    assert not any("bbox2caption" in name for name in metrics)


def test_each_question_is_asked_of_its_own_image_and_an_image_stands_once_in_a_batch(dataset):
    seen = []
    ids = colours(dataset)
    model = Scripted(lambda q, colour: seen.append((ids[colour], q.answer)) or "")
    evaluate(model, Processor(), dataset, tasks=(BBOX2CAPTION,), batch_size=4)
    assert sorted(seen) == sorted((a.sample.id, a.question.answer) for a in ask(dataset, (BBOX2CAPTION,)))
    assert model.batches == [(2, 4), (2, 2)]  # the natural regions of a and c, then the text of b and d


def test_a_box_gets_the_tokens_that_its_written_form_needs(dataset):
    model = Scripted(lambda q, _: "")
    evaluate(model, Processor(), dataset, batch_size=6)
    assert model.lengths == [48, len("[0.500, 0.000, 1.000, 1.000]") + 1 + 4]


def test_blind_other_image_shows_a_derangement_within_sources(dataset):
    ids, shown = colours(dataset), set()
    owner = {a.question.answer: a.sample.id for a in ask(dataset, (BBOX2CAPTION,))}
    model = Scripted(lambda q, colour: shown.add((owner[q.answer], ids[colour])) or "")
    evaluate(model, Processor(), dataset, tasks=(BBOX2CAPTION,), blind="other_image")
    assert all(mine != other for mine, other in shown)
    assert {other for _, other in shown} == set("abcd")  # each image is shown once
    pages = set("bd")
    assert sum((mine in pages) != (other in pages) for mine, other in shown) == 2  # the cycle's seams
    samples = {i: dataset[i] for i in range(len(dataset))}
    first, again = other_images(samples), other_images(samples)
    assert all(first[i] is not sample and first[i] is again[i] for i, sample in samples.items())


def test_rows_that_share_an_id_are_shown_each_with_its_own_picture(gran_rows):
    names = ["a", "b", "c"]
    rows = gran_rows([(name, [(LEFT, f"thing {name}", "natural")]) for name in names])
    twins = GranDataset(rows.remove_columns("id").add_column("id", ["same"] * 3))
    colour = {tuple(twins[i].image[0, 0].tolist()): f"thing {name}" for i, name in enumerate(names)}
    model = Scripted(lambda q, shown: colour[shown])
    assert evaluate(model, Processor(), twins, tasks=(BBOX2CAPTION,)).metrics["bbox2caption_exact"] == 1
    blind = evaluate(model, Processor(), twins, tasks=(BBOX2CAPTION,), blind="other_image")
    assert blind.metrics["bbox2caption_exact"] == 0


def test_blind_text_shows_nothing(dataset):
    model = Scripted(lambda q, colour: "a cat" if colour is None else q.answer)
    metrics = evaluate(model, Processor(), dataset, blind="text").metrics
    assert metrics["bbox2caption_exact"] == pytest.approx(1 / 6)


def test_the_model_is_asked_in_eval_mode_and_left_as_it_was(dataset):
    model = Scripted(lambda q, _: "").train()
    evaluate(model, Processor(), dataset)
    assert model.modes == {False} and model.training
    evaluate(model.eval(), Processor(), dataset)
    assert not model.training


@pytest.mark.parametrize("ranks", [2, 4, 50])
def test_ranks_share_the_questions_and_find_what_one_finds(dataset, ranks):
    """Also more ranks than there are questions: the ones without any take part in the gathering."""

    def answer(question, colour):
        return question.prompt[-20:]

    alone = evaluate(Scripted(answer), Processor(), dataset)
    parts = []

    def send(own):
        parts.append(own)
        return [alone.predictions]

    for rank in range(ranks):
        evaluate(Scripted(answer), Processor(), dataset, rank=rank, ranks=ranks, gather=send)
    assert sum(map(len, parts)) == len(alone.predictions) and (ranks < 50 or [] in parts)
    for rank in range(ranks):
        joined = evaluate(Scripted(answer), Processor(), dataset, rank=rank, ranks=ranks, gather=lambda own: parts)
        assert joined == alone


def test_a_limit_and_faulty_rows(gran_rows):
    names = [str(i) if i != 4 else "broken" for i in range(10)]
    rows = gran_rows([(name, [(LEFT, f"thing {name}", "natural")]) for name in names])
    dataset = GranDataset(rows, fault_budget=0.5)
    evaluation = evaluate(Scripted(lambda q, _: q.answer), Processor(), dataset, limit=5)
    assert sorted({p["id"] for p in evaluation.predictions}) == ["0", "2", "6", "8"]
    assert dataset.faults.counts == {"image": 1}


def test_bad_arguments(dataset, gran_rows):
    model = Scripted(lambda q, _: "")
    with pytest.raises(ValueError, match="blind must be None, 'other_image' or 'text', got 'image'"):
        evaluate(model, Processor(), dataset, blind="image")
    with pytest.raises(ValueError, match="nothing to ask: none of 0 rows"):
        evaluate(model, Processor(), GranDataset(gran_rows([])))
    one = GranDataset(gran_rows([("a", [(LEFT, "a cat", "natural")])]))
    with pytest.raises(ValueError, match="at least 2 images, the dataset has 1"):
        evaluate(model, Processor(), one, blind="other_image")
