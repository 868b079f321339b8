"""pack_patches beside transformers' image processors: 16 photographs of mixed size, already decoded.

Timed on both sides: the choice of each picture's grid, resize, normalisation, patches, batch. Each peer gets
the pictures in each form it takes; all of these are reported, and the figure is against the fastest.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from comparison import near_pictures
from peers import HALF
from PIL import Image
from processors import FAMILIES, Family
from torch import Tensor
from workloads import PATCH, Pictures

from granvit_kernels import fit_grid, pack_patches

PHOTOGRAPHS = Path(__file__).resolve().parents[1] / "granvit" / "data" / "sample" / "photographs"
# (width, height): what datasets and cameras deliver, from thumbnails to 3 megapixels
SIZES = [
    (640, 480), (480, 640), (640, 427), (333, 500), (1024, 768), (768, 1024), (1024, 683), (1920, 1080),
    (800, 600), (500, 375), (512, 512), (1600, 1200), (1280, 720), (500, 333), (320, 240), (2048, 1536),
]  # fmt: skip


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    files = sorted(PHOTOGRAPHS.glob("*.jpg"))[: len(SIZES)]
    return [Image.open(f).convert("RGB").resize(size) for f, size in zip(files, SIZES, strict=True)]


def processors(photographs: list[Image.Image], max_patches: int) -> dict:
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    arrays = [np.asarray(picture) for picture in photographs]
    by_pil = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=max_patches)
    calls = {
        "transformers PIL, PIL images": lambda: by_pil(photographs, return_tensors="pt"),
        "transformers PIL, arrays": lambda: by_pil(arrays, return_tensors="pt"),
    }
    if importlib.util.find_spec("torchvision") is not None:
        from transformers.models.siglip2.image_processing_siglip2 import Siglip2ImageProcessor

        fast = Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=max_patches)
        planes = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
        contiguous = [plane.contiguous() for plane in planes]
        calls["transformers torchvision, PIL images"] = lambda: fast(photographs, return_tensors="pt")
        calls["transformers torchvision, [3, H, W]"] = lambda: fast(contiguous, return_tensors="pt")
        calls["transformers torchvision, views [3, H, W]"] = lambda: fast(planes, return_tensors="pt")
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_patches", [256, 1024])
def test_pack_patches(compare, photographs, max_patches, dtype):
    images = [torch.from_numpy(np.array(picture)) for picture in photographs]
    grids = [fit_grid(*image.shape[:2], PATCH, max_patches) for image in images]

    def ours() -> Tensor:
        grids = [fit_grid(*image.shape[:2], PATCH, max_patches) for image in images]
        return pack_patches(images, PATCH, HALF, HALF, grids=grids, dtype=dtype)[0]

    peers = {
        name: lambda call=call: lambda: call()["pixel_values"]
        for name, call in processors(photographs, max_patches).items()
    }
    workload = (
        f"16 photographs of {len(set(SIZES))} sizes, 320x240 to 2048x1536, up to {max_patches} patches each"
    )
    compare(
        "pack_patches", f"forward, {str(dtype).removeprefix('torch.')}", workload, ours, peers,
        check=near_pictures(Pictures(images, grids), dtype), aims={name: ("ratio", 4) for name in peers},
    )  # fmt: skip


def near_pillow(family: Family, exact: Tensor):
    """check for `compare` of patches: ours are `exact`, those of the processor that uses Pillow. One that uses
    torchvision has other weights and an order of passes of its own: up to a dozen steps where bicubic is clipped."""

    def check(output, tolerance: float) -> None:
        patches, allowed = (output, 1e-5) if tolerance == 1 else (family.patches(output), 12 / 255 / min(family.std))
        assert patches.shape == exact.shape, f"{tuple(patches.shape)}, not {tuple(exact.shape)}"
        error = float((patches - exact).abs().max())
        assert error <= allowed, f"it is off by {error:.5f}, and {allowed:.5f} is allowed"

    return check


@pytest.mark.parametrize("name", FAMILIES)
def test_processors(compare, photographs, name):
    """Rounded as Pillow, so that the features are those of a model's own processor."""
    family = FAMILIES[name]
    images = [torch.from_numpy(np.array(picture)) for picture in photographs]
    planes = [image.permute(2, 0, 1).contiguous() for image in images]
    pillow = family.processor(pillow=True)
    calls = {"transformers PIL, PIL images": lambda: pillow(photographs, return_tensors="pt")}
    if importlib.util.find_spec("torchvision") is not None:
        fast = family.processor(pillow=False)
        calls["transformers torchvision, PIL images"] = lambda: fast(photographs, return_tensors="pt")
        calls["transformers torchvision, [3, H, W]"] = lambda: fast(planes, return_tensors="pt")
    exact = family.patches(pillow(photographs, return_tensors="pt"))
    compare(
        "pack_patches", f"forward, float32, as {name}'s processor",
        f"16 photographs of {len(set(SIZES))} sizes, 320x240 to 2048x1536",
        lambda: family.pack(images), {call: lambda run=run: run for call, run in calls.items()},
        check=near_pillow(family, exact), aims={call: ("ratio", 4) for call in calls},
    )  # fmt: skip
