"""Writing Gran datasets: a folder appears whole, or not at all."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter

from granvit.data.schema import FEATURES


def write_dataset(output_dir: str | Path, splits: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Write rows of the schema as a DatasetDict folder that `datasets.load_from_disk` reads.

    Rows stream to disk, images as the encoded bytes that they come with. Equal rows give an equal fingerprint, by which
    a run knows its data again. Raises ValueError if `output_dir` has anything in it, a split's name could lead out of
    it, or a split has no rows (`datasets` would write it, but not open it); an error while rows are made leaves nothing
    behind.
    """
    for split in splits:
        check_split(split)
    with whole_folder(output_dir) as folder:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-arrow-") as scratch:
            written = {}
            for index, (split, rows) in enumerate(splits.items()):
                arrow = str(Path(scratch) / f"{index}.arrow")
                with ArrowWriter(path=arrow, features=FEATURES, writer_batch_size=256) as writer:
                    for row in rows:
                        writer.write(dict(row))
                    writer.finalize()
                written[split] = datasets.Dataset.from_file(arrow)
                written[split]._fingerprint = _digest(arrow)  # else `datasets` draws one by lot
                if not len(written[split]):
                    raise ValueError(f"split {split!r} has no rows; leave it out or give it at least one")
            bars = datasets.are_progress_bars_disabled()
            datasets.disable_progress_bars()
            try:
                datasets.DatasetDict(written).save_to_disk(str(folder))
            finally:
                if not bars:
                    datasets.enable_progress_bars()


def _digest(path: str) -> str:
    known = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            known.update(block)
    return known.hexdigest()


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is a name that can't lead out of a folder."""
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise ValueError(
            f"split must be a name of letters, digits, '_', '.' and '-' that starts with none of the last two, "
            f"got {split!r}"
        )


@contextmanager
def whole_folder(output_dir: str | Path) -> Iterator[Path]:
    """A temporary folder beside `output_dir` that takes its place when the block ends well, else vanishes.

    Raises ValueError if `output_dir` is a file or a folder with something in it.
    """
    output_dir = Path(output_dir).absolute()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"output must be a new or an empty folder, got {output_dir}")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=output_dir.parent, prefix=f".{output_dir.name}-"))
    try:
        folder.chmod(0o755)  # mkdtemp's 0700 is for secrets
        yield folder
        if output_dir.exists():
            output_dir.rmdir()
        folder.rename(output_dir)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
