"""pack_patches' bicubic filter, Pillow's rounding, crops of resized images and merged patches, on every backend."""

import math

import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F
from emulated_packing import Emulated
from guard_pages import exit_code, guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from granvit_kernels import backends, native, pack_patches, unpack_patches
from granvit_kernels.ops.patch_packing import CANDIDATES, cpu
from granvit_kernels.ops.patch_packing.arguments import check_packing

PILLOW = int(PIL.__version__.split(".")[0])
RESAMPLES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
ROUNDS = ["pil", "pil13"] if PILLOW >= 13 else ["pil"]
"""Pillow 13 can do either, a pass at a time, its predecessors only theirs."""
ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

needs_native = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


BACKENDS = [*(pytest.param(name, marks=needs_native) for name in ("cpu", "cuda")), "reference"]
"""The CUDA kernel emulated."""


def force(name, monkeypatch):
    monkeypatch.setitem(CANDIDATES["pack_patches"], "cuda", Emulated())
    monkeypatch.setenv(backends.VARIABLE, f"pack_patches={name}")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    force(request.param, monkeypatch)
    return request.param


def noise(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed + 7919 * height + width)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)


def pixels_of(image, p, **options):
    """What pack_patches makes of one crop: float32 [H, W, 3] in 0-255."""
    chosen = {name: options.pop(name, default) for name, default in (("order", "hwc"), ("merge", 1))}
    patches, layout = pack_patches([image], p, ZERO, ONE, dtype=torch.float32, **chosen, **options)
    return unpack_patches(patches, layout, p, ZERO, ONE, **chosen)[0]


def by_pillow(image, box, size, resample, round):
    """uint8 [H, W, 3]: the box resized to (height, width) by the Pillow installed here, a pass at a time if need be."""
    (x1, y1, x2, y2), (height, width), filter_ = box, size, RESAMPLES[resample]
    left, top, right, bottom = math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)
    window = Image.fromarray(image.numpy()).crop((left, top, right, bottom))
    if (round == "pil13") == (PILLOW >= 13):
        made = window.resize((width, height), filter_, (x1 - left, y1 - top, x2 - left, y2 - top))
    else:
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


@settings(max_examples=60, deadline=None)
@given(case=resizes(), order=st.sampled_from(["hwc", "chw"]), round=st.sampled_from(ROUNDS))
@pytest.mark.parametrize("name", BACKENDS)
def test_rounded_pixels_are_pillows_bit_for_bit(name, case, order, round):
    image, p, merge, box, grid, resample = case
    with pytest.MonkeyPatch.context() as patch:
        force(name, patch)
        options = dict(order=order, merge=merge, resample=resample, round=round)
        pixels = pixels_of(image, p, crops=[(0, *box)], grids=[grid], **options)
    assert (pixels.round() - pixels).abs().max() < 1e-4
    expected = by_pillow(image, box, (grid[0] * p, grid[1] * p), resample, round)
    assert torch.equal(pixels.round().to(torch.uint8), expected)


