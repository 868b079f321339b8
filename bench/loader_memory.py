"""What a rank's loader takes of a node at the size of Gran-29M, and how long going on takes.

    python bench/loader_memory.py [--steps N]         writes bench/results/loader-memory.json; 3 GB of disk, 6 of memory

One rank of 8 with 8 reading processes is run and measured; a node's figures are this rank's, eight times, and what the
ranks share once. Its dataset has 29 million rows, which are one shard's 512 again and again: the index, the lengths and
the row groups are as large as they would be; photographs have 1 megapixel and, filled up with zeros, 1 MB, so that a
row group has 16 MB, the most that there is. Memory is PSS, from /proc/PID/smaps, the most of all looks.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from rows import Rows, provenance

from granvit.data import batches
from granvit.data.lengths import Lengths, _fingerprint, _save, measure
from granvit.data.loader import GranDataset
from granvit.data.sample import SceneConfig, cached_sample
from granvit.data.shards import RowWriter
from granvit.machine import cache_folder, device_name
from granvit.questions.pictures import decode_smaller
from granvit.toy.tiny import TinyLLM, TinyVision, build_tiny
from granvit_kernels import pack_patches

RESULTS = Path(__file__).parent / "results" / "loader-memory.json"
TASKS = {"bbox2caption": 1.0, "global_caption": 1.0}
RANKS, WORKERS, PACKS = 8, 8, 64
SHARD, ROWS = 512, 29_000_000
STEPS = 45
"""Batches that are drawn: each lane has then read more row groups than it keeps."""


def write_shard(path: Path) -> None:
    rng = np.random.default_rng(0)
    with RowWriter(path) as writer:
        for index in range(SHARD):
            width, height = (1200, 900) if index % 2 else (900, 1200)
            file = io.BytesIO()
            Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist())).save(file, "JPEG")
            corners = rng.random((6, 2)) * 0.5
            regions = [
                {"box": [x, y, x + 0.3, y + 0.3], "caption": f"thing {n} of {index}", "kind": "natural", "score": None}
                for n, (x, y) in enumerate(corners.tolist())
            ]
            image = {"bytes": file.getvalue().ljust(1_000_000, b"\0"), "path": None}
            row = {"id": f"r{index}", "image": image, "width": width, "height": height, "source": "", "licence": ""}
            writer.write(row | {"caption": f"a scene of things, number {index}", "regions": regions})


def processor_of():
    texts = [f"thing {n} of {index}; a scene of things" for n in range(6) for index in range(SHARD)]
    return build_tiny(texts, TinyVision(), TinyLLM(), max_image_tokens=1024, pixel_shuffle=2)[1]


def opened(path: Path, times: int) -> GranDataset:
    """The dataset of the shard, named so many times."""
    data = GranDataset(path)
    for rows in (data.rows, data._texts):
        groups = len(rows.groups)
        rows.files, rows._states = rows.files * times, rows._states * times
        rows.groups, rows._firsts = np.tile(rows.groups, times), np.arange(times + 1) * groups
        rows._ends = np.cumsum(rows.groups)
    data.groups, data.fingerprint = data.rows.groups, f"{data.fingerprint} {times} times"
    return data


def keep_lengths(path: Path, times: int) -> None:
    """Write the long dataset's lengths to the cache: those of the shard's rows, so many times."""
    processor, tasks = processor_of(), sorted(TASKS)
    shard = measure(GranDataset(path), processor, tasks)
    starts = np.concatenate([[0], np.cumsum(np.tile(np.diff(shard.starts), times))])
    long = Lengths(shard.tasks, np.tile(shard.image, times), starts, np.tile(shard.question, times),
                   np.tile(shard.task, times), [])  # fmt: skip
    folder = cache_folder() / f"lengths-{_fingerprint(opened(path, times), processor, tasks)}"
    _save(folder, long)


def loader_of(path: Path, times: int) -> batches.PackLoader:
    return batches.PackLoader(
        opened(path, times), processor_of(), TASKS, capacity=4096, packs=PACKS, questions=None, rank=0, ranks=RANKS,
        workers=WORKERS,
    )  # fmt: skip


def rank(path: Path, times: int) -> None:
    """Draw batches as training does, and print what it was like."""
    began = time.perf_counter()
    loader = loader_of(path, times)
    made = time.perf_counter()
    images, largest = 0, 0
    for number, batch in enumerate(loader, 1):
        if number == 1:
            first = time.perf_counter()
        images += len(batch.samples)
        largest = max(largest, sum(image.numel() for image in batch.packed.images))
        if number == STEPS:
            break
    print(json.dumps({
        "seconds_to_open": round(made - began, 1), "seconds_to_first_batch": round(first - made, 1),
        "seconds": round(time.perf_counter() - first, 1), "images": images, "largest_batch_gb": round(largest / 1e9, 2),
    }))  # fmt: skip


HEAD = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)")


def pss(process: int) -> Counter[str]:
    """Bytes of a process by kind: its own, shared between processes (/dev/shm), the lengths', and of other files."""
    kinds: Counter[str] = Counter()
    kind = ""
    with open(f"/proc/{process}/smaps") as file:
        for line in file:
            if head := HEAD.match(line):
                name = head[1]
                shared = name.startswith(("/dev/shm", "/memfd", "/torch_"))
                kind = "shared" if shared else "lengths" if name.endswith(".npy") else "files" if "/" in name else "own"
            elif line.startswith("Pss:"):
                kinds[kind] += int(line.split()[1]) << 10
            elif line.startswith("Pss_Anon:") and kind in ("files", "lengths"):  # written to, and so a copy of its own
                own = int(line.split()[1]) << 10
                kinds[kind] -= own
                kinds["own"] += own
    return kinds


