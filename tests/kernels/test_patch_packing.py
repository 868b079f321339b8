"""pack_patches and unpack_patches: the formula, the reference and the C++ kernel."""

import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulated_packing import Emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import granvit_kernels
from granvit_kernels import PackedLayout, backends, fit_grid, native, pack_patches, unpack_patches
from granvit_kernels.ops.patch_packing import CANDIDATES, cuda
from granvit_kernels.ops.patch_packing.arguments import check_packing

ROOT = Path(granvit_kernels.__file__).resolve().parents[1]
PHOTOGRAPHS = ROOT / "granvit" / "data" / "sample" / "photographs"
MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
STEPS = torch.tensor(STD, dtype=torch.float64) * 255  # values -> 8-bit steps, by channel
HALVES = (torch.bfloat16, torch.float16)


needs_native = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


@pytest.fixture(params=[*(pytest.param(name, marks=needs_native) for name in ("cpu", "cuda")), "reference"])
def backend(request, monkeypatch):
    """Each backend; the CUDA kernel emulated."""
    monkeypatch.setitem(CANDIDATES["pack_patches"], "cuda", Emulated())
    monkeypatch.setenv(backends.VARIABLE, f"pack_patches={request.param}")
    return request.param


def noise(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed + 7919 * height + width)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)


def photograph(name):
    return torch.from_numpy(np.array(Image.open(PHOTOGRAPHS / f"{name}.jpg").convert("RGB")))


def formula_weights(a, b, n):
    """design.md's sentence, a number at a time: [n, ceil(b)]."""
    s = (b - a) / n
    weights = np.zeros((n, math.ceil(b)))
    for i in range(n):
        c = a + (i + 0.5) * s
        for j in range(math.floor(a), math.ceil(b)):
            weights[i, j] = max(0.0, 1 - abs(j + 0.5 - c) / max(s, 1.0))
        weights[i] /= weights[i].sum()
    return weights


def formula(image, box, grid, p):
    """The crop's pixels, float64 [h * p, w * p, 3] in 0-255."""
    x1, y1, x2, y2 = box
    rows, columns = formula_weights(y1, y2, grid[0] * p), formula_weights(x1, x2, grid[1] * p)
    pixels = image.numpy().astype(np.float64)[: rows.shape[1], : columns.shape[1]]
    return torch.from_numpy(np.einsum("yj,xk,jkc->yxc", rows, columns, pixels, optimize=True))


