import numpy as np
import pytest
import torch
from PIL import Image

from granvit.model.processing import as_pixels
from granvit.questions.pictures import decode_image
from granvit.questions.prompts import describe_box

BOX = (0.1, 0.2, 0.6, 0.9)


def image(height=40, width=60):
    return torch.zeros(height, width, 3, dtype=torch.uint8)


def test_rows_are_padded_on_the_left(tiny):
    model, processor = tiny(region_tokens=2)
    out = processor([image()], ["What?", "What is <region> doing there?"], boxes=[[], [BOX]])
    ids, mask = out["input_ids"], out["attention_mask"]
    assert (ids[0, : int((mask[0] == 0).sum())] == processor.tokenizer.pad_token_id).all()
    assert mask[1].all() and mask[0].diff().min() >= 0
    for row, keep in zip(ids, mask.bool(), strict=True):
        row = row[keep]
        assert row[0] == processor.tokenizer.bos_token_id
        assert int((row == model.config.image_token_id).sum()) == processor.image_tokens(40, 60)
    assert (
        processor.tokenizer.decode(ids[1][ids[1] < model.config.text_vocab][1:])
        == "\nWhat is  doing there?\n"
    )
    assert int((ids[1] == model.config.region_token_id).sum()) == 2
    assert out["boxes"].tolist() == torch.tensor([BOX]).tolist()
    assert out["image_index"].tolist() == [0, 0]


def test_image_tokens_are_the_encoders(tiny):
    for options in ({}, {"pixel_shuffle": 2}, {"max_image_tokens": 9, "pixel_shuffle": 2}):
        model, processor = tiny(**options)
        for size in ((40, 60), (200, 30), (7, 7)):
            features = model.encode([image(*size)])
            assert len(model.image_embeds(*features)) == processor.image_tokens(*size)
            assert processor.image_tokens(*size) == model.config.image_tokens(*size)


