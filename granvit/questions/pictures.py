"""Pictures from files and bytes that nobody vouches for: decoded, upright and RGB, or a `DataFault`."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, UnidentifiedImageError
from PIL import Image as PILImage

from .schema import DataFault

PILImage.init()  # else open(formats=...) knows only the five most common ones

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""The image formats that are read; Pillow's other decoders see no use and much hostile input."""

MAX_PIXELS = 64_000_000
"""Images with more pixels than this are refused before they are decoded (decompression bombs)."""

MIN_SIDE, MAX_ASPECT = 4, 100.0
"""An image with a shorter side, or a longer one against its short side, shows nothing and breaks patch
grids."""

_TURNS = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""


def decode_image(image: Any, max_pixels: int = MAX_PIXELS) -> PILImage.Image:
    """An encoded image ({"bytes", "path"} or bytes) or a PIL image as an RGB PIL image, oriented as EXIF
    says.

    Transparency is laid on white; 16-bit images are scaled to 8 bits. Raises DataFault of kind `image`
    (missing, of a format not in `FORMATS`, broken or truncated), `image_pixels` or `image_shape`.
    """
    return decode_smaller(image, 1, max_pixels)[0]


def decode_smaller(image: Any, divisor: int, max_pixels: int = MAX_PIXELS) -> tuple[PILImage.Image, tuple[int, int]]:
    """`decode_image`'s picture, and the width and height that it has whole. A JPEG whose sides are multiples of
    `divisor` (1, 2, 4 or 8) is made so many times smaller along both while it is decoded, in less time and memory."""
    if isinstance(image, PILImage.Image):
        opened = image
    else:
        try:
            opened = PILImage.open(_image_file(image), formats=FORMATS)
        except UnidentifiedImageError:  # its own text holds an address in memory
            raise DataFault("image", f"not an image in one of the formats {', '.join(FORMATS)}") from None
        except (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError) as error:
            raise DataFault("image", f"can't be opened: {error}") from None
    check_shape(*opened.size, max_pixels)
    try:
        width, height = opened.size
        smaller = 1
        if divisor > 1 and opened is not image and width % divisor == height % divisor == 0:
            # Other formats do nothing and return None.
            smaller = divisor if opened.draft(None, (width // divisor, height // divisor)) else 1
        opened.load()  # a TIFF is turned by this, and then has no orientation any more
        # ImageOps.exif_transpose writes all of EXIF anew too, and fails where any other tag of it is damaged.
        turn = _TURNS.get(opened.getexif().get(ExifTags.Base.Orientation))
        picture = _to_rgb(opened if turn is None else opened.transpose(turn))
        return picture, (picture.width * smaller, picture.height * smaller)
    # Pillow's decoders raise these and more on hostile files; one bad file must not end a run.
    except (
        OSError,
        ValueError,
        SyntaxError,
        TypeError,
        IndexError,
        KeyError,
        OverflowError,
        EOFError,
        struct.error,
    ) as error:
        raise DataFault("image", f"can't be decoded: {error}") from None


def check_shape(width: int, height: int, max_pixels: int) -> None:
    """Raises DataFault of kind `image_pixels` or `image_shape` for a picture of this size."""
    if width * height > max_pixels:
        raise DataFault("image_pixels", f"{width}x{height} is more than the limit of {max_pixels} pixels")
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise DataFault(
            "image_shape", f"{width}x{height}: sides must be >= {MIN_SIDE} and their ratio <= {MAX_ASPECT:g}"
        )


def _image_file(image: Any) -> io.BytesIO | str:
    if isinstance(image, bytes):
        return io.BytesIO(image)
    if isinstance(image, Mapping):
        if image.get("bytes") and isinstance(image["bytes"], bytes):
            return io.BytesIO(image["bytes"])
        if image.get("path") and isinstance(image["path"], str):
            if not os.path.isfile(image["path"]):  # to open a FIFO or a device could take for ever
                raise DataFault("image", f"path must be that of a regular file, got {image['path']!r}")
            return image["path"]
    raise DataFault("image", f"image must be encoded bytes or a path, got {type(image).__name__} without either")


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    key_colour = image.info.get("transparency")  # of a picture without an alpha channel
    if image.mode == "RGB" and key_colour is None:
        return image
    if image.mode == "F":
        raise DataFault("image", "floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16-bit greys; Pillow's own conversion to 8 bits clips instead of scaling
        grey = np.asarray(image).astype(np.float64)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataFault("image", "grey values outside 16 bits have no known range")
        if isinstance(key_colour, int):
            grey[grey == key_colour] = 65535
        return PILImage.fromarray(np.rint(grey / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or key_colour is not None:
        image = image.convert("RGBA")
        white = PILImage.new("RGBA", image.size, (255, 255, 255, 255))
        return PILImage.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