def forced(name, *args, **kwargs):
    """The patches by one backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.VARIABLE, f"pack_patches={name}")
        return pack_patches(*args, **kwargs)[0]


def exact(*args, **kwargs):
    """The patches by the reference in float64."""
    return forced("reference", *args, **{**kwargs, "dtype": torch.float64})


def steps_apart(patches, expected, order="hwc"):
    """Largest difference in 8-bit steps."""
    difference = (patches.double() - expected.double()).abs()
    shape = (-1, 3) if order == "hwc" else (len(patches), 3, patches.shape[1] // 3)
    channels = difference.reshape(shape)
    scale = STEPS if order == "hwc" else STEPS[:, None]
    return float((channels * scale).max()) if channels.numel() else 0.0


CROPS = {
    "whole, smaller": ((50, 70), (0, 0, 70, 50), (2, 3)),
    "whole, larger": ((9, 7), (0, 0, 7, 9), (3, 3)),
    "whole, as it is": ((16, 24), (0, 0, 24, 16), (2, 3)),
    "integer crop, as it is": ((40, 50), (3, 5, 27, 21), (2, 3)),
    "fractional crop, same size": ((40, 50), (3.25, 5.5, 27.25, 21.5), (2, 3)),
    "rows only": ((40, 24), (0, 0, 24, 40), (2, 3)),
    "columns only": ((16, 50), (0, 0, 50, 16), (2, 3)),
    "fractional crop": ((60, 90), (10.3, 7.9, 77.7, 51.2), (3, 2)),
    "less than a pixel": ((5, 5), (2.2, 3.1, 2.9, 3.3), (2, 2)),
    "over a pixel's border": ((5, 5), (1.9, 2.9, 2.1, 3.1), (1, 2)),
    "one pixel": ((1, 1), (0, 0, 1, 1), (2, 3)),
    "wide": ((2, 700), (0.5, 0, 699.5, 2), (4, 1)),
    "tall": ((700, 2), (0, 0.5, 2, 699.5), (1, 4)),
    "to the last pixel": ((30, 30), (29, 29, 30, 30), (1, 1)),
}


@pytest.mark.parametrize("order", ["hwc", "chw"])
@pytest.mark.parametrize("case", CROPS)
def test_follows_the_formula(backend, case, order):
    size, box, grid = CROPS[case]
    image, p = noise(*size), 8
    patches, layout = pack_patches(
        [image], p, MEAN, STD, crops=[(0, *box)], grids=[grid], dtype=torch.float32, order=order
    )
    assert layout.grids.tolist() == [list(grid)]
    expected = formula(image, box, grid, p)
    (pixels,) = unpack_patches(patches, layout, p, MEAN, STD, order=order)
    assert (pixels.double() - expected).abs().max() < 0.01
    reference = exact([image], p, MEAN, STD, crops=[(0, *box)], grids=[grid], order=order)
    value = (expected / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    tiles = value.reshape(grid[0], p, grid[1], p, 3)
    tiles = tiles.permute((0, 2, 1, 3, 4) if order == "hwc" else (0, 2, 4, 1, 3))
    assert torch.allclose(reference, tiles.reshape(len(patches), -1), atol=1e-6)
    assert steps_apart(patches, reference, order) < 0.01


def test_values_of_float64_are_exact_to_float64():
    image, box = noise(33, 47), (1.5, 0.25, 46.75, 32.5)
    patches, layout = pack_patches([image], 4, (0, 0, 0), (1, 1, 1), [(0, *box)], [(3, 5)], torch.float64)
    value = formula(image, box, (3, 5), 4).reshape(3, 4, 5, 4, 3).permute(0, 2, 1, 3, 4).reshape(15, -1) / 255
    assert torch.allclose(patches, value, rtol=0, atol=1e-13)


@st.composite
def problems(draw):
    """Images of ragged sizes, crops of any kind in them, grids of any kind for those."""
    side = st.one_of(st.integers(1, 6), st.integers(1, 80), st.sampled_from([200, 333]))
    sizes = draw(st.lists(st.tuples(side, side), min_size=1, max_size=4))
    images = [noise(h, w, seed=i) for i, (h, w) in enumerate(sizes)]

    def span(length):
        if draw(st.booleans()):
            a, b = sorted(draw(st.tuples(st.integers(0, length), st.integers(0, length))))
            return (0, length) if a == b else (a, b)
        a = draw(st.floats(0, length * 0.99))
        return a, min(length, a + draw(st.floats(1e-3, 1)) * (length - a) + 1e-3)

    crops = []
    for _ in range(draw(st.integers(0, 4))):
        i = draw(st.integers(0, len(images) - 1))
        (x1, x2), (y1, y2) = span(sizes[i][1]), span(sizes[i][0])
        crops.append((i, x1, y1, x2, y2))
    crops = crops if draw(st.booleans()) else None
    count = len(images) if crops is None else len(crops)
    grid = st.tuples(st.integers(1, 5), st.integers(1, 5))
    grids = draw(st.none() | st.lists(grid, min_size=count, max_size=count))
    p = draw(st.sampled_from([1, 2, 5, 8, 14, 16]))
    layouts = [lambda x: x, lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0), lambda x: strided(x)]
    images = [draw(st.sampled_from(layouts))(image) for image in images]
    return dict(
        images=images, patch_size=p, crops=crops, grids=grids, order=draw(st.sampled_from(["hwc", "chw"]))
    )


def strided(image):
    """The same pixels inside a larger tensor."""
    height, width, _ = image.shape
    larger = torch.full((height + 3, width + 5, 3), 77, dtype=torch.uint8)
    larger[2 : 2 + height, 1 : 1 + width] = image
    return larger[2 : 2 + height, 1 : 1 + width]


@needs_native
@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_cpu_kernel_is_the_reference(problem):
    expected = exact(mean=MEAN, std=STD, **problem)
    patches, layout = pack_patches(mean=MEAN, std=STD, dtype=torch.float32, **problem)
    assert patches.shape == (layout.num_tokens, 3 * problem["patch_size"] ** 2)
    assert steps_apart(patches, expected, problem["order"]) < 0.01
    for dtype in HALVES:
        patches, _ = pack_patches(mean=MEAN, std=STD, dtype=dtype, **problem)
        plain = forced("reference", mean=MEAN, std=STD, dtype=dtype, **problem)
        assert patches.dtype == dtype
        if len(patches):
            allowed = 2 * (plain.double() - expected).abs().max()
            allowed += torch.finfo(dtype).eps * expected.abs().max()
            assert (patches.double() - expected).abs().max() <= allowed


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "multimeter", "camera"])
@pytest.mark.parametrize("grid", [(3, 4), (16, 16), (40, 37)])
def test_matches_torch_antialiased_interpolate(backend, name, grid):
    image = photograph(name)
    height, width, _ = image.shape
    boxes = [(0, 0, width, height), (17, 5, width - 30, height - 61), (3, 100, 20, 111)]
    for box in boxes:
        x1, y1, x2, y2 = box
        planes = image[y1:y2, x1:x2].permute(2, 0, 1)[None].double()
        size = (grid[0] * 16, grid[1] * 16)
        expected = F.interpolate(planes, size=size, mode="bilinear", antialias=True, align_corners=False)
        patches, layout = pack_patches([image], 16, MEAN, STD, [(0, *box)], [grid], torch.float32)
        (pixels,) = unpack_patches(patches, layout, 16, MEAN, STD)
        assert (pixels.double() - expected[0].permute(1, 2, 0)).abs().max() < 0.1


def siglip2_processors():
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    processors = {"pil": Siglip2ImageProcessorPil}
    try:
        import torchvision  # noqa: F401  what transformers' other implementation needs
    except ImportError:
        return processors
    from transformers.models.siglip2.image_processing_siglip2 import Siglip2ImageProcessor

    return {**processors, "torchvision": Siglip2ImageProcessor}


@pytest.mark.parametrize("max_patches", [64, 256, 900])
def test_matches_siglip2_processors_patches(backend, max_patches):
    names = ["astronaut", "coffee", "multimeter", "page", "flower", "dogs"]
    images = [photograph(name) for name in names] + [noise(5, 40), noise(90, 31)]
    for processor in siglip2_processors().values():
        options = dict(max_num_patches=max_patches, return_tensors="pt", input_data_format="channels_last")
        theirs = processor(patch_size=16)([image.numpy() for image in images], **options)
        grids = [fit_grid(*image.shape[:2], 16, max_patches) for image in images]
        assert theirs["spatial_shapes"].tolist() == [list(grid) for grid in grids]
        half = (0.5, 0.5, 0.5)
        patches, layout = pack_patches(images, 16, half, half, grids=grids, dtype=torch.float32)
        expected = theirs["pixel_values"][theirs["pixel_attention_mask"].bool()]
        assert patches.shape == expected.shape
        assert (patches - expected).abs().max() * 0.5 * 255 < 1.5


def mixed_problem():
    images = [noise(97, 131), noise(16, 32), noise(300, 41), noise(1, 1), photograph("chelsea")]
    crops = [
        (0, 0, 0, 131, 97),
        (1, 0, 0, 32, 16),
        (2, 1.5, 20.25, 40, 299),
        (3, 0, 0, 1, 1),
        (4, 9, 9, 57, 73),
    ]
    crops += [(4, 0.5, 0.5, 450, 299.5)]
    return dict(images=images, crops=crops, grids=[(7, 9), (1, 2), (4, 3), (1, 1), (4, 3), (20, 30)])


@needs_native
@pytest.mark.parametrize("order", ["hwc", "chw"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_bits_are_equal_over_runs_and_thread_counts(dtype, order):
    threads, outputs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7, 1):
            torch.set_num_threads(count)
            outputs.append(
                forced("cpu", patch_size=16, mean=MEAN, std=STD, dtype=dtype, order=order, **mixed_problem())
            )
    finally:
        torch.set_num_threads(threads)
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_crop_alone_gives_the_same_bits(dtype):
    problem = mixed_problem()
    together, layout = pack_patches(patch_size=16, mean=MEAN, std=STD, dtype=dtype, **problem)
    for i, (crop, grid) in enumerate(zip(problem["crops"], problem["grids"], strict=True)):
        alone, _ = pack_patches(problem["images"], 16, MEAN, STD, [crop], [grid], dtype)
        start, end = layout.cu_seqlens[i : i + 2].tolist()
        assert torch.equal(together[start:end], alone)


@needs_native
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_each_instruction_set(isa, tmp_path):
    script = """
