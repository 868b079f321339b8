"""model.caption, model.find and model.encode: pictures of any kind in, texts, boxes and features out."""

import numpy as np
import pytest
import torch
from PIL import Image

from granvit.model import GranViT
from granvit.model.asking import Asking
from granvit.questions.packing import pack_questions
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX, Question, describe_box, find_box, format_box

FORMS = {
    "both": {},
    "tokens": {"box_style": "tokens"},
    "text": {"box_style": "text", "box_format": "text"},
}


@pytest.fixture(scope="module", params=FORMS)
def taught(request, tiny, samples):
    """A model that has learnt the answers about four images by heart, in each form of questions."""
    model, processor = tiny(**FORMS[request.param])
    asked = [processor.questions(sample, (BBOX2CAPTION, CAPTION2BBOX)) for sample in samples]
    batch = pack_questions(samples, asked, processor, 1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(140):
        optimizer.zero_grad()
        model.answer_losses(batch, *embeds(model, batch)).mean().backward()
        optimizer.step()
    return model.eval(), processor


@pytest.fixture
def brief(tiny, monkeypatch):
    """A model that knows nothing, and says six tokens of it: without an end, it would go on to the limit."""
    model, processor = tiny()
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: generate(**{**inputs, "max_new_tokens": 6}))
    return model, processor


def embeds(model, batch):
    features, layout = model.encode(batch.images)
    regions = model.region_embeds(features, layout, batch.boxes, batch.box_image_index)
    return model.image_embeds(features, layout), regions


def test_a_taught_model_says_and_finds_what_it_was_taught(taught, samples):
    model, processor = taught
    images = [sample.image for sample in samples]
    boxes = [[region.box for region in sample.regions] for sample in samples]
    captions = [[region.caption for region in sample.regions] for sample in samples]
    right = total = 0
    for said, truths in zip(model.caption(images, boxes), captions, strict=True):
        right, total = right + sum(a == b for a, b in zip(said, truths, strict=True)), total + len(truths)
    assert right >= 0.8 * total
    right = total = 0
    for sample, answers in zip(samples, model.find(images, captions), strict=True):
        texts = [region.caption for region in sample.regions]
        for region, box in zip(sample.regions, answers, strict=True):
            if texts.count(region.caption) == 1:
                written = format_box(region.box, processor.box_format, processor.bins)
                right, total = right + (box == processor.parse_boxes([written])[0]), total + 1
    assert right >= 0.8 * total


def test_pictures_and_boxes_come_in_any_kind(brief, samples, tmp_path):
    model, _ = brief
    pixels, box = samples[0].image, samples[0].regions[0].box
    picture = Image.fromarray(pixels.numpy())
    picture.save(tmp_path / "picture.png")
    path = tmp_path / "picture.png"
    said = model.caption(pixels, [box])
    assert isinstance(said, list) and isinstance(said[0], str) and len(said) == 1
    expected, layout = model.encode([pixels])
    for image in (pixels, pixels.numpy(), picture, path, str(path), [path], pixels[None], pixels.numpy()[None]):
        features, where = model.encode(image)
        assert torch.equal(features, expected) and where.host_grids == layout.host_grids
    for image in (pixels.numpy(), picture, path, str(path)):
        assert model.caption(image, [box]) == said
    for boxes in (box, list(box), torch.tensor([box]), torch.tensor(box), np.array([box]), (box,)):
        assert model.caption(pixels, boxes) == said
    assert model.caption([pixels, path], [[box], torch.tensor([box, box])]) == [said, said * 2]
    assert model.caption(pixels, []) == [] and model.find(pixels, []) == []
    assert model.find(pixels, "a dog") == model.find(path, ["a dog"])[0] == model.find([path], [["a dog"]])[0][0]


def test_rows_do_not_depend_on_the_batch_size(brief, samples):
    model, _ = brief
    images, boxes = [s.image for s in samples], [[r.box for r in s.regions] for s in samples]
    assert model.caption(images, boxes) == model.caption(images, boxes, batch_size=3)


def test_what_is_found_is_a_relative_box_or_none(tiny, samples, monkeypatch):
    model, processor = tiny(box_format="text", box_style="text")
    said = iter(["[0.1, 0.2, 0.3, 0.4]", "a dog", "[0.5, 0.2, 0.3, 0.4]"])
    monkeypatch.setattr(processor, "decode_answers", lambda ids: [next(said) for _ in ids])
    assert model.find(samples[0].image, ["a", "b", "c"]) == [(0.1, 0.2, 0.3, 0.4), None, None]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([(12, 30, 200, 180)], r"box \[12, 30, 200, 180\] reaches outside .* pixels\? Divide x by the image's width"),
        ([(0.5, 0.1, 0.2, 0.9)], "has no area"),
        ([(0.1, 0.2, 0.3)], "has 3 numbers, not 4"),
        ([["a", 0, 0, 0]], r"box: got \['a', 0, 0, 0\], accepted are four numbers"),
        ([[(0.1, 0.2, 0.3, 0.4)]], r"box: got \[\[0.1"),
        ("here", "boxes: got 'here', accepted is a list"),
    ],
)
def test_boxes_that_cannot_be_asked_about_are_named(tiny, samples, boxes, message):
    with pytest.raises(ValueError, match=message):
        tiny()[0].caption(samples[0].image, boxes)


