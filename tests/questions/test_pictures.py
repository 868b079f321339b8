"""Encoded pictures are decoded upright and RGB, or are faults."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from granvit.questions import pictures
from granvit.questions.pictures import decode_image
from granvit.questions.schema import DataFault


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_broken_files_are_faults():
    whole = encoded(Image.effect_noise((64, 64), 60).convert("RGB"), "JPEG")
    flipped = bytearray(encoded(Image.effect_noise((64, 64), 60)))
    flipped[len(flipped) // 2] ^= 0xFF
    for broken in (whole[: len(whole) // 2], whole[:20], bytes(flipped), b"", b"P6 9 9 255\n" + bytes(300)):
        with pytest.raises(DataFault) as caught:
            decode_image(broken)
        assert caught.value.kind == "image"


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    bomb = encoded(Image.new("1", (9000, 9000)))
    monkeypatch.setattr(pictures, "_to_rgb", lambda image: pytest.fail("decoded"))
    with pytest.raises(DataFault, match="9000x9000") as caught:
        decode_image(bomb)
    assert caught.value.kind == "image_pixels"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode):
    form = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 51400, np.uint16))  # 200 * 257
    elif mode == "1":
        image = Image.new("1", (8, 8), 1)
    else:
        image = Image.new("RGB", (8, 8), (200, 200, 200))
        image = image.quantize(4) if mode == "P" else image.convert(mode)
    decoded = decode_image(encoded(image, form))
    assert decoded.mode == "RGB"
    expected = 255 if mode == "1" else 200
    assert np.abs(np.asarray(decoded).astype(int) - expected).max() <= 3


def png(bits: int, colours: int, row: bytes, key: bytes) -> bytes:
    """A PNG of 4 x 4 pixels in equal rows, with a key colour (tRNS). colours: PNG's type, 0 grey, 2 RGB."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", 4, 4, bits, colours, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * 4)
    parts = ((b"IHDR", header), (b"tRNS", key), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("content", "row"),
    [
        (png(8, 2, bytes([255, 0, 0, 10, 20, 30, 255, 0, 1, 0, 0, 0]), struct.pack(">3H", 255, 0, 0)),
         [(255, 255, 255), (10, 20, 30), (255, 0, 1), (0, 0, 0)]),
        (png(8, 0, bytes([10, 20, 0, 255]), struct.pack(">H", 10)), [(255,) * 3, (20,) * 3, (0,) * 3, (255,) * 3]),
        (png(16, 0, struct.pack(">4H", 1000, 2570, 0, 65535), struct.pack(">H", 1000)),
         [(255,) * 3, (10,) * 3, (0,) * 3, (255,) * 3]),
    ],
    ids=["rgb", "grey", "grey16"],
)  # fmt: skip
def test_a_key_colour_is_laid_on_white(content, row):
    picture = decode_image(content)
    assert [picture.getpixel((x, 3)) for x in range(4)] == row


def test_transparency_is_laid_on_white():
    assert decode_image(encoded(Image.new("RGBA", (8, 8), (9, 9, 9, 0)))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([9, 9, 9])
    assert decode_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_floating_point_images_are_refused():
    with pytest.raises(DataFault, match="floating"):
        decode_image(encoded(Image.new("F", (8, 8), 0.5), "TIFF"))


def test_exif_orientation_is_honoured():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, :5] = 255  # the left edge becomes the top one
    decoded = np.asarray(decode_image(encoded(Image.fromarray(pixels), exif=exif)))
    assert decoded.shape == (20, 10, 3)
    assert decoded[:5].min() == 255 and decoded[5:].max() == 0


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_every_orientation_is_turned_as_pillow_does_it(form):
    pixels = Image.fromarray(np.arange(16 * 8 * 3, dtype=np.uint8).reshape(16, 8, 3))
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = encoded(pixels, form, exif=exif)
        with Image.open(io.BytesIO(turned)) as opened:
            assert np.array_equal(decode_image(turned), ImageOps.exif_transpose(opened))


@pytest.mark.filterwarnings("ignore:.*")
def test_damage_elsewhere_in_exif_is_no_reason_to_stop():
    exif = Image.Exif()
    exif[0x0112], exif[0x0100] = 6, 40
    whole = encoded(Image.new("RGB", (40, 30)), "JPEG", exif=exif)
    start = whole.index(b"Exif") + 6
    kind = whole.index(bytes([1, 0, 0, 4]), start) + 3  # an integer that becomes a text, a fraction, ...
    assert all(decode_image(whole[:kind] + bytes([k]) + whole[kind + 1 :]).size == (30, 40) for k in (1, 2, 7))
    for place, value in itertools.product(range(start, start + 50), (0, 1, 5, 255)):
        try:
            decode_image(whole[:place] + bytes([value]) + whole[place + 1 :])
        except DataFault as fault:
            assert fault.kind == "image"
