"""pack_patches' CUDA kernels: the copying one's tiles on the host, and what the compiler makes of all of them.

That the kernels follow the formula is held in test_patch_packing.py, over the emulated blocks.
"""

import ctypes
import faulthandler
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from guard_pages import exit_code, guarded
from hypothesis import given, settings
from hypothesis import strategies as st

from granvit_kernels import launch, native, pack_patches
from granvit_kernels.ops.patch_packing import cuda, reference
from granvit_kernels.ops.patch_packing.arguments import check_packing

ROOT = Path(__file__).resolve().parents[2]
MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
DTYPES = tuple(native.DTYPES)
BETWEEN = 77  # bytes around an image's rows

needs_native = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


def image_in_storage(height, width, offset, gap, seed=0):
    """An image that starts `offset` bytes past a multiple of 64, with `gap` bytes between its rows."""
    stride = 3 * width + gap
    storage = torch.full((offset + height * stride + 64,), BETWEEN, dtype=torch.uint8)
    image = storage[offset:].as_strided((height, width, 3), (stride, 3, 1))
    image.copy_(torch.randint(0, 256, image.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8))
    return image


def emulate(job, offset=0, backwards=False):
    """The patches by the kernel's blocks on the host, `offset` values into storage that must not change around them."""
    patches, layout = cuda.empty(job)
    storage = torch.full((patches.numel() + offset + 64,), torch.nan, dtype=job.dtype)
    inside = storage[offset : offset + patches.numel()].view(patches.shape)
    task, _keep = cuda.problem(job, inside, layout)
    native.library().pack_patches_emulated(task, backwards)
    assert storage[:offset].isnan().all() and storage[offset + patches.numel() :].isnan().all()
    assert not inside.isnan().any()
    return inside, layout


def check(images, p, crops, grids, dtype, order, offset=0):
    """The copying kernel is the reference in float64, rounded once: all crops are as large as their grids."""
    job = check_packing(images, p, MEAN, STD, crops, grids, dtype, order)
    found, layout = emulate(job, offset)
    assert torch.equal(emulate(job, offset, backwards=True)[0], found)
    exact = check_packing(images, p, MEAN, STD, crops, grids, torch.float64, order)
    expected = reference.forward(exact)[0]
    bound = torch.finfo(dtype).eps / 2 * expected.abs() + 2e-6  # of float32's product and sum
    assert ((found.double() - expected).abs() <= bound).all()
    assert torch.equal(layout.grids, job.layout.grids) and torch.equal(layout.cu_seqlens, job.layout.cu_seqlens)


@needs_native
@pytest.mark.parametrize("order", ["hwc", "chw"])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 7, 14, 16, 31, 32, 45, 46, 47, 64, 100, 130, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_patches_of_any_size(dtype, p, order):
    """More patches in a row than a tile takes, a narrow crop, one patch; more crops than one emulated launch."""
    wide = 2048 // p**2 + 3 if p < 46 else 2
    image = image_in_storage(2 * p + 1, wide * p + 2, 5, 7)
    crops = [(0, 1, 1, 1 + wide * p, 1 + 2 * p), (0, 2, 0, 2 + p, 2 * p), (0, 0, 1, p, 1 + p), (0, 1, 0, 1 + 2 * p, p)]
    check([image], p, crops, [(2, wide), (2, 1), (1, 1), (1, 2)], dtype, order)


