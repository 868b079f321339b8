"""evaluate() with a model whose answers are scripted."""

import copy
import pickle
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from weakref import WeakSet

import datasets
import pytest
import torch
from scripted import FirstPixel, TextProcessor
from torch.nn.functional import one_hot

from granvit.data.loader import GranDataset
from granvit.data.schema import CHAT_FEATURES
from granvit.errors import Failed
from granvit.eval import evaluate
from granvit.eval.chat import score_chat
from granvit.eval.evaluation import ask, other_images, portions, readable
from granvit.model import GranViTProcessor
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX, questions
from granvit.world import World

NO_PICTURE = {"image": None, "width": None, "height": None}
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


class Inputs(dict):
    def to(self, device):
        return self


class Processor(TextProcessor):
    """Stands for GranViTProcessor: hands questions through to the scripted model."""

    def questions(self, sample, tasks, shared=False):
        return questions(sample, tasks, shared=shared)

    def __call__(self, questions, image_sizes, image_index):
        return Inputs(questions=questions, image_index=image_index)


class Scripted(FirstPixel, torch.nn.Module):
    """Answers by a function of a question and the colour of its image's first pixel (None without an
    image)."""

    device = torch.device("cpu")
    config = SimpleNamespace(parallel_boxes=False)

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.batches = []
        self.modes = set()
        self.lengths = []
        self.encoded = []

    def encode(self, images):
        features, layout = super().encode(images)
        self.encoded += map(tuple, features.tolist())
        return features, layout

    def generate(self, questions, image_index, features, max_new_tokens, do_sample):
        self.batches.append((0 if features is None else len(features[0]), len(questions)))
        self.modes.add(self.training)
        self.lengths.append(max_new_tokens)
        colours = [None] * len(questions)
        if features is not None:
            colours = [tuple(features[0][i].tolist()) for i in image_index]
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
    asked = ask(dataset, (BBOX2CAPTION,), readable(dataset, range(4)))
    assert sorted(seen) == sorted((a.truth["id"], a.question.answer) for a in asked)
    assert model.batches == [(2, 4), (2, 2)]  # the natural regions of a and c, then the text of b and d


def test_a_box_gets_the_tokens_that_its_written_form_needs(dataset):
    model = Scripted(lambda q, _: "")
    evaluate(model, Processor(), dataset, batch_size=6)
    assert model.lengths == [48, len("[0.500, 0.000, 1.000, 1.000]") + 1 + 4]


def test_blind_other_image_shows_a_derangement_within_sources(dataset):
    ids, shown = colours(dataset), set()
    owner = {a.question.answer: a.truth["id"] for a in ask(dataset, (BBOX2CAPTION,), readable(dataset, range(4)))}
    model = Scripted(lambda q, colour: shown.add((owner[q.answer], ids[colour])) or "")
    evaluate(model, Processor(), dataset, tasks=(BBOX2CAPTION,), blind="other_image")
    assert all(mine != other for mine, other in shown)
    assert {other for _, other in shown} == set("abcd")  # each image is shown once
    pages = set("bd")
    assert all((mine in pages) == (other in pages) for mine, other in shown)


@pytest.mark.parametrize(
    ("sizes", "strangers"), [([3] * 100, 0), ([1] * 300, 300), ([2, 3, 1], 2), ([1, 1, 4], 2), ([1, 1], 2), ([5], 0)]
)
def test_another_image_is_of_the_same_source_where_that_has_one(sizes, strangers):
    """Of the only image of a source it is another such image, or where there is none, one of the largest source."""
    names = [name for name, size in enumerate(sizes) for _ in range(size)]
    sources = {row: str(names[row]) for row in random.Random(1).sample(range(len(names)), len(names))}
    shown = other_images(sources)
    assert shown == other_images(sources) and sorted(shown) == sorted(shown.values()) == sorted(sources)
    assert all(row != other for row, other in shown.items())
    assert sum(sources[row] != sources[other] for row, other in shown.items()) == strangers


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
    failing = Scripted(lambda q, _: 1 / 0).train()
    with pytest.raises(ZeroDivisionError):
        evaluate(failing, Processor(), dataset)
    assert failing.training


