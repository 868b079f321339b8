"""Boxes told in one step: the same as token by token, and no coordinate sees another."""

from dataclasses import replace

import pytest
import torch

from granvit.model import GranViT, GranViTConfig
from granvit.model.asking import answer
from granvit.questions.packing import pack_questions
from granvit.questions.prompts import CAPTION2BBOX


@pytest.fixture
def parallel(tiny):
    model, processor = tiny(box_style="tokens", parallel_boxes=True)
    model.projector.scale.fill_(0.3)
    return model.eval(), processor


def questions(processor, samples):
    return [(i, q) for i, sample in enumerate(samples) for q in processor.questions(sample, (CAPTION2BBOX,))]


def test_one_pass_tells_what_generate_tells_step_by_step(parallel, samples):
    model, processor = parallel
    images, asked = zip(*questions(processor, samples), strict=True)
    inputs = processor([sample.image for sample in samples], list(asked), image_index=images)
    assert not inputs["attention_mask"].all(), "rows of several lengths"
    text = model.config.text_vocab
    # Location tokens alone may be chosen in both.
    stepwise = model.generate(**inputs, max_new_tokens=4, suppress_tokens=list(range(text)))
    boxes = model.generate_boxes(**inputs)
    assert boxes.shape == (len(asked), 4) and len(boxes.unique()) > 1
    assert torch.equal(boxes, stepwise)
    shown = {i: sample.image for i, sample in enumerate(samples)}
    told = []
    said = answer(model, processor, asked, images, shown, batch_size=3, progress=lambda now, of: told.append((now, of)))
    assert said == ["".join(f"<loc_{i}>" for i in row) for row in (boxes - text).tolist()]
    assert told[-1] == (len(asked), len(asked))


def test_a_coordinate_is_not_told_those_before_it(parallel, samples):
    model, processor = parallel
    sample, asked = samples[0], processor.questions(samples[0], (CAPTION2BBOX,))[:1]
    other = [replace(asked[0], answer="<loc_1><loc_2><loc_3><loc_4>")]
    first, second = (model.forward_packed(pack_questions([sample], [q], processor, 200)).logits for q in (asked, other))
    assert torch.equal(first, second)


def test_it_is_learnt_and_comes_back_from_a_folder(parallel, samples, tmp_path):
    model, processor = parallel
    batch = pack_questions(samples, [processor.questions(s, (CAPTION2BBOX,)) for s in samples], processor, 300)
    model.forward_packed(batch).loss.backward()
    assert model.locations.input.shape == (1, model.config.text_config.hidden_size)
    assert model.locations.input.grad.abs().max() > 0, "what stands for a coordinate learns"
    model.save_pretrained(tmp_path)
    again = GranViT.from_pretrained(tmp_path).eval()
    assert again.config.parallel_boxes
    with torch.no_grad():
        torch.testing.assert_close(again.forward_packed(batch).logits, model.forward_packed(batch).logits)


def test_it_needs_boxes_as_region_tokens_and_bins(tiny, samples):
    for box_style, box_format in (("text", "bins"), ("both", "bins"), ("tokens", "text")):
        with pytest.raises(ValueError, match="parallel_boxes.*'tokens' and 'bins'"):
            GranViTConfig(box_style=box_style, box_format=box_format, parallel_boxes=True)
    model, processor = tiny(box_style="tokens")
    with pytest.raises(ValueError, match="token by token"):
        model.generate_boxes(**processor(samples[0].image, processor.ask_where("a ball")))