@needs_native
@pytest.mark.parametrize("order", ["hwc", "chw"])
@pytest.mark.parametrize("p", [5, 14, 16, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_from_and_to_any_alignment(dtype, p, order):
    for offset, gap in ((k, (5 * k) % 17) for k in range(16)):
        image = image_in_storage(p + 2, 3 * p + 1, offset, gap, seed=offset)
        check([image], p, [(0, 1, 2, 1 + 3 * p, 2 + p)], [(1, 3)], dtype, order, offset % 9)


@needs_native
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_copies_any_crops(data):
    p = data.draw(st.one_of(st.integers(1, 20), st.integers(21, 140)))
    images, crops, grids = [], [], []
    for seed in range(data.draw(st.integers(1, 3))):
        h, w = (data.draw(st.integers(1, 4)) for _ in range(2))
        x, y, right, below, offset, gap = (data.draw(st.integers(0, 9)) for _ in range(6))
        images.append(image_in_storage(y + h * p + below, x + w * p + right, offset, gap, seed))
        for _ in range(data.draw(st.integers(1, 2))):  # overlapping ones
            crops.append((seed, x, y, x + w * p, y + h * p))
            grids.append((h, w))
    dtype, order = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(["hwc", "chw"]))
    check(images, p, crops, grids, dtype, order, data.draw(st.integers(0, 8)))


RESAMPLES = {
    "bilinear": {},
    "bicubic": {"resample": "bicubic"},
    "rounded": {"resample": "bicubic", "round": "pil"},
    "rounded, columns first": {"round": "pil13"},
}


@needs_native
@pytest.mark.parametrize("kernel", ["copies", *RESAMPLES])
@pytest.mark.parametrize(("dtype", "order"), list(zip(DTYPES, ["hwc", "chw", "chw"], strict=True)), ids=str)
def test_touches_nothing_but_images_and_outputs(dtype, order, kernel):
    """Each lies right before or after a page that ends the process, and is written wholly; the workspace too."""

    def pack(p, at_end):
        images = [guarded((2 * p + 1, 3 * p + 2, 3), torch.uint8, at_end), guarded((p, p, 3), torch.uint8, at_end)]
        crops = [(0, 0, 0, 3 * p, 2 * p), (0, 2, 1, 3 * p + 2, 2 * p + 1), (1, 0, 0, p, p)]
        grids = [(2, 3), (2, 3), (1, 1)]
        if kernel != "copies":
            crops += [(0, 0.5, 0, 3 * p + 2, 2 * p + 1), (2, 0, 0, p, 4 * p + 3), (3, 0, 0, 9001, 2)]
            images += [guarded((4 * p + 3, p, 3), torch.uint8, at_end), guarded((2, 9001, 3), torch.uint8, at_end)]
            grids[1:] = [(3, 2), (2, 1), (1, 2), (1, 1), (1, 1)]
        job = check_packing(images, p, MEAN, STD, crops, grids, dtype, order, **RESAMPLES.get(kernel, {}))
        patches = guarded(job.shape, dtype, at_end)
        layout = SimpleNamespace(grids=guarded((len(grids), 2), torch.int32, at_end))
        layout.cu_seqlens = guarded((len(grids) + 1,), torch.int32, at_end)
        task, (rows, *_) = cuda.problem(job, patches, layout)
        workspace = guarded((task.workspace_bytes,), torch.uint8, at_end)
        task.lend(workspace.data_ptr())
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(rows, images, strict=True))
        native.library().pack_patches_emulated(task, False)
        assert not patches.isnan().any() and layout.grids.tolist() == list(map(list, grids))
        assert layout.cu_seqlens.diff().tolist() == [h * w for h, w in grids]

    def pack_all():
        for p in (1, 3, 4, 14, 16, 46, 50, 130):
            for at_end in (False, True):
                print(f"patches of {p}, {'before' if at_end else 'after'} a page", flush=True)
                pack(p, at_end)

    assert exit_code(pack_all) == 0


@pytest.mark.parametrize(("at_end", "offset"), [(False, -1), (True, 5)])
def test_guard_pages_end_a_process(at_end, offset):
    tensor = guarded((5,), torch.uint8, at_end)
    assert tensor.tolist() == [255] * 5

    def read(shift):
        faulthandler.disable()  # it would tell of a crash
        ctypes.string_at(tensor.data_ptr() + shift, 1)

    assert exit_code(lambda: read(0)) == 0 and exit_code(lambda: read(offset)) == -signal.SIGSEGV


@needs_native
@pytest.mark.parametrize("order", ["hwc", "chw"])
def test_copies_rows_that_are_one(order):
    """A row repeated by expand: its bytes lie before and after each other."""
    image = image_in_storage(1, 70, 3, 0).expand(32, 70, 3)
    check([image], 16, [(0, 1, 0, 65, 32)], [(2, 4)], torch.bfloat16, order)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["hwc", "chw"])