import sys, torch
from granvit_kernels import native, pack_patches
if native.why_not() is not None: print(native.why_not()); sys.exit(3)
problem = torch.load(sys.argv[1], weights_only=True)
out = [pack_patches(dtype=d, order=o, **problem)[0]
       for d in (torch.float32, torch.bfloat16, torch.float16) for o in ("hwc", "chw")]
rounded = [pack_patches(dtype=torch.float32, resample="bicubic", round=r, **problem)[0] for r in ("pil", "pil13")]
torch.save([native.library().isa(), out, rounded], sys.argv[2])
"""
    problem = dict(patch_size=14, mean=MEAN, std=STD, **mixed_problem())
    torch.save(problem, tmp_path / "in.pt")
    command = [sys.executable, "-c", script, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    environment = {**os.environ, "GRANVIT_KERNELS_ISA": isa, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode == 3 and "this machine lacks it" in run.stdout:
        pytest.skip(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    used, outputs, rounded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert used == isa
    for round, output in zip(("pil", "pil13"), rounded, strict=True):
        assert steps_apart(output, exact(resample="bicubic", round=round, **problem)) < 0.01
    for k, output in enumerate(outputs):
        order = ("hwc", "chw")[k % 2]
        expected = exact(order=order, **problem)
        if output.dtype == torch.float32:
            assert steps_apart(output, expected, order) < 0.01
        else:  # values up to 4: half a unit in the last place
            bound = 4 * torch.finfo(output.dtype).eps / 2 + 1e-5
            assert (output.double() - expected).abs().max() <= bound


@needs_native
@pytest.mark.parametrize("order", ["hwc", "chw"])
@pytest.mark.parametrize("patch_size", [1, 7, 14, 16, 32, 80])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_cuda_kernels_tiles(dtype, patch_size, order, monkeypatch):
    """Copied and resampled crops of more than a tile and of more than a chunk of source pixels, over several launches;
    in both orders of a phase's threads, so that none waits for another."""
    p = patch_size
    images = [noise(2 * p, 3 * p + 9), noise(max(p, 40), 900), noise(5 * p, 5 * p), noise(61, 45)]
    crops = [(0, 3, 0, 3 + 3 * p, 2 * p), (1, 0.5, 1, 899, 39), (2, 0, 0, 5 * p, 5 * p), (0, 0, 0, p, p)]
    crops += [(3, 5, 0.25, 40, 60)]
    problem = dict(images=images, patch_size=p, mean=MEAN, std=STD, dtype=dtype, order=order, crops=crops)
    problem["grids"] = [(2, 3), (2, 2), (5, 5), (1, 1), (3, 4)]
    emulated = Emulated()
    monkeypatch.setitem(CANDIDATES["pack_patches"], "cuda", emulated)
    found = forced("cuda", **problem)
    monkeypatch.setattr(emulated, "backwards", True)
    assert torch.equal(forced("cuda", **problem), found)
    expected = exact(**problem)
    if dtype == torch.float32:
        assert steps_apart(found, expected, order) < 0.01
    else:  # values up to 4: half a unit in the last place
        assert (found.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps / 2 + 1e-5


@needs_native
def test_the_cuda_kernel_writes_the_layout(monkeypatch):
    monkeypatch.setitem(CANDIDATES["pack_patches"], "cuda", Emulated())
    monkeypatch.setenv(backends.VARIABLE, "pack_patches=cuda")
    grids = [(1 + i % 3, 2 + i % 2) for i in range(11)]
    layout = pack_patches([noise(30, 40)], 8, MEAN, STD, [(0, 0, 0, 40, 30)] * 11, grids)[1]
    expected = PackedLayout.from_grids(grids)
    assert torch.equal(layout.grids, expected.grids) and torch.equal(layout.cu_seqlens, expected.cu_seqlens)
    assert (layout.num_tokens, layout.max_seqlen) == (expected.num_tokens, expected.max_seqlen)


@needs_native
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_cuda_kernel_gives_cudas_reason():
    if not native.library().cuda:
        pytest.skip("built without nvcc")
    assert "no CUDA device" in cuda.why_not(torch.device("cuda"), torch.float32)
    job = check_packing([noise(8, 8)], 8, MEAN, STD, None, None, torch.float32, "hwc")
    patches, layout = cuda.empty(job)
    task, _keep = cuda.problem(job, patches, layout)
    with pytest.raises(RuntimeError, match=r"pack_patches: asking for the device failed: .* \(error \d+\)"):
        native.library().pack_patches_cuda(task, 0, 0)


def gpu_problem(device, **options):
    problem = dict(patch_size=16, mean=MEAN, std=STD, **mixed_problem()) | options
    return problem | {"images": [image.to(device) for image in problem["images"]]}


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["hwc", "chw"])
@pytest.mark.parametrize("patch_size", [7, 14, 16])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_on_a_gpu(dtype, patch_size, order):
    options = dict(patch_size=patch_size, dtype=dtype, order=order)
    found, layout = pack_patches(**gpu_problem("cuda", **options))
    expected = exact(**gpu_problem("cpu", **options))
    assert torch.equal(pack_patches(**gpu_problem("cuda", **options))[0], found)
    assert layout.grids.tolist() == [list(grid) for grid in mixed_problem()["grids"]]
    if dtype == torch.float32:
        assert steps_apart(found.cpu(), expected, order) < 0.01
    else:
        assert (found.cpu().double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps / 2 + 1e-5


@pytest.mark.gpu
def test_more_crops_than_a_launch_takes_on_a_gpu():
    crops = [(0, i % 7, 0, 20 + i % 9, 30) for i in range(1300)]
    options = dict(images=[noise(30, 40)], crops=crops, grids=[(1 + i % 3, 2) for i in range(1300)])
    found, layout = pack_patches(**gpu_problem("cuda", patch_size=4, dtype=torch.float32, **options))
    assert steps_apart(found.cpu(), exact(**gpu_problem("cpu", patch_size=4, **options))) < 0.01
    assert torch.equal(layout.cu_seqlens.cpu(), PackedLayout.from_grids(options["grids"]).cu_seqlens)


@pytest.mark.gpu
def test_never_waits_and_replays_in_a_cuda_graph():
    problem = gpu_problem("cuda", dtype=torch.float32)
    before = pack_patches(**problem)[0].clone()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            aside = pack_patches(**problem)[0]
        torch.cuda.current_stream().wait_stream(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(aside, before)
    with torch.cuda.graph(graph):
        patches, layout = pack_patches(**problem)
    for image in problem["images"]:
        image.copy_(255 - image)
    graph.replay()
    assert torch.equal(patches, pack_patches(**problem)[0]) and not torch.equal(patches, before)
    assert layout.grids.tolist() == [list(grid) for grid in mixed_problem()["grids"]]


def test_pixels_that_a_crop_does_not_touch_do_not_count(backend):
    image, other = noise(40, 60), noise(40, 60, seed=1)
    other[7:31, 11:43] = image[7:31, 11:43]
    for box in [(11, 7, 43, 31), (11.01, 7.5, 42.2, 30.9), (20, 7, 21, 31)]:
        a, b = (
            pack_patches([x], 8, MEAN, STD, [(0, *box)], [(5, 2)], torch.float32)[0] for x in (image, other)
        )
        assert torch.equal(a, b)


def test_an_integer_crop_is_the_slice_as_an_image(backend):
    image = noise(50, 40)
    crop, _ = pack_patches([image], 4, MEAN, STD, [(0, 6, 3, 33, 50)], [(5, 4)], torch.float32)
    sliced, _ = pack_patches([image[3:50, 6:33]], 4, MEAN, STD, grids=[(5, 4)], dtype=torch.float32)
    assert torch.allclose(crop, sliced, atol=1e-4)


def test_without_grids_a_side_holds_its_whole_patches(backend):
    images = [noise(47, 16), noise(3, 200), noise(1, 1)]
    _, layout = pack_patches(images, 16, MEAN, STD)
    assert layout.grids.tolist() == [[2, 1], [1, 12], [1, 1]]
    assert (
        layout.cu_seqlens.tolist() == [0, 2, 14, 15] and layout.num_tokens == 15 and layout.max_seqlen == 12
    )
    _, layout = pack_patches(images, 16, MEAN, STD, crops=[(1, 0.5, 0, 48.5, 3), (0, 0, 0.5, 16, 48.4 - 2)])
    assert layout.grids.tolist() == [[1, 3], [2, 1]]


def test_default_dtype_and_order(backend):
    patches, _ = pack_patches([noise(32, 32)], 16, MEAN, STD)
    expected = exact([noise(32, 32)], 16, MEAN, STD)
    assert patches.dtype == torch.bfloat16
    assert torch.allclose(patches.double(), expected, rtol=torch.finfo(torch.bfloat16).eps / 2, atol=1e-5)


def test_autocast_changes_nothing(backend):
    """With bfloat16 products a pixel would be half a step off."""
    options = dict(images=[noise(33, 47)], patch_size=8, mean=MEAN, std=STD, grids=[(3, 5)], dtype=torch.float32)
    expected, _ = pack_patches(**options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pack_patches(**options)[0], expected)


def test_a_patch_size_of_numpys(backend):
    expected, _ = pack_patches([noise(20, 24)], 8, MEAN, STD)
    assert torch.equal(pack_patches([noise(20, 24)], np.int64(8), MEAN, STD)[0], expected)


def test_no_images(backend):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        if backend != "reference" and dtype == torch.float64:
            continue
        for empty in (None, [], torch.zeros(0, 5)):
            patches, layout = pack_patches([], 14, MEAN, STD, crops=empty, dtype=dtype)
            assert patches.shape == (0, 588) and patches.dtype == dtype
            assert layout.num_tokens == 0 and layout.grids.shape == (0, 2)
            assert unpack_patches(patches, layout, 14, MEAN, STD) == []
    patches, layout = pack_patches([noise(9, 9)], 14, MEAN, STD, crops=[], grids=[])
    assert patches.shape == (0, 588) and layout.num_tokens == 0


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: strided(x),
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: torch.cat([x, x], 2)[:, :, :3],
    ],
    ids=["channels first", "columns first", "window", "every second column", "four channels and more"],
)
def test_strides_do_not_matter(backend, view):
    image = noise(45, 61)
    same = view(image)
    assert torch.equal(same, image) and not same.is_contiguous()
    options = dict(crops=[(0, 0, 0, 61, 45), (0, 4, 4, 20, 20)], grids=[(2, 3), (2, 2)], dtype=torch.float32)
    assert torch.equal(
        pack_patches([same], 8, MEAN, STD, **options)[0], pack_patches([image], 8, MEAN, STD, **options)[0]
    )