class Ranks:
    """So many threads that work as ranks."""

    def __init__(self, number):
        self.number, self.barrier, self.values = number, Barrier(number, timeout=60), {}

    def run(self, work):
        """work(world) on each, in their order: what it returned, or the error that it raised."""

        class Rank(World):
            def gather(world, value):
                self.values[world.rank] = pickle.dumps(value)
                self.barrier.wait()
                values = [pickle.loads(self.values[i]) for i in range(self.number)]
                self.barrier.wait()
                return values

        def of(rank):
            try:
                return work(Rank(rank, self.number))
            except (ValueError, Failed) as error:
                return error

        with ThreadPoolExecutor(self.number) as pool:
            return list(pool.map(of, range(self.number)))


class Watched(GranDataset):
    """Knows which rows' pictures were opened, and how many of them were there at a time."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.opened, self.most, self.alive = [], 0, WeakSet()

    def read(self, index, drop, decode=True):
        sample = super().read(index, drop, decode)
        if decode:
            self.opened.append(index)
            self.alive.add(sample.image)
            self.most = max(self.most, len(self.alive))
        return sample


@pytest.fixture
def many(gran_rows):
    """many() -> a data set of 40 pictures, the same each time; pictures 5, 6 and 30 are broken, and a box of 7's."""
    rows = []
    for i in range(40):
        kind, source = (("natural", "photos"), ("ocr", "pages"))[i % 3 == 1]
        boxes = [((0.0, 0.0, 0.5, (1 + k) / 10), f"thing {i} {k % 2}", kind) for k in range(1 + i % 4)]
        boxes += [((0.0, 0.0, 1.5, 1.0), "outside", kind)] if i == 7 else []
        rows.append(("broken" if i in (5, 6, 30) else "i" * (i + 1), boxes, source))  # each of another colour
    return lambda **options: Watched(gran_rows(rows), **{"fault_budget": 0.5} | options)


def spelt(question, colour):
    return f"{colour} {question.prompt[-20:]}"


@pytest.mark.parametrize("ranks", [2, 3, 50])
@pytest.mark.parametrize("blind", [None, "other_image", "text"])
def test_ranks_share_the_images_and_find_what_one_finds(many, ranks, blind):
    """Also more ranks than there are portions: those without any take part in the gathering."""
    alone_data, alone_model = many(), Scripted(spelt)
    alone = evaluate(alone_model, Processor(), alone_data, blind=blind, batch_size=8)
    datasets, models = [many() for _ in range(ranks)], [Scripted(spelt) for _ in range(ranks)]

    def work(world):
        model, data = models[world.rank], datasets[world.rank]
        return evaluate(model, Processor(), data, blind=blind, batch_size=8, world=world)

    results = Ranks(ranks).run(work)
    assert all(result == alone for result in results)
    assert {str(data.faults.counts) for data in datasets} == {str(alone_data.faults.counts)} != {"Counter()"}
    assert sorted(batch for model in models for batch in model.batches) == sorted(alone_model.batches)
    encoded = [colour for model in models for colour in model.encoded]
    assert len(encoded) == len(set(encoded)) == (0 if blind == "text" else 37)
    opened = Counter(row for data in datasets for row in data.opened)  # of broken pictures nothing is opened
    assert len(opened) == 37 and set(opened.values()) == {1 if blind == "text" else 2}
    assert all(data.most <= 9 for data in (alone_data, *datasets))  # eight regions, and one that is read


def test_portions_are_of_whole_images_and_one_kind(many):
    asked = list(ask(many(), (BBOX2CAPTION, CAPTION2BBOX), [row for row in range(40) if row not in (5, 6, 30)]))
    parts = list(portions(asked, 4))
    assert sorted(i for part in parts for i in part) == list(range(len(asked)))
    rows = [{asked[i].row for i in part} for part in parts]
    assert sum(map(len, rows)) == 37
    assert max(Counter(asked[i].question.task for i in part).most_common()[0][1] for part in parts) == 4
    kinds = [{asked[i].truth["kind"] for i in part} for part in parts]
    assert sum(len(kind) > 1 for kind in kinds) <= 1


def test_some_questions_are_spread_over_tasks_and_images(many):
    data = many()
    some = evaluate(Scripted(spelt), Processor(), data, questions=12, batch_size=8).predictions
    asked = {int(p["caption"].split()[1]) for p in some}
    assert set(data.opened) == asked, "of the others no picture is opened"
    assert Counter(p["task"] for p in some) == {BBOX2CAPTION: 5, CAPTION2BBOX: 5}, "one each is of a broken picture"
    assert len(asked) >= 5


