"""GranViT as VLMEvalKit asks it: against a stand-in of its base class, and by its own reader of boxes."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from granvit.harness.wording import write_answer
from granvit.model import asking

PYTHON = os.environ.get("GRANVIT_LMMS_PYTHON", sys.executable)
FIND = "Please provide the bounding box coordinate of the region this sentence describes: <ref>a dog</ref>"


class BaseModel:
    """What VLMEvalKit's does of a message before generate_inner has it."""

    allowed_types = ["text", "image", "video"]

    def generate(self, message, dataset=None):
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)


@pytest.fixture
def model(stand_in, fresh, export):
    stand_in("vlmeval.vlm.base", BaseModel=BaseModel)
    return fresh("granvit.harness.vlmeval").GranViTForVLMEvalKit(export[0], device="cpu", max_new_tokens=7)


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    return {"type": "image", "value": str(tmp_path / "p.png")}


def test_answers_are_the_models_own(model, export, photo):
    own, processor = export[1:]
    own.processor = processor
    box = own.find(photo["value"], "a dog")
    expected = "[]" if box is None else "[" + ", ".join(f"{edge:.6f}" for edge in box) + "]"
    assert model.generate([photo, {"type": "text", "value": FIND}], "RefCOCO") == expected
    assert isinstance(model.generate([{"type": "text", "value": "say"}, {"type": "text", "value": "this"}]), str)


def test_boxes_are_relative_and_other_answers_have_their_length(model, photo, monkeypatch):
    lengths, prompts = [], []

    def scripted(model, processor, questions, rows, images, batch_size, length, progress):
        lengths.append(length)
        prompts.extend(question.prompt for question in questions)
        return ["<loc_0><loc_4><loc_8><loc_15>"]

    monkeypatch.setattr(asking, "answer", scripted)
    assert model.generate([photo, {"type": "text", "value": FIND}]) == "[0.031250, 0.281250, 0.531250, 0.968750]"
    model.generate([{"type": "text", "value": "one"}, photo, {"type": "text", "value": "two"}])
    assert lengths == [48, 7] and prompts[1] == "one\ntwo"


def test_several_pictures_are_refused(model, photo):
    with pytest.raises(NotImplementedError, match="MMMU: the prompt shows 2 pictures"):
        model.generate([photo, photo, {"type": "text", "value": "compare"}], "MMMU")


@pytest.mark.lmms
def test_refcocos_reader_reads_the_boxes(export, stand_in):
    """The package's file for RefCOCO; the rest of the package, which needs 68 others, is stood in for."""
    where = "import importlib.util as u; print(u.find_spec('vlmeval').submodule_search_locations[0])"
    package = subprocess.run([PYTHON, "-c", where], capture_output=True, text=True)
    if package.returncode:
        pytest.skip("needs ms-vlmeval, if without what it depends on, in the Python of GRANVIT_LMMS_PYTHON")
    smp = ("LMUDataRoot", "download_file", "dump", "get_intermediate_file_path", "load", "md5")
    stand_in("vlmeval.dataset.image_base", ImageBaseDataset=object)
    stand_in("vlmeval.smp", **dict.fromkeys(smp))
    file = f"{package.stdout.strip()}/dataset/refcoco.py"
    spec = importlib.util.spec_from_file_location("vlmeval.dataset.refcoco", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reader, processor = module.RefCOCODataset, export[2]

    for places in ((0, 4, 8, 15), (0, 0, 0, 0), (15, 15, 15, 15)):
        answer = "".join(f"<loc_{place}>" for place in places)
        read = reader._parse_prediction(write_answer(answer, "relative", processor))
        (box,) = processor.parse_boxes([answer])
        pixels = reader._to_absolute(read, 640, 480)
        np.testing.assert_allclose(pixels, np.multiply(box, (640, 480, 640, 480)), atol=1e-3)
    assert reader._parse_prediction(write_answer("no box", "relative", processor)) is None
