"""What a call costs the host before the GPU has its work, against reading its arguments in Python: so on any machine.

`python tests/kernels/test_host_time.py` prints microseconds.
"""

import time
from functools import partial

import pytest
import torch

from granvit_kernels import PackedLayout, backends, native
from granvit_kernels.ops.patch_packing import CANDIDATES, cuda
from granvit_kernels.ops.patch_packing.arguments import check_packing

needs_native = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
HALF = (0.5, 0.5, 0.5)


def make_images(count):
    """Different heights, each with gaps between its rows."""
    storage = torch.zeros(count + 200 * 64, dtype=torch.uint8)
    return [storage[i:].as_strided((64 - 16 * (i % 3), 64, 3), (200, 3, 1)) for i in range(count)]


def prepare(images):
    """What pack_patches does for a GPU, up to the launch."""
    crops = torch.tensor([(i, 0, 0, 64, len(image)) for i, image in enumerate(images)], dtype=torch.float64)
    grids = torch.tensor([(len(image) // 16, 4) for image in images], dtype=torch.int32)

    def run():
        job = check_packing(images, 16, HALF, HALF, crops, grids, torch.bfloat16, "hwc")
        backends.choose("pack_patches", CANDIDATES["pack_patches"], device=job.device, dtype=job.dtype)
        patches, layout = cuda.empty(job)
        cuda.problem(job, patches, layout)

    return run


def read(images):
    """The least that checking and addressing an image takes in Python."""
    return lambda: [(i.dtype, i.device, i.shape, i.stride(), i.data_ptr()) for i in images]


def fastest(*runs, rounds=60):
    """Seconds of each on its core, its fastest round, in turn: other processes on the machine count little."""
    times = [[] for _ in runs]
    for _ in range(rounds):
        for run, mine in zip(runs, times, strict=True):
            start = time.thread_time()
            run()
            mine.append(time.thread_time() - start)
    return [min(mine) for mine in times]


@needs_native
def test_many_images_cost_little_more_than_reading_them():
    """512 images: three to four times. It was seven, when each had the words of an error made for it."""
    images = make_images(512)
    ours, reading = fastest(prepare(images), read(images))
    assert ours < 4.5 * reading


def test_a_layout_costs_about_what_reading_its_list_does():
    """It was twice torch.tensor, and is two thirds of it."""
    grids = [(2 + i % 5, 3) for i in range(512)]
    ours, reading = fastest(lambda: PackedLayout.from_grids(grids), lambda: torch.tensor(grids))
    assert ours < 1.5 * reading


if __name__ == "__main__":
    for count in (512, 16):
        images = make_images(count)
        grids = [(2 + i % 5, 3) for i in range(count)]
        runs = prepare(images), read(images), partial(PackedLayout.from_grids, grids), partial(torch.tensor, grids)
        ours, reading, layout, table = fastest(*runs)
        for name, seconds in {"pack_patches": ours, "reading": reading, "from_grids": layout, "tensor": table}.items():
            print(f"{count} images, {name}: {1e6 * seconds:.0f} us")