def test_the_fault_budget_holds_over_all_ranks(many):
    """Three broken pictures and a box of a fourth, on different ranks, are too many together, and each rank says so."""

    def work(world):
        data = many(fault_budget=0.09)  # three rows
        return evaluate(Scripted(spelt), Processor(), data, world=world)

    errors = Ranks(3).run(work)
    assert len({str(error) for error in errors}) == 1
    assert "4 of 40 rows have faults" in str(errors[0]) and "the fault budget allows 3" in str(errors[0])


def test_what_fails_on_one_rank_is_said_on_all(many):
    """A picture that is gone when it is asked about."""
    rows = readable(many(), range(40))

    def work(world):
        data = many(fault_budget=1.0)
        if world.rank == 1:
            data.rows = data.rows.map(lambda row: {"image": {"bytes": b"gone", "path": None}})
        return evaluate(Scripted(spelt), Processor(), data, batch_size=4, rows=rows, world=world)

    first, second, third = Ranks(3).run(work)
    assert isinstance(second, ValueError) and "could be read before and can't be now" in str(second)
    assert isinstance(first, Failed) and f"rank 1 failed (ValueError: {second})" == str(first) == str(third)


@pytest.mark.parametrize("blind", [None, "other_image"])
def test_ranks_share_conversations_and_find_what_one_finds(saved, gran_rows, blind):
    """One of them without a picture, one with a broken one."""
    talk = [{"role": role, "content": text} for role, text in (("user", "What is it?"), ("assistant", "A picture."))]
    rows = gran_rows([(name, []) for name in ("a", "bb", "broken", "cccc", "ddddd", "e")])
    rows = rows.cast_column("image", datasets.Image(decode=False)).map(
        lambda row: row | {"conversations": [talk, talk]} | (NO_PICTURE if row["id"] == "e" else {}),
        features=CHAT_FEATURES,
    )
    data = [Watched(rows, fault_budget=1.0) for _ in range(4)]
    processor = GranViTProcessor.from_pretrained(saved[0] / "export")

    def work(world):
        own = data[world.rank if world.ranks > 1 else 3]
        model = copy.deepcopy(saved[1])
        model.forward_packed = lambda batch: SimpleNamespace(logits=one_hot(batch.targets // 2 * 2))  # the even ones
        return score_chat(model, processor, own, 200, blind, world=world)

    one, *others = work(World()), *Ranks(3).run(work)
    assert 0 < one["chat_token_accuracy"] < 1 and all(each == pytest.approx(one) for each in others)
    assert {str(each.faults.counts) for each in data} == {"Counter({'image': 1})"}
    assert max(len(each.opened) for each in data[:3]) < len(data[3].opened)


def test_a_limit_and_faulty_rows(gran_rows):
    names = [str(i) if i != 4 else "broken" for i in range(10)]
    rows = gran_rows([(name, [(LEFT, f"thing {name}", "natural")]) for name in names])
    dataset = GranDataset(rows, fault_budget=0.5)
    evaluation = evaluate(Scripted(lambda q, _: q.answer), Processor(), dataset, limit=5)
    assert sorted({p["id"] for p in evaluation.predictions}) == ["0", "2", "6", "8"]
    assert dataset.faults.counts == {"image": 1}
    rows = readable(dataset, range(10))
    evaluation = evaluate(Scripted(lambda q, _: q.answer), Processor(), dataset, limit=3, rows=rows)
    assert sorted({p["id"] for p in evaluation.predictions}) == ["0", "3", "7"]


def test_bad_arguments(dataset, gran_rows):
    model = Scripted(lambda q, _: "")
    with pytest.raises(ValueError, match="blind must be None, 'other_image' or 'text', got 'image'"):
        evaluate(model, Processor(), dataset, blind="image")
    with pytest.raises(ValueError, match="nothing to ask: none of 0 rows"):
        evaluate(model, Processor(), GranDataset(gran_rows([])))
    one = GranDataset(gran_rows([("a", [(LEFT, "a cat", "natural")])]))
    with pytest.raises(ValueError, match="at least 2 images, the dataset has 1"):
        evaluate(model, Processor(), one, blind="other_image")