def test_pictures_of_all_kinds():
    pixels = np.random.default_rng(0).integers(0, 255, (6, 4, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels)
    assert torch.equal(as_pixels(pixels), expected)
    assert torch.equal(as_pixels(expected), expected)
    assert torch.equal(as_pixels(Image.fromarray(pixels)), expected)
    turned = Image.fromarray(pixels)
    turned.getexif()[0x0112] = 6  # the camera was turned by a quarter
    assert torch.equal(as_pixels(turned), expected.rot90(-1, (0, 1)))
    assert as_pixels(Image.new("L", (5, 4))).shape == (4, 5, 3)


def test_pictures_are_read_as_data_sets_are():
    clear = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    grey = Image.fromarray(np.full((4, 6), 30_000, dtype=np.uint16))
    for picture, value in ((clear, 255), (grey, round(30_000 / 257))):
        assert (as_pixels(picture) == value).all()
        assert np.array_equal(as_pixels(picture).numpy(), np.array(decode_image(picture)))
    with pytest.raises(ValueError, match=r"images\[3\]: .*floating-point pixels"):
        as_pixels(Image.new("F", (6, 4)), 3)


@pytest.mark.parametrize("text", ["a <eos> b", "<bos><pad>", "<e<eos>os>", "<<e<eos>os>>", "a <image> b", "<region>"])
def test_special_tokens_of_outside_texts_are_text(tiny, text):
    model, processor = tiny()
    special = {*processor.tokenizer.all_special_ids, model.config.image_token_id, model.config.region_token_id}
    (ids,) = processor.answer_ids([text])
    assert ids[-1] == processor.tokenizer.eos_token_id and not special & set(ids[:-1])
    assert processor.decode_answers(torch.tensor([ids]))[0]  # its words are kept
    (ids,) = processor.prompt_ids([text.replace("<region>", "")])
    assert not special & set(ids)


def test_special_tokens_of_another_llm_are_text_too(tiny):
    model, processor = tiny()
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    (ids,) = type(processor)(processor.tokenizer).answer_ids(["a <|im_end|> b"])
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids


def test_markers_and_ordinary_texts_keep_their_ids(tiny):
    model, processor = tiny(region_tokens=2)
    texts = ["What is <region>, at <loc_3><loc_15>?", "a red < blue > <b>circle</b>", "<eos", "5 < 6", "Grün, 北京"]
    plain = processor.tokenizer([f"\n{t.replace('<region>', '<region><region>')}\n" for t in texts])["input_ids"]
    assert processor.prompt_ids(texts) == plain
    assert plain[0].count(model.config.region_token_id) == 2
    eos = [processor.tokenizer.eos_token_id]
    assert processor.answer_ids(texts[1:]) == [ids + eos for ids in processor.tokenizer(texts[1:])["input_ids"]]


def same(a, b):
    return a.keys() == b.keys() and all(
        all(map(torch.equal, a[key], b[key])) if key == "images" else torch.equal(a[key], b[key]) for key in a
    )


def test_one_image_and_one_question_need_no_lists(tiny):
    _, processor = tiny()
    expected = processor([image()], ["What?"])
    for one in (image(), image().numpy(), Image.fromarray(image().numpy())):
        assert same(processor(one, "What?"), expected)
    question = describe_box(BOX, box_style="both", box_format="bins", bins=16)
    assert same(processor(image(), question), processor([image()], [question]))
    expected = processor([image()], ["<region> or <region>?"], boxes=[[BOX, BOX]])
    two = torch.tensor([BOX, BOX])
    for boxes in ([BOX, BOX], two, list(two), [[BOX, BOX]], [two], two[None]):
        assert same(processor(image(), "<region> or <region>?", boxes=boxes), expected)
    assert same(processor(image(), "What?", boxes=[]), processor(image(), "What?", boxes=[[]]))


def test_boxes_are_lists_or_tensors(tiny):
    _, processor = tiny()
    asked = ["What?", "<region> or <region>?"]
    expected = processor(image(), asked, boxes=[[], [BOX, BOX]])
    assert same(processor(image(), asked, boxes=[torch.zeros(0, 4), torch.tensor([BOX, BOX])]), expected)
    assert same(processor(image(), asked, boxes=(np.zeros((0, 4)), np.array([BOX, BOX]))), expected)


@pytest.mark.parametrize("name", ["text", "return_tensors", "padding"])
def test_arguments_of_other_processors_are_refused_by_the_names_of_ours(tiny, name):
    with pytest.raises(TypeError, match=f"got {name}; accepted are images, questions .*boxes, image_index"):
        tiny()[1](image(), "What?", **{name: "pt"})


def test_a_processor_of_another_model_is_told_apart(tiny):
    model, processor = tiny()
    processor.check_config(model.config)
    for options in ({"bins": 8}, {"box_style": "text"}, {"region_tokens": 2}, {"max_image_tokens": 9}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name}: the processor has .*, the model's configuration"):
            tiny(**options)[1].check_config(model.config)
    processor.tokenizer.eos_token = "<pad>"
    with pytest.raises(ValueError, match="eos_token_id: the processor has 0, the model's configuration 2"):
        processor.check_config(model.config)


def test_answers_become_text_and_boxes(tiny):
    _, processor = tiny()
    eos = processor.tokenizer.eos_token_id
    pad = processor.tokenizer.pad_token_id
    written = processor.answer_ids(["a dog", "<loc_0><loc_4><loc_8><loc_15>"])
    assert [ids[-1] for ids in written] == [eos, eos]
    width = max(map(len, written))
    made = torch.tensor([ids + [pad] * (width - len(ids)) for ids in written])
    texts = processor.decode_answers(made)
    assert texts == ["a dog", "<loc_0><loc_4><loc_8><loc_15>"]
    assert processor.parse_boxes(texts) == [None, (0.5 / 16, 4.5 / 16, 8.5 / 16, 15.5 / 16)]
    _, processor = tiny(box_format="text")
    assert processor.parse_boxes(["[0.1, 0.2, 0.3, 0.4]", "no"]) == [(0.1, 0.2, 0.3, 0.4), None]


def test_questions_bring_their_boxes(tiny):
    _, processor = tiny()
    out = processor([image()], [describe_box(BOX, box_style="both", box_format="bins", bins=16)])
    assert out["boxes"].tolist() == torch.tensor([BOX]).tolist()


def test_settings_survive_saving(tiny, tmp_path):
    from granvit.model import GranViTProcessor

    _, processor = tiny(
        box_format="text", box_style="both", region_tokens=3, pixel_shuffle=2, max_image_tokens=25
    )
    processor.save_pretrained(tmp_path)
    again = GranViTProcessor.from_pretrained(tmp_path)
    for name in (
        "patch_size",
        "max_image_tokens",
        "pixel_shuffle",
        "region_tokens",
        "box_style",
        "box_format",
        "bins",
    ):
        assert getattr(again, name) == getattr(processor, name), name
    prompt = "What is <region>?\nIt's 12:45."
    assert again.prompt_ids([prompt]) == processor.prompt_ids([prompt])


@pytest.mark.parametrize(
    "images, questions, options, message",
    [
        ([image()], [" "], {}, r"questions\[0\]: got ' '"),
        ([image()], [7], {}, r"questions\[0\]: got 7"),
        ([image()], ["a <image>"], {}, r"questions\[0\]: <image> stands in the prompt"),
        ([image()], ["a <region>"], {}, r"questions\[0\]: 1 <region> markers, but 0 boxes"),
        ([image()], ["a"], {"boxes": [[BOX]]}, r"questions\[0\]: 0 <region> markers, but 1 boxes"),
        ([image()], ["a"], {"boxes": []}, "boxes: got 0 lists of boxes for 1 questions"),
        ([image()], ["<region>"], {"boxes": [[(0.5, 0.5, 0.5, 0.9)]]}, r"boxes\[0\]\[0\]: .* has no area"),
        (
            [image()],
            ["<region>"],
            {"boxes": [[(0.5, 0.5, 1.5, 0.9)]]},
            r"boxes\[0\]\[0\]: .* outside the image",
        ),
        ([image()], ["<region>"], {"boxes": [[(0, 0, 1, float("nan"))]]}, r"boxes\[0\]\[0\]: .* not finite"),
        ([image().float()], ["a"], {}, r"images\[0\]: got torch.float32 \[40, 60, 3\], accepted is uint8"),
        ([image()[0]], ["a"], {}, r"images\[0\]: got torch.uint8 \[60, 3\]"),
        (["x.png"], ["a"], {}, r"images\[0\]: got str"),
        ("x.png", "a", {}, r"images\[0\]: got str"),
        (image()[..., 0], "a", {}, r"images\[0\]: got torch.uint8 \[40, 60\]"),
        (image(), ["<region>"], {"boxes": BOX}, r"boxes: got \[0.1, .* accepted is a list of boxes"),
        (image(), "<region>", {"boxes": BOX}, r"boxes: got \[0.1, .* accepted is a list of boxes"),
        (image(), ["<region>"], {"boxes": [BOX]}, r"boxes\[0\]\[0\]: got 0.1, accepted is relative xyxy"),
        (image(), ["<region>"], {"boxes": "0.1 0.2 0.6 0.9"}, "boxes: got 0.1 0.2 0.6 0.9, accepted"),
        (image(), "<region>", {"boxes": ["0.1 0.2 0.6 0.9"]}, r"boxes: got \['0.1 0.2 0.6 0.9'\], accepted"),
        (image(), "<region>", {"boxes": [["0.1"] * 4]}, r"boxes\[0\]\[0\]: got \['0.1', .* four numbers"),
        (image(), "<region>", {"boxes": [[0.1, 0.2, 0.6]]}, r"boxes\[0\]\[0\]: .* has 3 numbers"),
        ([image(0, 4)], ["a"], {}, r"images\[0\]: got an empty image"),
        ([image()] * 2, ["a"] * 3, {}, "image_index: needed where 3 questions are asked of 2 images"),
        ([image()] * 2, ["a"] * 2, {"image_index": [0, 2]}, r"image_index: got \[0, 2\]"),
        ([image()] * 2, ["a"] * 2, {"image_index": [0]}, r"image_index: got \[0\]"),
    ],
)
def test_faults_are_named(tiny, images, questions, options, message):
    with pytest.raises(ValueError, match=message):
        tiny()[1](images, questions, **options)


def test_a_tokenizer_of_another_model_is_refused(tiny):
    from granvit.model import GranViTProcessor
    from granvit.toy.tiny import train_tokenizer

    model, _ = tiny()
    with pytest.raises(ValueError, match="is this the LLM's own tokenizer"):
        GranViTProcessor.from_config(model.config, train_tokenizer(["some other words"] * 3, 300))
    with pytest.raises(ValueError, match="lacks <image> or <region>"):
        GranViTProcessor(train_tokenizer(["some other words"] * 3, 300))