def test_other_wrong_input_is_named(tiny, samples, tmp_path):
    model, _ = tiny()
    image = samples[0].image
    (tmp_path / "notes.txt").write_text("no picture")
    for call, message in (
        (lambda: model.encode("nowhere.png"), r"images\[0\]: got str 'nowhere.png', and no such file"),
        (lambda: model.encode([image, tmp_path / "notes.txt"]), r"images\[1\], .*notes.txt: not an image in one of"),
        (lambda: model.encode(image / 255), r"images\[0\]: got torch.float32 .* accepted is uint8 \[H, W, 3\]"),
        (lambda: model.encode(image.permute(2, 0, 1)), r"images\[0\]: got torch.uint8 \[3, 48, 64\]"),
        (lambda: model.caption([image, image], [[]]), "boxes: got 1 lists for 2 images"),
        (lambda: model.caption([image], [(0, 0, 1, 1)]), "box: got 0"),
        (lambda: model.find(image, [" "]), "the sentence to find is empty"),
        (lambda: model.find(image, [3]), "sentence: got 3, accepted is a string"),
        (lambda: model.encode(image, torch.zeros(4)), r"crops: got tensor.*, accepted are finite numbers \[N, 5\]"),
        (lambda: model.encode(image, [(0, 0, 0, float("nan"), 9)]), "crops: got .*, accepted are finite"),
        (lambda: model.find([image], ["a dog"]), r"sentences: got \['a dog'\], accepted is a list for each of"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert model.encode(image, [])[0].shape == (0, 32)


def test_questions_in_another_models_form_are_refused(tiny, samples):
    """They would get an answer, only a bad one."""
    sample = samples[0]
    box = sample.regions[0].box
    for name, options in FORMS.items():
        _, processor = tiny(**options)
        processor(sample.image, processor.ask_what(box))
        for free in ("What is <region>?", Question(BBOX2CAPTION, "what is <region> here?", "", (box,))):
            processor(sample.image, free, boxes=[box])  # nobody's form
        for other, form in FORMS.items():
            style = {"box_style": "both", "box_format": "bins", "bins": 16} | form
            question = describe_box(box, "a dog", 0, **style)
            if name == other:
                assert processor.ask_what(box, "a dog", 0) == question
                continue
            with pytest.raises(ValueError, match="names its box by .* was taught .*; processor.ask_what"):
                processor(sample.image, question)
    _, processor = tiny()
    assert processor.ask_where("a dog", box, 1) == find_box("a dog", format_box(box, "bins", 16), 1)
    with pytest.raises(ValueError, match="names its box by region tokens and location tokens of more bins"):
        processor(sample.image, describe_box((0.1, 0.2, 0.9, 0.9), "", 0, "both", "bins", 1000))


def test_the_processor_comes_with_the_model(tiny, samples, tmp_path):
    model, processor = tiny()
    assert model.processor is processor
    model.save_pretrained(tmp_path / "export")
    processor.save_pretrained(tmp_path / "export")
    again = GranViT.from_pretrained(tmp_path / "export")
    boxes = [region.box for region in samples[0].regions]
    assert again.caption(samples[0].image, boxes) == model.caption(samples[0].image, boxes)
    assert again.processor is again.processor

    with pytest.raises(ValueError, match="is a run's folder; its model is in .*export"):
        GranViT.from_pretrained(tmp_path)
    tiny(bins=8)[1].save_pretrained(tmp_path / "export")
    with pytest.raises(ValueError, match="holds no processor of this model .*the processor has"):
        _ = GranViT.from_pretrained(tmp_path / "export").processor
    with pytest.raises(ValueError, match="bins: the processor has 8"):
        again.processor = tiny(bins=8)[1]
    with pytest.raises(ValueError, match="this model has no processor.*from_config"):
        _ = GranViT(model.config).processor
    assert issubclass(GranViT, Asking)


def test_half_precision_inputs_keep_their_boxes(tiny, samples):
    model, processor = tiny()
    box = (0.1234567, 0.2, 0.7654321, 0.9)
    for how in ((torch.bfloat16,), ("cpu", torch.bfloat16)):
        inputs = processor(samples[0].image, processor.ask_what(box)).to(*how)
        assert inputs["boxes"].dtype == torch.float32 and torch.equal(inputs["boxes"], torch.tensor([box]))
        assert inputs["images"][0].dtype == torch.uint8 and inputs["input_ids"].dtype == torch.int64
    inputs = processor(samples[0].image, processor.ask_what(box)).to("meta")
    assert inputs["boxes"].is_meta and inputs["images"][0].is_meta


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_no_questions_is_refused(tiny, size):
    model, _ = tiny()
    with pytest.raises(ValueError, match=f"batch_size: got {size}, accepted is 1 or more"):
        model.caption(torch.zeros(32, 32, 3, dtype=torch.uint8), [(0, 0, 1, 1)], batch_size=size)


@pytest.mark.parametrize("images", [None, 5])
def test_what_is_no_picture_is_named(tiny, images):
    model, _ = tiny()
    with pytest.raises(ValueError, match=f"images: got {type(images).__name__}, accepted is uint8"):
        model.caption(images, [(0, 0, 1, 1)])
