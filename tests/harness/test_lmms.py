"""GranViT as lmms-eval asks it: against stand-ins of its interface, and by the package itself where there is one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from granvit.harness import lmms_eval_manifest
from granvit.harness.wording import DESCRIBE_REGION
from granvit.model import asking
from granvit.model.images import as_pixels

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("GRANVIT_LMMS_PYTHON", sys.executable)
FIND = "Please provide the bounding box coordinate of the region this sentence describes: "


class Lmms:
    """What lmms_eval.api.model.lmms gives its subclasses."""

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cached = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *args: self.cached.append(args))

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: self._world_size)


def picture(seed, size=(40, 20)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def drawn(doc):
    """As lmms-eval marks a region: a frame in a copy of the picture."""
    image = doc["image"].copy()
    image.paste((255, 0, 0), (0, 0, 40, 1))
    return [image]


def plain(doc):
    return [doc["image"]]


@pytest.fixture
def harness(stand_in, fresh):
    stand_in("lmms_eval.api.instance", Instance=SimpleNamespace)
    stand_in("lmms_eval.api.model", lmms=Lmms)
    return fresh("granvit.harness.lmms").GranViTForLmmsEval


@pytest.fixture
def model(harness, export):
    made = harness(pretrained=export[0], device="cpu", batch_size="8")
    first, second = picture(0), picture(1)
    made.task_dict = {"refs": {"val": [
        {"image": first, "bbox": [0, 0, 20, 10]}, {"image": second}, {"image": first.copy(), "bbox": [30, 5, 10, 10]},
    ]}}  # fmt: skip
    return made


def ask(doc_id, prompt, visual=plain, **options):
    return SimpleNamespace(args=(prompt, options, visual, doc_id, "refs", "val"))


def test_answers_come_in_order_and_each_picture_is_encoded_once(model, export, monkeypatch):
    requests = [
        ask(0, FIND + "a dog"), ask(1, FIND + "a cat"), ask(2, FIND + "a bird"), ask(0, FIND + "a cow"),
        ask(2, DESCRIBE_REGION, drawn), ask(1, "What is it?"), ask(0, "And here?", lambda doc: []),
    ]  # fmt: skip
    encoded, encode = [], model.model.encode

    def count(images, *args, **kwargs):
        encoded.append(len(images))
        return encode(images, *args, **kwargs)

    monkeypatch.setattr(model.model, "encode", count)
    answers = model.generate_until(requests)
    assert sorted(encoded) == [1, 1, 2]  # one of the region, one of "What is it?", two of four sentences
    own, first, second = export[1], picture(0), picture(1)
    own.processor = export[2]
    boxes = [own.find(image, sentence) for image, sentence in [(first, "a dog"), (second, "a cat"), (first, "a bird")]]
    assert answers[:3] == [
        "[]" if box is None else "[" + ", ".join(f"{edge:.6f}" for edge in box) + "]" for box in boxes
    ]
    asked = export[2].ask_what((0.75, 0.25, 1.0, 0.75))
    assert answers[4:5] == asking.answer(own, export[2], [asked], [0], {0: as_pixels(first)}, max_new_tokens=48)
    assert [cached[2] for cached in model.cached] == answers


def test_options_reach_the_decoding(model, monkeypatch):
    seen = []

    def scripted(model, processor, questions, rows, images, batch_size, length, progress):
        seen.append((images is None, batch_size, length))
        progress(len(questions), len(questions))
        return ["<loc_0><loc_4><loc_8><loc_15> Q: more"] * len(questions)

    monkeypatch.setattr(asking, "answer", scripted)
    requests = [
        ask(0, FIND + "a dog", max_new_tokens=4, until=["Q:"]), ask(0, "why?", max_new_tokens=4, until="Q:"),
        ask(1, "what?", lambda doc: None, max_new_tokens=5, temperature=0, num_beams=1),
    ]  # fmt: skip
    box = "[0.031250, 0.281250, 0.531250, 0.968750]"
    assert model.generate_until(requests) == [box, box, f"{box} Q: more"]
    # a box is not cut short
    assert sorted(seen) == [(False, 8, 4), (False, 8, 48), (True, 8, 5)]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask(1, "compare", lambda doc: [doc["image"]] * 2), "refs, row 1 of val: the prompt shows 2 of Image; .* one"),
        (ask(1, "look", lambda doc: ["film.mp4"]), "the prompt shows 1 of str"),
        (ask(1, "say", temperature=0.7), "decodes greedily.*--gen_kwargs temperature=0"),
        (ask(1, "say", num_beams=3), "decodes greedily"),
        (ask(1, FIND), "refs, row 1 of val: the sentence to find is empty"),
    ],
)
def test_what_it_cannot_do_names_task_and_row(model, request_, message):
    with pytest.raises((NotImplementedError, ValueError), match=message):
        model.generate_until([request_])


def test_likelihoods_and_rounds_are_refused_with_the_reason(model):
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one picture a conversation"):
        model.generate_until_multi_round([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float16", "max_pixels": 3}, "got dtype, max_pixels, accepted are pretrained, device, batch_size, "),
        ({"batch_size": "auto"}, "batch_size: got 'auto'"),
        ({"precision": "int8"}, "precision: got 'int8', accepted are 'float32', 'bfloat16'"),
        ({"pretrained": "nowhere"}, "no model at nowhere"),
    ],
)
def test_wrong_arguments_are_named(harness, export, arguments, message):
    with pytest.raises(ValueError, match=message):
        harness(**{"pretrained": export[0], "device": "cpu"} | arguments)


def test_precision_is_the_weights(harness, export):
    made = harness(pretrained=export[0], device="cpu", precision="bfloat16")
    assert str(made.model.dtype) == "torch.bfloat16"


def test_the_entry_point_names_the_class(harness, stand_in):
    stand_in("lmms_eval.models.registry_v2", ModelManifest=SimpleNamespace)
    manifest = lmms_eval_manifest()
    assert manifest.model_id == "granvit"
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert (module, name) == (harness.__module__, harness.__name__)


@pytest.mark.lmms
@pytest.mark.slow
def test_lmms_eval_measures_what_granvit_eval_does(small_config, tmp_path):
    """Its own tasks, offline, on a run that has just learnt to answer with boxes, by location tokens."""
    if subprocess.run([PYTHON, "-c", "import lmms_eval"], capture_output=True).returncode:
        pytest.skip("needs lmms-eval; GRANVIT_LMMS_PYTHON names the Python of an environment that has it")
    sys.path.insert(0, str(ROOT / "bench"))
    import refcoco

    from granvit.data.loader import GranDataset
    from granvit.eval.evaluation import evaluate
    from granvit.eval.loading import load_model
    from granvit.train.run import train

    longer = replace(small_config.warmup, steps=80, learning_rate=3e-3)
    config = replace(small_config, output=str(tmp_path / "run"), warmup=longer)
    train(config)
    work = tmp_path / "lmms-eval"
    work.mkdir()
    data = GranDataset(config.data.path, "test")
    evaluation = evaluate(*load_model(config.output), data, limit=3)
    rows = refcoco.compare(PYTHON, config.output, evaluation, data, 3, work)
    assert [row["task"] for row in rows] == ["refcoco_bbox_rec", "refcoco_grounding", "refcoco_bbox"]
    for row in rows:
        assert row["equal_answers"] == row["questions"] > 0
    for name, value in rows[0]["measures"].items():
        assert value["lmms_eval"] == pytest.approx(value.get("granvit", value["lmms_eval"]), abs=1e-6), name
    for value in rows[1]["measures"].values():  # which scores the better of two readings of a box
        assert value["lmms_eval"] >= value.get("granvit", 0) - 1e-6
    cider = rows[2]["measures"]["CIDEr"]
    assert cider["lmms_eval"] == pytest.approx(cider["granvit"], abs=1e-6)
    assert rows[0]["measures"]["IoU"]["lmms_eval"] > 0  # else every answer would be wrong by either
