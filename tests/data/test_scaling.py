"""Photographs are decoded smaller where nobody sees it, and only there."""

import io
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from granvit.data.batches import PackLoader
from granvit.data.crops import Crops
from granvit.data.loader import GranDataset
from granvit.data.scaling import SPARE, divisor
from granvit.data.schema import FEATURES, DataFault, parse_row
from granvit.questions.pictures import decode_smaller
from granvit.questions.prompts import Question
from granvit.questions.schema import Region, Sample
from granvit_kernels import pack_patches

TASKS = {"bbox2caption": 1.0, "global_caption": 1.0}


def page(width: int, height: int, form: str = "JPEG", **options) -> bytes:
    """Lines of text, the sharpest edges that there are."""
    picture = Image.new("RGB", (width, height), "white")
    pen, letters = ImageDraw.Draw(picture), "The quick brown fox jumps over the lazy dog, 0123456789. " * 4
    for line, y in enumerate(range(10, height, 40)):
        pen.text((10, y), letters[line % 50 :], "black", ImageFont.load_default(32))
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def row(width: int, height: int, box: list[float], picture: bytes) -> dict:
    region = {"box": box, "caption": "a part", "kind": "natural", "score": None}
    about = {"id": f"{width}x{height} {box}", "caption": "a page", "source": "", "licence": ""}
    return about | {"image": {"bytes": picture, "path": None}, "width": width, "height": height, "regions": [region]}


@pytest.mark.parametrize(
    ("size", "box", "crops", "expected"),
    [
        ((1600, 1200), None, None, 8),
        ((1600, 1200), (0.5, 0.5, 0.6, 0.6), None, 8),  # asked about, but there is no teacher
        ((1600, 1200), (0.0, 0.0, 1.0, 1.0), Crops(tokens=12), 8),
        ((1600, 1200), (0.1, 0.1, 0.9, 0.9), Crops(tokens=12), 4),
        ((1600, 1200), (0.5, 0.5, 0.6, 0.6), Crops(tokens=12), 1),
        ((1600, 1200), (0.5, 0.5, 0.6, 0.6), Crops(tokens=12, ocr=False), 1),
        ((1604, 1200), None, None, 4),
        ((1601, 1200), None, None, 1),
        ((64, 48), None, None, 1),
    ],
)
def test_a_picture_is_as_large_as_the_closest_look_at_it_needs(tiny, size, box, crops, expected):
    processor = tiny(max_image_tokens=12)[1]
    width, height = size
    regions = (Region(box or (0.0, 0.0, 0.1, 0.1), "a part", "natural"),)
    sample = Sample("", torch.zeros((), dtype=torch.uint8).expand(height, width, 3), "", regions, "", "")
    asked = [Question("bbox2caption", "", "", region=0)] if box else []
    assert divisor(sample, lambda: asked, crops, processor) == expected
    if expected > 1:
        smaller = replace(sample, image=sample.image[: height // expected, : width // expected])
        assert processor.image_tokens(*smaller.image.shape[:2]) == processor.image_tokens(height, width)
        if crops:
            assert crops.grid(smaller, 0, processor) == crops.grid(sample, 0, processor)


def test_what_comes_of_a_smaller_picture_is_the_same_but_for_rounding():
    content, half = page(1536, 1152), (0.5, 0.5, 0.5)
    for number in (2, 4, 8):
        smaller, size = decode_smaller(content, number)
        assert smaller.size == (1536 // number, 1152 // number) and size == (1536, 1152)
        differences = {}
        for spare in (1, SPARE):
            grid = torch.tensor([[1152 // number // spare // 8, 1536 // number // spare // 8]])
            pictures = [torch.from_numpy(np.array(picture)) for picture in (decode_smaller(content, 1)[0], smaller)]
            whole, ours = (pack_patches([p], 8, half, half, grids=grid, dtype=torch.float32)[0] for p in pictures)
            differences[spare] = (whole - ours).abs().mean().item() * 127.5
        assert differences[SPARE] < min(2, differences[1] / 4), (number, differences)


def test_other_pictures_are_decoded_whole_and_faults_stay_faults():
    turned = Image.Exif()
    turned[0x0112] = 6
    smaller, size = decode_smaller(page(160, 120, exif=turned), 4)
    assert smaller.size == (30, 40) and size == (120, 160)
    for content in (page(160, 120, "PNG"), page(162, 120)):
        assert decode_smaller(content, 8)[0].size == decode_smaller(content, 8)[1]
    with pytest.raises(DataFault, match="are 1280x960, the image is 160x120"):
        parse_row(row(1280, 960, [0, 0, 1, 1], page(160, 120)), divisor=lambda _: 8)
    with pytest.raises(DataFault, match="truncated"):
        parse_row(row(160, 120, [0, 0, 1, 1], page(160, 120)[:2000]), divisor=lambda _: 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_decodes_large_photographs_smaller(tiny, workers):
    processor = tiny(max_image_tokens=12)[1]
    boxes = [[0, 0, 1, 1], [0.4, 0.4, 0.5, 0.5]]
    rows = [row(1600, 1200, boxes[i % 2], page(1600, 1200)) for i in range(2)]
    data = GranDataset(datasets.Dataset.from_list([r | {"id": str(i)} for i, r in enumerate(rows)], features=FEATURES))
    options = {"capacity": 400, "packs": 2, "epochs": 1, "workers": workers}

    def sizes(tasks: dict[str, float], crops: Crops | None) -> dict[str, tuple[int, int]]:
        batches = list(PackLoader(data, processor, tasks, crops=crops, **options))
        for batch in batches:
            x2, y2 = batch.crops[:, 3], batch.crops[:, 4]
            image = [batch.samples[int(i)].image.shape for i in batch.crops[:, 0]]
            assert all(x <= shape[1] and y <= shape[0] for x, y, shape in zip(x2, y2, image, strict=True))
        return {sample.id: tuple(sample.image.shape[:2]) for batch in batches for sample in batch.samples}

    assert sizes(TASKS, None) == {"0": (150, 200), "1": (150, 200)}
    assert sizes({"bbox2caption": 1.0}, Crops(tokens=12)) == {"0": (150, 200), "1": (1200, 1600)}