def test_rows_and_columns_repeated_by_expand(backend):
    row = noise(1, 30)
    tall = row.expand(20, 30, 3)
    assert torch.equal(pack_patches([tall], 4, MEAN, STD)[0], pack_patches([tall.clone()], 4, MEAN, STD)[0])


@pytest.mark.parametrize("kind", ["list", "numpy", "float32 tensor", "integer tensor"])
def test_crops_and_grids_come_in_any_host_form(backend, kind):
    crops, grids = [[0, 2, 3, 18, 19], [0, 0, 0, 20, 24]], [[1, 2], [3, 1]]
    expected, _ = pack_patches([noise(24, 20)], 8, MEAN, STD, crops, grids)
    make = {
        "list": lambda x: [tuple(row) for row in x],
        "numpy": lambda x: np.array(x, dtype=np.int16),
        "float32 tensor": lambda x: torch.tensor(x, dtype=torch.float32),
        "integer tensor": lambda x: torch.tensor(x),
    }[kind]
    assert torch.equal(pack_patches([noise(24, 20)], 8, MEAN, STD, make(crops), make(grids))[0], expected)


@pytest.mark.parametrize("order", ["hwc", "chw"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64])
def test_unpack_is_the_way_back(dtype, order):
    images = [noise(32, 48), noise(16, 16), noise(48, 16)]
    patches, layout = pack_patches(images, 16, MEAN, STD, dtype=dtype, order=order)
    pictures = unpack_patches(patches, layout, 16, MEAN, STD, order=order)
    tolerance = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.2, torch.bfloat16: 1.1}[dtype]
    for image, picture in zip(images, pictures, strict=True):
        assert picture.dtype == torch.float32 and picture.shape == image.shape
        assert (picture - image).abs().max() < tolerance


