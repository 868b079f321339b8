"""Puts the sample set together: which pictures there are, drawn by several processes, written once."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from granvit.data.parallel import blocked, end_with_parent, progress
from granvit.data.sample.pages import draw_page
from granvit.data.sample.photographs import FOLDER, photographs
from granvit.data.sample.scenes import SceneConfig, draw_scene
from granvit.machine import cache_folder

GENERATOR_VERSION = 3
"""Raised whenever equal arguments make other pictures or sentences, so that no cache goes stale."""

SOURCES = ("photographs", "scenes", "scenes-heldout", "pages")
PAGES = 0.2
"""Share of pages, where none is given."""
LICENCE = "CC0-1.0"
"""Of generated pictures."""

_CHUNK = 32  # pictures that a worker makes at a time


@dataclass(frozen=True)
class _Task:
    """Pictures `start` to `stop` of a source in a split."""

    source: str
    split: str
    start: int
    stop: int


def counts(images: int, photos: dict[str, int], pages: float = PAGES) -> dict[str, dict[str, int]]:
    """How many pictures of each source go into each split, {split: {source: number}}, `images` in all.

    About 8 % photographs as long as there are enough of them (`photos` says how many each split has), a share of
    `pages`, the rest scenes. Of the scenes a tenth is test and a twentieth is "scenes-heldout" (test only), of
    the pages a tenth.
    """
    some = {
        split: min(number, round(0.08 * images * number / max(1, sum(photos.values()))))
        for split, number in photos.items()
    }
    drawn = round(pages * images)
    scenes = images - drawn - sum(some.values())
    test_scenes, held_out, test_pages = (
        max(1, round(share)) for share in (0.1 * scenes, 0.05 * scenes, 0.1 * drawn)
    )
    return {
        "train": {
            "photographs": some["train"],
            "scenes": scenes - test_scenes - held_out,
            "pages": drawn - test_pages,
        },
        "test": {
            "photographs": some["test"],
            "scenes": test_scenes,
            "scenes-heldout": held_out,
            "pages": test_pages,
        },
    }


def build_sample(
    output_dir: str | Path,
    images: int,
    seed: int = 0,
    workers: int | None = None,
    scenes: SceneConfig | None = None,
    pages: float = PAGES,
) -> None:
    """Write a sample set of `images` pictures as a DatasetDict with the splits train and test.

    Equal arguments give equal rows, for any number of `workers` (processes; None: one a core, 0: this
    process). `pages` is their share. Shows its progress on a terminal. Raises ValueError if `images` is under
    16, `pages` are not two pictures at least and four fifths of all at most, or `output_dir` is not empty.
    """
    # Here, since `datasets` takes seconds to import and the command line must answer --help at once.
    from granvit.data.writer import write_dataset

    if images < 16:
        raise ValueError(f"images must be >= 16, so that every source is in the set, got {images}")
    if not 1.5 / images < pages <= 0.8:
        raise ValueError(f"pages must be a share of 2 pictures at least and .8 at most, got {pages} of {images}")
    scenes = scenes or SceneConfig()
    if not scenes.held_out:
        raise ValueError("scenes.held_out must be >= 1, since the test split shows held-out combinations")
    photos = {split: sum(1 for _ in photographs(split)) for split in ("train", "test")}
    tasks = {
        split: [
            _Task(source, split, start, min(start + _CHUNK, number))
            for source, number in sources.items()
            for start in range(0, number, _CHUNK)
        ]
        for split, sources in counts(images, photos, pages).items()
    }
    processes = workers if workers is not None else os.cpu_count() or 1
    make = partial(_make, seed=seed, scenes=scenes)
    # Fork, since children only draw: they need nothing of the parent's threads and devices, which is what
    # fork can't carry over. They start here, before the progress bar's thread does.
    executor = None
    if processes > 1:
        executor = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _start_worker)
    try:
        with blocked(signal.SIGTERM):
            chunks = {split: (executor.map if executor else map)(make, todo) for split, todo in tasks.items()}
        splits = {
            split: progress(
                chain.from_iterable(chunks[split]),
                f"Drawing the {split} split",
                sum(task.stop - task.start for task in todo),
            )
            for split, todo in tasks.items()
        }
        write_dataset(output_dir, splits)
    finally:
        if executor:
            executor.shutdown(cancel_futures=True)


def cached_sample(
    images: int,
    seed: int = 0,
    workers: int | None = None,
    scenes: SceneConfig | None = None,
    pages: float = PAGES,
) -> Path:
    """The folder of a sample set, built on first use.

    It lies in `cache_folder`, and its name tells the arguments, the generator's version and the photographs apart.
    Raises ValueError where nothing can be written there.
    """
    scenes = scenes or SceneConfig()
    known = f"{GENERATOR_VERSION} {scenes} {pages} {(FOLDER / 'annotations.jsonl').read_text(encoding='utf-8')}"
    folder = cache_folder() / f"sample-{images}-{seed}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    if not folder.exists():
        _check_cache(folder.parent)
        try:
            build_sample(folder, images, seed, workers, scenes, pages)
        except (OSError, ValueError):
            if not folder.exists():  # else another process was faster, and what it wrote is the same
                raise
    return folder


def _check_cache(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it can't be written to")
    except OSError as error:
        raise ValueError(f"{folder} can't be the cache ({error}); set GRANVIT_CACHE to a folder that can") from error


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a process without a word, and whatever lock it holds
    end_with_parent(keep_from_sigterm=True)


def _make(task: _Task, seed: int, scenes: SceneConfig) -> list[dict[str, Any]]:
    if task.source == "photographs":
        return list(islice(photographs(task.split), task.start, task.stop))
    rows = []
    for index in range(task.start, task.stop):
        # Its own stream for every picture: the rows don't depend on who makes which.
        rng = np.random.default_rng(
            [seed, SOURCES.index(task.source), ("train", "test").index(task.split), index]
        )
        if task.source == "pages":
            page = draw_page(task.split, rng)
            regions = [_region(line.box, line.text, "ocr") for line in page.lines]
            image, caption = page.image, None
        else:
            scene = draw_scene(scenes, task.split, task.source == "scenes-heldout", rng)
            pairs = zip(scene.things, scene.sentences, strict=True)
            regions = [_region(thing.box, sentence, "natural") for thing, sentence in pairs]
            image, caption = scene.image, scene.caption
        rows.append(
            {
                "id": f"{task.source}/{task.split}/{index:06d}",
                "image": {"bytes": _encoded(image, rng), "path": None},
                "width": image.width,
                "height": image.height,
                "caption": caption,
                "regions": regions,
                "source": task.source,
                "licence": LICENCE,
            }
        )
    return rows


def _region(box: tuple[float, ...], caption: str, kind: str) -> dict[str, Any]:
    return {"box": list(box), "caption": caption, "kind": kind, "score": None}


def _encoded(image: Image.Image, rng: np.random.Generator) -> bytes:
    """JPEG of a quality between 75 and 95, or one time in ten PNG."""
    buffer = io.BytesIO()
    if rng.random() < 0.1:
        image.save(buffer, "PNG", compress_level=3)
    else:
        image.save(buffer, "JPEG", quality=int(rng.integers(75, 96)))
    return buffer.getvalue()