@pytest.mark.parametrize("size", [(60, 45), (300, 30), (20, 170)])
def test_bicubic_is_torchs_antialiased_interpolate(backend, size):
    image = (noise(90, 70) > 127).to(torch.uint8) * 255
    planes = image[4:81, 3:70].permute(2, 0, 1)[None].double()
    expected = F.interpolate(planes, size=size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    grid = (size[0] // 5, size[1] // 5)
    pixels = pixels_of(image, 5, crops=[(0, 3, 4, 70, 81)], grids=[grid], resample="bicubic")
    assert (pixels.double() - expected).abs().max() < 0.01
    assert expected.min() < 0 and expected.max() > 255  # nothing is clipped


@pytest.mark.parametrize("round", [None, "pil", "pil13"])
@pytest.mark.parametrize("resample", RESAMPLES)
def test_crops_of_resized_images_are_parts_of_them(backend, resample, round):
    """Of every backend's own: shrunk, enlarged, as it is along one side, and as it is along both."""
    p, images = 4, [noise(90, 40), noise(13, 17), noise(32, 50), noise(24, 28)]
    sizes = [(36, 24), (40, 52), (32, 20), (24, 28)]
    cuts = [(0, 3, 5, 19, 33), (1, 0, 11, 40, 23), (2, 7, 0, 15, 32), (3, 5, 3, 17, 15), (0, 0, 0, 24, 36)]
    options = dict(resample=resample, round=round)
    parts, layout = pack_patches(images, p, ZERO, ONE, cuts, dtype=torch.float32, sizes=sizes, **options)
    assert layout.grids.tolist() == [[7, 4], [3, 10], [8, 2], [3, 3], [9, 6]]
    for part, (i, left, top, right, bottom) in zip(unpack_patches(parts, layout, p, ZERO, ONE), cuts, strict=True):
        whole = pixels_of(images[i], 1, grids=[sizes[i]], **options)
        assert (part - whole[top:bottom, left:right]).abs().max() < 1e-4


@pytest.mark.parametrize("order", ["hwc", "chw"])
def test_merged_patches_lie_block_by_block(backend, order):
    images, grids = [noise(40, 60), noise(33, 20)], [(6, 4), (2, 8)]
    options = dict(patch_size=3, mean=ZERO, std=ONE, grids=grids, dtype=torch.float32, order=order)
    plain, layout = pack_patches(images, **options)
    merged, same = pack_patches(images, **options, merge=2)
    assert torch.equal(same.grids, layout.grids)
    for grid, image, blocks in zip(grids, layout.split(plain), merged.split([h * w for h, w in grids]), strict=True):
        starts = [(y, x) for y in range(0, grid[0], 2) for x in range(0, grid[1], 2)]
        expected = [image[y + i, x + j] for y, x in starts for i in (0, 1) for j in (0, 1)]
        assert torch.equal(blocks, torch.stack(expected))
    pictures = unpack_patches(merged, layout, 3, ZERO, ONE, order, merge=2)
    for found, expected in zip(pictures, unpack_patches(plain, layout, 3, ZERO, ONE, order), strict=True):
        assert torch.equal(found, expected)


def test_grids_are_chosen_in_whole_blocks():
    images = [noise(39, 60), noise(3, 16)]
    assert pack_patches(images, 4, ZERO, ONE, merge=2)[1].grids.tolist() == [[8, 14], [2, 4]]


BAD = {
    "filter": (dict(resample="lanczos"), "resample is 'lanczos'; it takes 'bilinear' or 'bicubic'"),
    "filters": (dict(resample=["bicubic"]), r"resample is \['bicubic'\]; it takes 'bilinear'"),
    "roundings": (dict(round=[]), r"round is \[\]; it takes None, 'pil'"),
    "rounding": (dict(round="PIL"), "round is 'PIL'; it takes None, 'pil' or 'pil13'"),
    "merge": (dict(merge=0), "merge is 0"),
    "odd grid": (dict(merge=2, grids=[(2, 3)]), r"grids\[0\] is \[2, 3\]; with merge=2 it takes multiples of 2"),
    "sizes of another": (dict(sizes=[(8, 8), (8, 8)]), r"sizes has 2 rows; it takes 1, one \(height, width\) an image"),
    "half a pixel": (dict(sizes=[(8.5, 8)]), r"sizes\[0\] is \[8.5, 8.0\]; it takes whole numbers of pixels"),
    "crop outside": (dict(sizes=[(8, 8)], crops=[(0, 0, 0, 12, 8)]), r"x2 <= 8 and 0 <= y1 < y2 <= 8"),
    "cut off": (
        dict(sizes=[(9, 8)]),
        r"crops\[0\] is .* with the grid \[2, 2\]; it takes whole pixels, .* multiple of 4",
    ),
    "resized again": (
        dict(sizes=[(8, 8)], grids=[(1, 1)]),
        "with the grid .* it takes whole pixels, as many as the grid",
    ),
    "between": (dict(sizes=[(9, 9)], crops=[(0, 0.5, 0, 8.5, 8)]), "it takes whole pixels"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_arguments_are_named(fault):
    change, message = BAD[fault]
    with pytest.raises(ValueError, match=message):
        pack_patches(**{**dict(images=[noise(10, 12)], patch_size=4, mean=ZERO, std=ONE), **change})


def test_unpack_names_grids_that_are_not_in_blocks():
    patches, layout = pack_patches([noise(12, 16)], 4, ZERO, ONE)
    with pytest.raises(ValueError, match=r"layout has the grids .*\(3, 4\).*; with merge=2 it takes multiples of 2"):
        unpack_patches(patches, layout, 4, ZERO, ONE, merge=2)


def rounded_problem(image_of=noise):
    """Passes of every kind, over several rows of patches."""
    images = [image_of(61, 47), image_of(250, 90), image_of(16, 33)]
    crops = [(0, 0, 0, 47, 61), (1, 3.5, 2, 90, 250), (2, 0, 0, 33, 16), (2, 9, 0, 33, 16), (1, 5, 0, 29, 250)]
    grids = [(4, 6), (10, 8), (4, 4), (4, 6), (6, 6)]
    return dict(images=images, patch_size=4, mean=ZERO, std=ONE, crops=crops, grids=grids, resample="bicubic", merge=2)


@needs_native
@pytest.mark.parametrize("round", ["pil", "pil13"])
def test_rounded_bits_are_equal_on_any_number_of_threads(round, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "pack_patches=cpu")
    threads = torch.get_num_threads()
    try:
        outputs = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            outputs.append(pack_patches(**rounded_problem(), round=round)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@needs_native
@pytest.mark.parametrize("at_end", [True, False])
def test_the_cpu_kernel_reads_nothing_but_images(at_end):
    """Each lies right before, or after, a page that ends the process."""

    def image_of(height, width):
        image = guarded((height, width, 3), torch.uint8, at_end)
        image.copy_(noise(height, width))
        return image

    def pack_all():
        torch.set_num_threads(1)  # a forked process has no other threads
        for round in (None, "pil", "pil13"):
            for resample in RESAMPLES:
                print(round, resample, flush=True)
                images, p, mean, std, crops, grids, _, merge = rounded_problem(image_of).values()
                options = dict(resample=resample, round=round, merge=merge)
                job = check_packing(images, p, mean, std, crops, grids, torch.float32, "hwc", **options)
                cpu.forward(job)

    assert exit_code(pack_all) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("round", [None, "pil", "pil13"])
@pytest.mark.parametrize("resample", RESAMPLES)
def test_resamples_on_a_gpu(resample, round):
    problem = rounded_problem() | dict(resample=resample, round=round, dtype=torch.float32)
    expected = pack_patches(**problem)[0]
    patches = pack_patches(**problem | {"images": [image.cuda() for image in problem["images"]]})[0].cpu()
    if round is None:
        assert (patches - expected).abs().max() * 255 < 0.01
    else:
        assert (patches - expected).abs().max() < 1e-6  # of float32's rounding: pixels are equal