@pytest.mark.parametrize("p", [1, 7, 14, 16, 46, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_on_a_gpu(dtype, p, order):
    for offset, gap in ((0, 0), (3, 5), (8, 8), (15, 1)):
        width = 3 * p + 1
        storage = torch.zeros(offset + (2 * p + 2) * (3 * width + gap), dtype=torch.uint8, device="cuda")
        image = storage[offset:].as_strided((2 * p + 2, width, 3), (3 * width + gap, 3, 1))
        image.copy_(image_in_storage(2 * p + 2, width, 0, 0))
        crops, grids = [(0, 1, 2, 1 + 3 * p, 2 + 2 * p), (0, 0, 1, p, 1 + p)], [(2, 3), (1, 1)]
        arguments = p, MEAN, STD, crops, grids
        found, layout = pack_patches([image], *arguments, dtype=dtype, order=order)
        expected = reference.forward(check_packing([image.cpu()], *arguments, torch.float64, order))[0]
        bound = torch.finfo(dtype).eps / 2 * expected.abs() + 2e-6
        assert ((found.cpu().double() - expected).abs() <= bound).all()
        assert torch.equal(pack_patches([image], *arguments, dtype=dtype, order=order)[0], found)
        assert layout.grids.tolist() == [[2, 3], [1, 1]] and layout.cu_seqlens.tolist() == [0, 6, 7]


def test_says_which_gpus_are_too_old(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda: None)
    monkeypatch.setattr(native, "library", lambda: SimpleNamespace(cuda=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, reason in (((7, 5), "it takes compute capability 8.0 or newer, not 7.5"), ((8, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=found: found)
        launch.device_why_not.cache_clear()
        assert cuda.why_not(torch.device("cuda", 0), torch.float32) == reason
    launch.device_why_not.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(None in map(shutil.which, ("nvcc", "cmake", "ninja")), reason="needs nvcc, cmake and ninja")
@pytest.mark.parametrize(
    ("release", "codes"),
    [("11.5", []), ("11.8", ["80"]), ("12.4", ["80", "90a"]), ("12.8", ["80", "90a", "100"])],
)
def test_builds_with_an_older_nvcc_what_it_knows(release, codes, tmp_path):
    pybind11 = pytest.importorskip("pybind11")
    older = tmp_path / "nvcc"
    real = shutil.which("nvcc")
    told = f'[ "$*" = --version ] && echo "tools, release {release}, V{release}.1" && exit'
    older.write_text(f'#!/bin/sh\n{told}\nexec {real} "$@"\n')
    older.chmod(0o755)
    command = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-DNVCC={older}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    command += ["-DGRANVIT_OUTPUT_NAME=_native.so", f"-DGRANVIT_OUTPUT_DIR={tmp_path}"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"code=\[?sm_(\w+)", (tmp_path / "build" / "build.ninja").read_text())
    assert found == codes and ("the CUDA kernels are left out" in told) == (not codes)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("arch", ["90a", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("80", "100"))])
def test_compiles_without_spills(arch, tmp_path):
    """Also: registers and shared memory leave an SM the threads that the kernels' launch bounds promise."""
    result = subprocess.run(
        ["nvcc", "-cubin", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas=-v",
         f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", str(tmp_path / "out.cubin"),
         str(ROOT / "csrc" / "cuda" / "pack_patches.cu")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    pattern = r"Compiling entry function '\w*?(copy|weights|resample)_kernel.*?(\d+) bytes stack frame, "
    pattern += r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers[^\n]*"
    kernels = list(re.finditer(pattern, result.stderr, re.DOTALL))
    assert sorted(kernel[1] for kernel in kernels) == ["copy"] * 3 + ["resample"] * 12 + ["weights"]
    for kernel in kernels:
        frame, stored, loaded, registers = map(int, kernel.groups()[1:])
        assert (frame, stored, loaded) == (0, 0, 0), kernel[0]
        assert registers <= {"copy": 51, "resample": 96, "weights": 80}[kernel[1]], kernel[0]
        shared = re.search(r"(\d+) bytes smem", kernel[0])
        assert int(shared[1] if shared else 0) <= 38 * 1024
