"""GranViT called as a transformers model: a processor's output in, logits, loss, hidden states and cache out."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from granvit.model import GranViT
from granvit.model.prompted import CACHE
from granvit.questions.packing import pack_questions
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX

TASKS = (BBOX2CAPTION, CAPTION2BBOX)
VARIANTS = {
    "bins": {},
    "text": {"box_format": "text", "box_style": "text"},
    "shuffle": {"pixel_shuffle": 2, "region_tokens": 3, "box_style": "tokens"},
}


def rows(processor, samples, tasks=TASKS):
    """Every question of the samples, one a row."""
    asked = [(i, q) for i, sample in enumerate(samples) for q in processor.questions(sample, tasks)]
    images = [i for i, _ in asked]
    return processor([sample.image for sample in samples], [q for _, q in asked], image_index=images)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_its_logits_are_those_that_generate_chooses_by(tiny, samples, name):
    model, processor = tiny(**VARIANTS[name])
    model.projector.scale.fill_(0.3)
    inputs = rows(processor, samples)  # of several lengths, so padded
    assert not inputs["attention_mask"].all()
    logits = model(**inputs).logits
    made = model.generate(**inputs, max_new_tokens=3, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(logits[:, -1], made.logits[0], rtol=0, atol=1e-5)
    black = model(**{**inputs, "images": [image * 0 for image in inputs["images"]]}).logits
    assert (black[:, -1] - logits[:, -1]).abs().max() > 1e-3, "the pictures are seen"
    assert logits.shape == (*inputs["input_ids"].shape, model.config.image_token_id), "a column a row of the tables"


@torch.no_grad()
def test_it_goes_on_from_its_cache(tiny, samples):
    """Token by token through the cache, and all at once: the same logits."""
    model, processor = tiny()
    inputs = rows(processor, samples[:2])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    made = model.generate(**inputs, **options)
    out, mask = model(**inputs, use_cache=True), inputs["attention_mask"]
    for step in range(3):
        tokens = made.sequences[:, step : step + 1]
        mask = torch.cat((mask, torch.ones_like(tokens)), 1)
        out = model(tokens, mask, **{("past_key_values", CACHE)[step % 2]: getattr(out, CACHE)})
        torch.testing.assert_close(out.logits[:, -1], made.logits[step + 1], rtol=0, atol=1e-5)
    whole = torch.cat((inputs["input_ids"], made.sequences[:, :3]), 1)
    whole = model(**{**inputs, "input_ids": whole, "attention_mask": mask}, use_cache=False)
    torch.testing.assert_close(whole.logits[:, -1], out.logits[:, -1], rtol=0, atol=1e-5)
    assert getattr(whole, CACHE) is None


def supervised(processor, samples):
    """(inputs, labels) of questions followed by their answers, labels at the answers alone."""
    asked = [(i, q) for i, sample in enumerate(samples) for q in processor.questions(sample, TASKS)]
    inputs = rows(processor, samples)
    answers = processor.answer_ids([q.answer for _, q in asked])
    width = max(map(len, answers))
    ids = torch.tensor([a + [processor.tokenizer.pad_token_id] * (width - len(a)) for a in answers])
    mask = torch.tensor([[1] * len(a) + [0] * (width - len(a)) for a in answers])
    labels = torch.cat((torch.full_like(inputs["input_ids"], -100), ids.masked_fill(mask == 0, -100)), 1)
    inputs["input_ids"] = torch.cat((inputs["input_ids"], ids), 1)
    inputs["attention_mask"] = torch.cat((inputs["attention_mask"], mask), 1)
    return inputs, labels


@pytest.mark.parametrize("name", VARIANTS)
def test_labels_give_the_loss_that_packs_give(tiny, samples, name):
    model, processor = tiny(**VARIANTS[name])
    inputs, labels = supervised(processor, samples)
    packed = model.forward_packed(
        pack_questions(samples, [processor.questions(s, TASKS) for s in samples], processor, 10_000)
    )
    out = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, packed.loss, rtol=1e-5, atol=1e-6)
    scored = labels[:, 1:] != -100
    expected = F.cross_entropy(out.logits[:, :-1][scored], labels[:, 1:][scored])
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    items = 7
    halved = model(**inputs, labels=labels, num_items_in_batch=items).loss
    torch.testing.assert_close(halved, expected * int(scored.sum()) / items, rtol=1e-5, atol=1e-6)
    short = model(**inputs, labels=labels, num_items_in_batch=items, skip_logits=True)
    assert short.logits is None
    torch.testing.assert_close(short.loss, halved, rtol=1e-5, atol=1e-6)
    out.loss.backward()
    assert model.encoder.embeddings.patch_embedding.weight.grad.abs().max() > 0
    model.zero_grad()
    nothing = torch.full_like(labels, -100)
    nothing[:, 0] = labels.max()  # which no token comes before
    for count, skip in ((None, False), (0, False), (None, True)):
        loss = model(**inputs, labels=nothing, num_items_in_batch=count, skip_logits=skip).loss
        loss.backward()
        assert loss == 0 and not model.encoder.embeddings.patch_embedding.weight.grad.any()
    model.double()
    wide, skipped = (model(**inputs, labels=labels, skip_logits=skip).loss for skip in (False, True))
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, skipped)


@torch.no_grad()
def test_hidden_states_tuples_and_fewer_logits(tiny, samples):
    model, processor = tiny()
    inputs = rows(processor, samples[:1])
    out = model(**inputs, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.text_config.num_hidden_layers + 1
    torch.testing.assert_close(model.logits(out.hidden_states[-1]), out.logits)
    assert model(**inputs).hidden_states is None and model(**inputs).attentions is None
    loss, logits = model(**inputs, labels=torch.full_like(inputs["input_ids"], 5), return_dict=False, use_cache=False)
    assert loss.dim() == 0 and torch.equal(logits, out.logits)
    for keep, places in ((2, [-2, -1]), (torch.tensor([0, 3]), [0, 3])):
        torch.testing.assert_close(model(**inputs, logits_to_keep=keep).logits, out.logits[:, places])
    embeds = model._prompt_embeds(**{k: v for k, v in inputs.items() if k != "attention_mask"}, features=None)
    again = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(again, out.logits)
    hidden = model.encode(inputs.pop("images"))
    assert torch.equal(model(**inputs, features=hidden).logits, out.logits)
    assert torch.equal(model(inputs["input_ids"], **{k: inputs[k] for k in ("attention_mask", "boxes", "image_index")},
                             features=hidden).logits, out.logits)  # fmt: skip


@torch.no_grad()
def test_attentions_want_eager(tiny, samples, tmp_path):
    model, processor = tiny()
    inputs = rows(processor, samples[:1])
    with pytest.raises(ValueError, match="output_attentions: needs .*attn_implementation='eager'"):
        model(**inputs, output_attentions=True)
    model.save_pretrained(tmp_path)
    eager = GranViT.from_pretrained(tmp_path, attn_implementation="eager")
    out = eager(**inputs, output_attentions=True)
    length = inputs["input_ids"].shape[1]
    assert out.attentions[0].shape[2:] == (length, length)
    torch.testing.assert_close(out.logits[:, -1], model(**inputs).logits[:, -1], rtol=0, atol=1e-4)


def test_packs_go_in_as_they_did(tiny, samples):
    model, processor = tiny()
    batch = pack_questions(samples, [processor.questions(s, TASKS) for s in samples], processor, 10_000)
    expected = model.forward_packed(batch)
    for out in (model(batch), model(batch=batch)):
        assert torch.equal(out.loss, expected.loss) and torch.equal(out.logits, expected.logits)


def change(**options):
    return lambda inputs, model: {**inputs, **options}


def ids_with(place, name):
    def changed(inputs, model):
        ids = inputs["input_ids"].clone()
        ids[0, place] = getattr(model.config, name) if isinstance(name, str) else name
        return {**inputs, "input_ids": ids}

    return changed


WRONG = {
    "no pictures": (change(images=None), r"images: none given, but the prompts hold \d+ image tokens"),
    "no boxes": (change(boxes=None), "boxes: got 0, but the prompts hold 2 region tokens"),
    "a box too many": (change(boxes=torch.rand(3, 4)), "boxes: got 3, but the prompts hold 2 region tokens"),
    "an image marker too many": (ids_with(-1, "image_token_id"), "images: they give 12 tokens of image 0 for row 0"),
    "a region marker too many": (ids_with(-1, "region_token_id"), "boxes: got 2, but the prompts hold 3 region tokens"),
    "pictures that no marker asks for": (
        lambda inputs, model: {**inputs, "input_ids": inputs["input_ids"].clamp(max=300), "boxes": None},
        r"images: they give 12 tokens of image 0 for row 0, but its prompt holds 0 image tokens",
    ),
    "features too": (
        lambda inputs, model: {**inputs, "features": model.encode(inputs["images"])}, "images, features: give one",
    ),
    "an image that is not there": (change(image_index=torch.tensor([0, 1])), r"image_index: got \[0, 1\]"),
    "an id that is none": (ids_with(-1, 10_000), r"input_ids: got 1 to 10000, accepted are 0 to \d+"),
    "a negative id": (ids_with(-1, -100), "input_ids: got -100 to"),
    "boxes in half precision": (
        lambda inputs, model: {**inputs, "boxes": inputs["boxes"].bfloat16()},
        "boxes: got torch.bfloat16 .* half precision would round",
    ),
    "boxes in pixels": (change(boxes=torch.tensor([[3.0, 4, 30, 40]] * 2)), r"boxes\[0\]: got \[3.0, .* of pixels"),
    "boxes that are no numbers": (change(boxes=torch.full((2, 4), torch.nan)), r"boxes\[0\]: got \[nan"),
    "a mask of another length": (change(attention_mask=torch.ones(2, 3)), r"attention_mask: got \[2, 3\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_belong_together_is_named(tiny, samples, name):
    model, processor = tiny()
    changed, message = WRONG[name]
    region = samples[0].regions[0].box
    inputs = processor(samples[0].image, [processor.ask_what(region), processor.ask_what((0.1, 0.2, 0.6, 0.9), "")])
    inputs = changed(inputs, model)
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    if "mask" not in name:
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, max_new_tokens=1)


@torch.no_grad()
def test_other_wrong_arguments_are_named(tiny, samples):
    model, processor = tiny()
    inputs = processor(samples[0].image, ["What?"])
    ids, embeds = inputs["input_ids"], torch.zeros(1, 4, 48)
    unknown = ("pixel_values", "token_type_ids", "labelz")
    for call, error, message in (
        *((lambda name=name: model(**inputs, **{name: ids}), TypeError, name) for name in unknown),
        (lambda: model.generate(**inputs, pixel_values=ids), ValueError, "pixel_values"),
        (lambda: model.generate(**inputs, labels=ids), TypeError, "generate takes no labels"),
        (lambda: model(**inputs, skip_logits=True), ValueError, "skip_logits: needs labels"),
        (lambda: model(), ValueError, "input_ids, inputs_embeds: give one"),
        (lambda: model(ids, inputs_embeds=embeds), ValueError, "input_ids, inputs_embeds: give one"),
        (lambda: model(inputs_embeds=embeds, images=inputs["images"]), ValueError, "images: need input_ids"),
        (lambda: model(ids), ValueError, "images: none given"),
        (lambda: model(**inputs, labels=ids), ValueError, r"labels: got \d+ \(<image>\), accepted are 0 to"),
        (lambda: model(**inputs, labels=ids[:, 1:]), ValueError, "labels: got"),
        (lambda: model(**inputs, labels=ids * 0, logits_to_keep=1), ValueError, "logits_to_keep=0"),
        (lambda: model(**inputs, cache=1, past_key_values=1), ValueError, "two names of one thing"),
        (lambda: model.resize_token_embeddings(9), NotImplementedError, r"resize_token_embeddings\(9\).*from_parts"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


@torch.no_grad()
def test_text_alone_is_the_llms_own(tiny, samples):
    model, processor = tiny()
    inputs = processor(None, ["What?", "Where is it then?"])
    own = model.llm(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        model(**inputs).logits[..., : model.config.text_vocab][keep], own[keep], rtol=0, atol=1e-5
    )