def looked_at(process: subprocess.Popen) -> dict[str, float]:
    """The rank's memory in GB while it runs: the most at one time, and of each kind then."""
    most: Counter[str] = Counter()
    while process.poll() is None:
        now: Counter[str] = Counter()
        try:
            tree = psutil.Process(process.pid)
            for member in (tree, *tree.children(recursive=True)):
                now += pss(member.pid)
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue
        most = max(most, now, key=lambda kinds: kinds["own"] + kinds["shared"])
        time.sleep(3)
    return {kind: round(size / 1e9, 2) for kind, size in most.items()}


def memory(path: Path, times: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--rank", str(path), str(times)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    kinds = looked_at(process)
    told = json.loads(process.stdout.read())
    of_rank = kinds["own"] + kinds["shared"]
    return {
        "what": "memory", "ranks_measured": 1, "rows": times * SHARD, "workers": WORKERS, "lanes": PACKS // RANKS,
        **told, "rank_gb": kinds, "node_gb": round(RANKS * of_rank + kinds["lengths"] + kinds["files"], 1),
        "bound_of_row_groups_node_gb": round(PACKS * batches.LANE_BYTES / 1e9, 1),
        "bound_of_prefetch_node_gb": round(RANKS * batches.PREFETCH_BYTES / 1e9, 1),
    }  # fmt: skip


def going_on(path: Path, times: int, steps: int) -> dict[str, Any]:
    """CPU seconds until the packs of step `steps` + 1 are known: planned from the beginning, one lane measured, and
    from the lanes' places."""
    loader = loader_of(path, times)
    began = time.process_time()
    packs = loader.lanes[0].packs()
    for _ in range(steps):
        _, place = next(packs)
    planned = time.process_time() - began
    state = loader.state_dict() | {"step": steps}
    # Lane 0's place for all lanes: they hold other rows, as many.
    state["places"] = {str(lane): [steps, *place] for lane in range(PACKS)}
    state = json.dumps(state)
    loader.lanes[0].order._groups.cache_clear()  # as at a start
    began = time.process_time()
    loader.load_state_dict(json.loads(state))
    batch = next(loader.plan())
    seconds = time.process_time() - began
    if batch[0] != next(packs)[0]:
        raise ValueError("going on draws other images than an uninterrupted lane")
    lanes = PACKS // RANKS
    return {
        "what": "going on", "lanes_measured": 1, "rows": times * SHARD, "step": steps, "lanes": lanes,
        "cpu_seconds_planned_anew": round(planned * lanes, 1), "cpu_seconds_from_places": round(seconds, 2),
        "bytes_of_places": len(state),
    }  # fmt: skip


def decoded(data: GranDataset) -> dict[str, Any]:
    """How much what the model is given differs in 8-bit steps where a picture is decoded half as large: the mean over
    the pictures by how many pixels are left for one, and what another way to resample makes, to compare. And the CPU
    time of a photograph of 12 megapixels, noise over a slope, by divisor."""
    images = [content for row in range(len(data)) if (content := data.rows[row]["image"]["bytes"])[:2] == b"\xff\xd8"]
    half, differences = (0.5, 0.5, 0.5), {"bicubic": [], "1": [], "2": [], "3": []}
    for content in images:
        whole, smaller = (torch.from_numpy(np.array(decode_smaller(content, n)[0])) for n in (1, 2))
        if whole.shape == smaller.shape:
            continue
        for spare in (1, 2, 3):
            grids = torch.tensor([[side // (8 * spare) for side in smaller.shape[:2]]])
            ways = (pack_patches([x], 8, half, half, grids=grids, dtype=torch.float32)[0] for x in (whole, smaller))
            known, given = ways
            differences[str(spare)].append((known - given).abs().mean().item() * 127.5)
        other = pack_patches([whole], 8, half, half, grids=grids, dtype=torch.float32, resample="bicubic")[0]
        differences["bicubic"].append((known - other).abs().mean().item() * 127.5)
    slope = np.linspace(0, 200, 4000)[None, :, None] + np.random.default_rng(0).normal(20, 8, (3000, 4000, 3))
    file = io.BytesIO()
    Image.fromarray(slope.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)

    def seconds(divisor: int) -> float:
        began = time.process_time()
        decode_smaller(file.getvalue(), divisor)
        return time.process_time() - began

    times = {n: sorted(seconds(n) for _ in range(5))[2] for n in (1, 2, 4, 8)}
    return {
        "what": "decoding smaller", "pictures": len(differences["1"]),
        "steps_of_255": {name: round(float(np.mean(values)), 2) for name, values in differences.items()},
        "cpu_milliseconds_of_12_megapixels": {str(n): round(1000 * value, 1) for n, value in times.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="the step that is gone on at")
    parser.add_argument("--rows", type=int, default=ROWS, help="the dataset's")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        return rank(Path(options.rank[0]), int(options.rank[1]))
    known, rows = provenance(device_name("cpu")), Rows(options.output, ("what",))
    with tempfile.TemporaryDirectory() as folder:
        rows.save(decoded(GranDataset(cached_sample(600, scenes=SceneConfig(long_side=512)))) | known)
        os.environ["GRANVIT_CACHE"] = folder
        path, times = Path(folder) / "train.parquet", options.rows // SHARD
        write_shard(path)
        keep_lengths(path, times)
        rows.save(going_on(path, times, options.steps) | known)
        rows.save(memory(path, times) | known)
    print(json.dumps(rows.kept(), indent=1))


if __name__ == "__main__":
    main()
