"""pack_patches' bicubic filter, Pillow's rounding, crops of resized images and merged patches, on every backend."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from granvit_kernels import backends, native, pack_patches, unpack_patches

RESAMPLES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

needs_native = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


@pytest.fixture(params=[pytest.param("cpu", marks=needs_native), "reference"])
def backend(request, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, f"pack_patches={request.param}")
    return request.param


def noise(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed + 7919 * height + width)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)


def pixels_of(image, p, **options):
    """What pack_patches makes of one crop: float32 [H, W, 3] in 0-255."""
    chosen = {name: options.pop(name, default) for name, default in (("order", "hwc"), ("merge", 1))}
    patches, layout = pack_patches([image], p, ZERO, ONE, dtype=torch.float32, **chosen, **options)
    return unpack_patches(patches, layout, p, ZERO, ONE, **chosen)[0]


def by_pillow(image, box, size, resample):
    """uint8 [H, W, 3]: the box resized to (height, width), along the rows first, as in every Pillow before 13."""
    (x1, y1, x2, y2), (height, width), filter_ = box, size, RESAMPLES[resample]
    left, top, right, bottom = math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)
    window = Image.fromarray(image.numpy()).crop((left, top, right, bottom))
    wide = window.resize((width, bottom - top), filter_, (x1 - left, 0, x2 - left, bottom - top))
    made = wide.resize((width, height), filter_, (0, y1 - top, width, y2 - top))
    return torch.from_numpy(np.array(made))


@st.composite
def resizes(draw):
    """A picture, its patches and a crop of it: enlarged, shrunk or as it is along each side; fractions in eighths, as
    Pillow holds them in float32."""
    height, width = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)) | st.sampled_from([(3, 500), (333, 40)]))
    image = noise(height, width, draw(st.integers(0, 9)))
    if draw(st.booleans()):
        image = (image > 127).to(torch.uint8) * 255  # overshoots with bicubic, and ties
    p, merge = draw(st.sampled_from([1, 3, 7, 14, 16])), draw(st.sampled_from([1, 2]))

    def side(length):
        a, b = sorted(draw(st.tuples(st.integers(0, length - 1), st.integers(1, length))))
        part = draw(st.sampled_from([(0, length), (a, b + (a == b)), (a, b + 1)]))
        if draw(st.booleans()):
            return part[0] + draw(st.integers(0, 3)) / 8, min(part[1], length) - draw(st.integers(0, 4)) / 8
        return part[0], min(part[1], length)

    (x1, x2), (y1, y2) = side(width), side(height)
    grid = [merge * draw(st.integers(1, 3)) for _ in range(2)]
    if y2 - y1 >= p * merge and draw(st.booleans()):  # nothing to do down the columns
        grid[0] = int(y2 - y1) // (p * merge) * merge
        y2 = y1 + grid[0] * p
    return image, p, merge, (x1, y1, x2, y2), grid, draw(st.sampled_from(list(RESAMPLES)))


@settings(max_examples=80, deadline=None)
@given(case=resizes(), order=st.sampled_from(["hwc", "chw"]))
@pytest.mark.parametrize("name", [pytest.param("cpu", marks=needs_native), "reference"])
def test_rounded_pixels_are_pillows_bit_for_bit(name, case, order):
    image, p, merge, box, grid, resample = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.VARIABLE, f"pack_patches={name}")
        options = dict(order=order, merge=merge, resample=resample, round="pil")
        pixels = pixels_of(image, p, crops=[(0, *box)], grids=[grid], **options)
    assert (pixels.round() - pixels).abs().max() < 1e-4
    assert torch.equal(pixels.round().to(torch.uint8), by_pillow(image, box, (grid[0] * p, grid[1] * p), resample))
