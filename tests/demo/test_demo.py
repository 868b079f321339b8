"""The demo's page, without a browser as far as that goes, and in a headless Chromium."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from granvit.demo import __main__ as command
from granvit.demo.subject import load_subject
from granvit.toy.tiny import TinyLLM, TinyVision, build_tiny
from granvit.train.build import build, random_encoder
from granvit.train.presets import Model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny untrained model, its encoder in encoder/."""
    torch.manual_seed(0)
    size = {"width": 32, "layers": 1, "heads": 2, "mlp": 32}
    made, processor = build_tiny(["a red circle"], TinyVision(**size), TinyLLM(**size, vocab=300))
    folder = tmp_path_factory.mktemp("demo") / "model"
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    made.save_encoder(folder / "encoder")
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)).save(path)
    return path


def test_an_encoder_by_itself_has_maps_alone(model, picture):
    subject = load_subject(model / "encoder")
    assert subject.model is None and "no language model" in subject.title and "--before" in subject.comparison
    shown = subject.open(str(picture))
    assert list(subject.encoders) == ["after"] and shown.shown.size == (640, 320) and len(shown.features) == 1


def test_before_stands_first_and_is_said(model, picture):
    subject = load_subject(model, model / "encoder")
    before, after = subject.open(str(picture)).features
    assert list(subject.encoders) == ["before", "after"] and f"Before is {model / 'encoder'};" in subject.comparison
    torch.testing.assert_close(before, after)


def test_a_random_encoder_is_the_one_that_a_run_begins_with(llm_folder):
    config = Model(llm=str(llm_folder("llama")), encoder_width=32, encoder_layers=1, encoder_heads=2)
    torch.manual_seed(3)
    ours = random_encoder(config).state_dict()
    torch.manual_seed(3)
    theirs = build(config, None)[0].encoder.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_files_that_are_no_pictures_are_refused(model, tmp_path):
    (tmp_path / "x.svg").write_text("<svg onload='alert(1)'/>")
    with pytest.raises(ValueError, match="not an image in one of the formats"):
        load_subject(model / "encoder").open(str(tmp_path / "x.svg"))


def test_without_gradio_the_command_says_how_to_install_it(model, monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main([str(model)]) == 2
    assert "pip install 'granvit[demo]'" in capsys.readouterr().err


@pytest.fixture
def served(model, monkeypatch):
    """serve(subject) -> the page's address; closed afterwards."""
    pytest.importorskip("gradio", reason="needs gradio")
    from granvit.demo.page import launch

    pages = []

    def serve(subject):
        page, url = launch(subject)
        pages.append(page)
        return url

    yield serve
    for page in pages:
        page.close()


@pytest.mark.browser
@pytest.mark.slow
def test_a_box_is_drawn_with_the_mouse_and_a_patch_clicked(served, tab, model, picture, monkeypatch):
    from granvit.demo import subject as asked

    boxes = []
    monkeypatch.setattr(asked, "caption_box", lambda *given: boxes.append(given[-1]) or "<b>a box</b>")
    tab.goto(served(load_subject(model, model / "encoder")))
    tab.set_input_files("#dropped input[type=file]", str(picture))
    surface = tab.locator("#surface img")
    surface.wait_for(timeout=60_000)
    surface.scroll_into_view_if_needed()
    frame = surface.bounding_box()
    for share, act in ((0.75, tab.mouse.down), (0.25, tab.mouse.up)):  # from the lower right corner to the upper left
        tab.mouse.move(frame["x"] + share * frame["width"], frame["y"] + share * frame["height"])
        act()
    tab.wait_for_function("document.querySelector('#caption textarea, #caption input').value == '<b>a box</b>'")
    assert boxes[0] == pytest.approx((0.25, 0.25, 0.75, 0.75), abs=0.01)

    tab.get_by_role("tab", name="Similar patches").click()
    after = tab.locator("#similar-after img")
    after.wait_for()
    shown = after.get_attribute("src")
    tab.locator("#original img").click(position={"x": 5, "y": 5})
    tab.wait_for_function(f"document.querySelector('#similar-after img').getAttribute('src') != {json.dumps(shown)}")
    assert tab.hosts == {"127.0.0.1"}


@pytest.mark.browser
@pytest.mark.slow
def test_an_encoders_page_has_no_tabs_for_a_language_model(served, tab, model):
    tab.goto(served(load_subject(model / "encoder")))
    tab.get_by_role("tab", name="Features in colours").wait_for(timeout=60_000)
    assert not tab.get_by_role("tab", name="Caption a box").count()