def test_orders_hold_the_same_values():
    images = [noise(32, 48), noise(40, 33)]
    hwc, _ = pack_patches(images, 8, MEAN, STD, dtype=torch.float32)
    chw, _ = pack_patches(images, 8, MEAN, STD, dtype=torch.float32, order="chw")
    assert torch.equal(hwc.reshape(-1, 8, 8, 3).permute(0, 3, 1, 2).reshape(chw.shape), chw)
    kernel = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    planes = torch.from_numpy(images[0].numpy()).permute(2, 0, 1)[None].float() / 255
    planes = (planes - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    convolved = F.conv2d(planes, kernel, stride=8)[0].flatten(1).T
    assert torch.allclose(chw[:24] @ kernel.flatten(1).T, convolved, atol=1e-3)


IMAGES = [noise(20, 30), noise(40, 10)]
BAD = {
    "not a tensor": (dict(images=["a.png"]), r"images\[0\] is a str; it takes a uint8 tensor \[H, W, 3\]"),
    "an array": (dict(images=[np.zeros((4, 4, 3), np.uint8)]), r"images\[0\] is a ndarray"),
    "float image": (
        dict(images=[*IMAGES, torch.zeros(4, 4, 3)]),
        r"images\[2\] is float32 \[4, 4, 3\]; it takes",
    ),
    "channels first": (
        dict(images=[torch.zeros(3, 8, 8, dtype=torch.uint8)]),
        r"images\[0\] is uint8 \[3, 8, 8\]",
    ),
    "one image": (dict(images=IMAGES[0]), r"images\[0\] is uint8 \[30, 3\]"),
    "no pixels": (dict(images=[torch.zeros(0, 8, 3, dtype=torch.uint8)]), r"uint8 \[0, 8, 3\]; .* H, W >= 1"),
    "two devices": (dict(images=[IMAGES[0], IMAGES[1].to("meta")]), r"images\[1\] is on meta; it takes cpu"),
    "no list": (dict(images=None), r"images is None; it takes a list of uint8 tensors \[H, W, 3\]"),
    "patch size": (dict(patch_size=0), "patch_size is 0; it takes a whole number >= 1"),
    "patch size's type": (dict(patch_size=16.0), "patch_size is 16.0; it takes a whole number >= 1"),
    "bool": (dict(patch_size=True), "patch_size is True; it takes a whole number >= 1"),
    "huge patch": (dict(patch_size=2**40), "patch_size is 1099511627776; .*>= 1 and <= 32768"),
    "mean": (dict(mean=(0.5, 0.5)), r"mean is \(0.5, 0.5\); it takes three finite numbers"),
    "mean's type": (dict(mean=0.5), "mean is 0.5; it takes three finite numbers"),
    "std": (dict(std=(1, 1, float("nan"))), r"std is \(1, 1, nan\); it takes three finite numbers"),
    "std's sign": (dict(std=(1, 0, 1)), r"std is \(1.0, 0.0, 1.0\); it takes three numbers > 0"),
    "dtype": (
        dict(dtype=torch.int8),
        "dtype is torch.int8; it takes torch.float32, torch.bfloat16, torch.float16, torch.float64",
    ),
    "order": (dict(order="whc"), "order is 'whc'; it takes 'hwc' or 'chw'"),
    "crops' shape": (dict(crops=[[0, 0, 1, 1]]), r"crops has shape \[1, 4\]; it takes rows of 5 numbers"),
    "crops' kind": (dict(crops=["a"]), r"crops is \['a'\]; it takes rows of 5 numbers"),
    "ragged crops": (dict(crops=[[0, 0, 0, 1, 1], [0]]), "crops is .* it takes rows of 5 numbers"),
    "crops on a device": (dict(crops=torch.zeros(1, 5, device="meta")), "crops is on meta; .* on the host"),
    "unknown image": (
        dict(crops=[[2, 0, 0, 1, 1]]),
        r"crops\[0\] is \[2.0, .* an image's index first, below 2",
    ),
    "negative image": (dict(crops=[[-1, 0, 0, 1, 1]]), r"crops\[0\] is \[-1.0"),
    "half an image": (dict(crops=[[0.5, 0, 0, 1, 1]]), r"crops\[0\] is \[0.5"),
    "NaN image": (dict(crops=[[float("nan"), 0, 0, 1, 1]]), r"crops\[0\] is \[nan"),
    "too far right": (
        dict(crops=[[0, 0, 0, 9, 9], [1, 0, 0, 10.5, 40]]),
        r"crops\[1\] .* 0 <= x1 < x2 <= 10 and 0",
    ),
    "too far down": (dict(crops=[[0, 0, 0, 30, 20.01]]), r"crops\[0\] .* 0 <= y1 < y2 <= 20"),
    "too far left": (dict(crops=[[0, -0.1, 0, 30, 20]]), r"crops\[0\] is \[0.0, -0.1"),
    "inverted": (dict(crops=[[0, 5, 5, 4, 9]]), r"crops\[0\] .* it takes 0 <= x1 < x2"),
    "no area": (dict(crops=[[0, 5, 5, 5, 9]]), r"crops\[0\] .* it takes 0 <= x1 < x2"),
    "NaN crop": (dict(crops=[[0, 0, float("nan"), 4, 9]]), r"crops\[0\] is \[0.0, 0.0, nan"),
    "infinite crop": (dict(crops=[[0, 0, 0, float("inf"), 9]]), r"crops\[0\] is \[0.0, 0.0, 0.0, inf"),
    "grids' count": (dict(grids=[(1, 1)]), r"grids has 1 rows; it takes 2, one \(h, w\) a crop"),
    "grids' count for crops": (
        dict(crops=[[0, 0, 0, 1, 1]], grids=[(1, 1)] * 2),
        "grids has 2 rows; it takes 1",
    ),
    "empty grid": (
        dict(grids=[(1, 1), (0, 3)]),
        r"grids\[1\] is \[0.0, 3.0\]; it takes whole numbers of patches >= 1",
    ),
    "huge side": (dict(grids=[(1, 1), (2**32, 2**32)]), r"grids\[1\] is \[4294967296.0, .*>= 1 and < 2\*\*31"),
    "too many tokens": (dict(grids=[(2**31 - 1, 2**31 - 1)] * 2), "grids hold 9223372028264841218 tokens together"),
    "broken grid": (dict(grids=[(1, 1.5), (1, 1)]), r"grids\[0\] is \[1.0, 1.5\]"),
    "NaN grid": (dict(grids=[(1, 1), (1, float("nan"))]), r"grids\[1\] is \[1.0, nan\]"),
    "grids' shape": (dict(grids=[[1, 1, 1]] * 2), r"grids has shape \[2, 3\]; it takes rows of 2 numbers"),
    "grids on a device": (dict(grids=torch.ones(2, 2, device="meta")), "grids is on meta; .* on the host"),
    "crop of nothing": (dict(images=[], crops=[[0, 0, 0, 1, 1]]), r"crops\[0\] .* below 0"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_arguments_are_named(fault):
    change, message = BAD[fault]
    with pytest.raises(ValueError, match=message):
        pack_patches(**{**dict(images=IMAGES, patch_size=8, mean=MEAN, std=STD), **change})


def test_bad_arguments_of_unpack_are_named():
    patches, layout = pack_patches(IMAGES, 8, MEAN, STD)
    good = dict(patches=patches, layout=layout, patch_size=8, mean=MEAN, std=STD)
    for change, message in [
        (dict(patches=patches[1:]), r"patches is bfloat16 \[10, 192\]; it takes floating-point \[11, 192\]"),
        (dict(patches=patches.int()), r"patches is int32 \[11, 192\]; it takes floating-point"),
        (dict(patch_size=4), r"it takes floating-point \[11, 48\], a row of 4 x 4 x 3 values"),
        (dict(layout=PackedLayout.from_grids([(1, 1)])), r"it takes floating-point \[1, 192\]"),
        (dict(patch_size=-1), "patch_size is -1"),
        (dict(order="HWC"), "order is 'HWC'"),
        (dict(mean=None), "mean is None"),
        (dict(std=(1, 1, -1)), "std is"),
    ]:
        with pytest.raises(ValueError, match=message):
            unpack_patches(**{**good, **change})


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "pack_patches=cpu")
    with pytest.raises(RuntimeError, match="cpu for pack_patches, which can't run: .* not .*float64"):
        pack_patches(IMAGES, 8, MEAN, STD, dtype=torch.float64)
    monkeypatch.setattr(native, "why_not", lambda: "it is broken")
    with pytest.raises(RuntimeError, match="it is broken"):
        pack_patches(IMAGES, 8, MEAN, STD)
    monkeypatch.delenv(backends.VARIABLE)
    backends._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="slow reference: cpu: it is broken"):
        pack_patches(IMAGES, 8, MEAN, STD)


@pytest.mark.filterwarnings("error")
def test_meta_images_give_shapes():
    images = [torch.empty(40, 50, 3, dtype=torch.uint8, device="meta")] * 2
    patches, layout = pack_patches(images, 16, MEAN, STD, grids=[(2, 3), (1, 1)])
    assert patches.is_meta and patches.shape == (7, 768) and patches.dtype == torch.bfloat16
    assert layout.grids.is_meta and layout.host_grids == ((2, 3), (1, 1))


@pytest.mark.parametrize("active", [True, False])
def test_fake_images_give_shapes(active):
    mode = FakeTensorMode()
    image = mode.from_tensor(torch.empty(40, 50, 3, dtype=torch.uint8))
    with mode if active else nullcontext():
        patches, layout = pack_patches([image], 16, MEAN, STD)
    assert isinstance(patches, FakeTensor) and patches.shape == (6, 768) and patches.dtype == torch.bfloat16
    assert isinstance(layout.grids, FakeTensor) and layout.host_grids == ((2, 3),)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.* is deprecated")
def test_a_trace_packs_anew():
    def run(image):
        return pack_patches([image], 8, MEAN, STD, grids=[(2, 3)])[0]

    image, other = noise(20, 30), noise(20, 30, seed=1)
    expected = forced("reference", [other], 8, MEAN, STD, grids=[(2, 3)])
    assert torch.equal(torch.jit.trace(run, image)(other), expected)
