"""pack_patches reproduces the image processors that models were trained with, on every backend."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_packing import Emulated
from PIL import Image

from granvit_kernels import backends, native
from granvit_kernels.ops.patch_packing import CANDIDATES

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))  # bench/*.py import one another
from processors import FAMILIES  # noqa: E402

SIZES = {"astronaut": (150, 120), "coffee": (90, 131), "flower": (70, 160), "dogs": (300, 280), "camera": (231, 80)}
"""(width, height): enlarged and shrunk, wide and tall."""

needs_native = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


@pytest.fixture(scope="module")
def pictures():
    files = {name: ROOT / "granvit" / "data" / "sample" / "photographs" / f"{name}.jpg" for name in SIZES}
    return [Image.open(files[name]).convert("RGB").resize(size) for name, size in SIZES.items()]


@pytest.fixture(params=[*(pytest.param(name, marks=needs_native) for name in ("cpu", "cuda")), "reference"])
def backend(request, monkeypatch):
    """Each backend; the CUDA kernel emulated."""
    monkeypatch.setitem(CANDIDATES["pack_patches"], "cuda", Emulated())
    monkeypatch.setenv(backends.VARIABLE, f"pack_patches={request.param}")
    return request.param


def steps(family, difference):
    """Of values in 8-bit steps, by channel: [T, patch**2 * 3] reshaped."""
    per_channel = torch.tensor(family.std) * 255
    hwc = family.arguments([]).get("order") is None
    return difference.abs().unflatten(1, (-1, 3) if hwc else (3, -1)) * (per_channel if hwc else per_channel[:, None])


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_processor_that_uses_pillow(backend, pictures, name):
    family = FAMILIES[name]
    expected = family.patches(family.processor(pillow=True)(pictures, return_tensors="pt"))
    patches = family.pack([torch.from_numpy(np.array(picture)) for picture in pictures])
    assert patches.shape == expected.shape
    assert (patches - expected).abs().max() < 1e-6  # of float32's rounding; a step is 0.014 or more
    assert steps(family, patches).max() > 50  # there is something to see


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
@pytest.mark.parametrize("name", FAMILIES)
def test_is_a_step_or_two_from_the_processor_that_uses_torchvision(pictures, name):
    """Its weights have 15 bits: some pixels round otherwise, along the rows and then once more down the columns."""
    family = FAMILIES[name]
    images = [torch.from_numpy(np.array(picture)) for picture in pictures]
    theirs = family.processor(pillow=False)([image.permute(2, 0, 1) for image in images], return_tensors="pt")
    difference = steps(family, family.pack(images, round="pil") - family.patches(theirs))
    assert difference.max() < 2.01 and (difference > 0.5).float().mean() < 0.01
