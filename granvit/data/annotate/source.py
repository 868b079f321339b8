"""Pictures without annotations as a source: a folder of files, or the rows of a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
from tyro.conf import Positional

from granvit.data.annotate.annotator import BATCH, Annotator
from granvit.data.annotate.engines import RapidOcr, TransformersCaptioner, TransformersDetector, load
from granvit.data.files import MAX_BYTES, is_remote, local
from granvit.data.loader import open_dataset
from granvit.data.parquet import ParquetRows
from granvit.data.records import Notes, Record
from granvit.data.schema import is_unicode
from granvit.data.sources.rows import FolderSource
from granvit.questions.schema import DataFault

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
REGION_TOKENS, PICTURE_TOKENS = 48, 256
"""What a captioner may say of an object, and of a whole picture."""


@dataclass(frozen=True)
class Annotate(FolderSource):
    """Pictures that models find the regions of."""

    images: Positional[str]
    """Folder or URL of pictures, or a folder of a Gran dataset or another of `datasets` with a column "image". Regions
    and captions that rows have are kept."""
    ocr: str | None = None
    """Reads lines of text: "rapidocr", or module:Class of your own."""
    detector: str | None = None
    """Finds objects: a model's folder or name on the hub, or module:Class of your own."""
    captioner: str | None = None
    """Describes objects: a model's folder or name on the hub, or module:Class of your own. Without it an object is
    called by its class."""
    captions: bool = False
    """Have the captioner describe whole pictures, too."""
    ocr_score: float = 0.5
    """Lines that score less are dropped."""
    detector_score: float = 0.5
    """Objects that score less are dropped."""
    region_prompt: str = "Describe this in no more than 10 words."
    """What a captioner with a chat template is asked about an object."""
    picture_prompt: str = "Describe in detail what is shown in the image in one paragraph"
    """What it is asked about a whole picture."""
    device: str | None = None
    """Of detector and captioner; None: the GPU, where there is one (give --workers 1 then)."""
    from_split: str = "train"
    """Split of a dataset that is read."""
    licence: str = ""
    """Noted in rows that come without one."""

    def annotator(self) -> Annotator:
        """The models as a function over batches. Raises ValueError for settings that fit in no way, and for a class of
        your own that can't be loaded."""
        if not (self.ocr or self.detector or self.captions):
            raise ValueError("nothing to do: give --ocr, --detector or --captions")
        if self.captions and not self.captioner:
            raise ValueError("--captions needs a --captioner")
        if self.captioner and not (self.detector or self.captions):
            raise ValueError("a --captioner needs a --detector, or --captions")

        def captioner(prompt: str, tokens: int) -> Any:
            own = ":" in self.captioner
            return load(self.captioner) if own else TransformersCaptioner(self.captioner, prompt, tokens, self.device)

        def detector() -> Any:
            own = ":" in self.detector
            return load(self.detector) if own else TransformersDetector(self.detector, self.detector_score, self.device)

        return Annotator(
            (RapidOcr() if self.ocr == "rapidocr" else load(self.ocr)) if self.ocr else None,
            detector() if self.detector else None,
            captioner(self.region_prompt, REGION_TOKENS) if self.captioner and self.detector else None,
            captioner(self.picture_prompt, PICTURE_TOKENS) if self.captions else None,
            self.ocr_score,
            self.detector_score,
        )

    def inputs(self) -> list[str]:
        self.annotator()
        if not _is_dataset(self.images):
            return local(self.images)
        return sorted(str(path) for kind in ("*.arrow", "*.parquet") for path in Path(self.images).rglob(kind))

    def records(self, notes: Notes, scratch: Path) -> Iterator[Record]:
        if _is_dataset(self.images):
            rows = _rows(self.images, self.from_split)
            ids = rows.select_columns(["id"]) if "id" in rows.column_names else None
            for index in range(len(rows)):
                row_id = index if ids is None else ids[index]["id"]
                name = f"{self.images}[{self.from_split}][{index}]"
                if isinstance(row_id, (str, int)) and str(row_id) and is_unicode(str(row_id)):
                    yield Record(str(row_id), name, index)
                else:
                    notes.unreadable(name, DataFault("id", f"id must be a non-empty string, got {row_id!r:.80}"))
            return
        for name, shown in self.named_files(self.images, SUFFIXES, notes):
            yield Record(name, shown, name)

    def rows(self, records: list[Record], notes: Notes) -> Iterator[dict[str, Any]]:
        annotator = self.annotator()
        for batch in self._batches(records, notes):
            rows = [row for _, row in batch]
            annotated = annotator({name: [row[name] for row in rows] for name in ("image", "caption", "regions")})
            for i, (record, row) in enumerate(batch):
                for line in filter(None, annotated["faults"][i].split("\n")):
                    kind, _, message = line.partition(": ")
                    notes.fault(record, DataFault(kind, message))
                for rule in filter(None, annotated["dropped"][i].split("\n")):
                    notes.drop(rule)
                made = row | {name: annotated[name][i] for name in ("width", "height", "caption", "regions")}
                if made["regions"] or made["caption"] is not None:
                    if made["width"]:
                        yield made
                elif not annotated["faults"][i]:
                    notes.drop("image in which nothing was found")

    def _batches(self, records: list[Record], notes: Notes) -> Iterator[list[tuple[Record, dict[str, Any]]]]:
        """Rows without annotations of their own, or with those that they had; no more at once than memory holds."""
        batch, size = [], 0
        for record in records:
            try:
                row = self._row(record)
            except DataFault as fault:
                notes.fault(record, fault)
                continue
            batch.append((record, row))
            size += len(row["image"]["bytes"])
            if len(batch) == BATCH or size >= MAX_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _row(self, record: Record) -> dict[str, Any]:
        row = {"id": record.id, "caption": None, "regions": None, "source": "", "licence": self.licence}
        if isinstance(record.data, str):
            content = self.read_image(self.images, record.data)
            return row | {"image": {"bytes": content, "path": record.data.rpartition("/")[2]}}
        stored = _rows(self.images, self.from_split)[record.data]
        image, caption, regions = stored["image"], stored.get("caption"), stored.get("regions")
        content = image.get("bytes") if isinstance(image, dict) else None
        if not content or not isinstance(content, bytes):  # a path could name any file of this machine
            raise DataFault("image", "a row must hold its picture's bytes")
        if caption is not None and not (isinstance(caption, str) and caption.strip()):
            raise DataFault("caption", f"caption must be null or a string with text in it, got {caption!r:.80}")
        if regions is not None and not isinstance(regions, list):
            raise DataFault("regions", f"regions must be a list, got {type(regions).__name__}")
        image = {"bytes": content, "path": str(image.get("path") or "").rpartition("/")[2] or None}
        noted = {name: stored[name] for name in ("source", "licence") if isinstance(stored.get(name), str)}
        return row | noted | {"image": image, "caption": caption, "regions": regions}


def _is_dataset(images: str) -> bool:
    folder = Path(images)
    if is_remote(images) or not folder.is_dir():
        return False
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")) or any(
        folder.glob("*.parquet")
    )


@lru_cache(maxsize=1)
def _rows(path: str, split: str) -> datasets.Dataset | ParquetRows:
    """A split of a dataset, its pictures as bytes. Raises ValueError where there is none."""
    dataset = open_dataset(path)
    splits = dataset if isinstance(dataset, dict) else {"train": dataset}
    if split not in splits:
        raise ValueError(f"from_split must be one of {sorted(splits)} in {path}, got {split!r}")
    rows = splits[split]
    if "image" not in rows.column_names:
        raise ValueError(f"{path} has no column 'image', only {rows.column_names}")
    return rows if isinstance(rows, ParquetRows) else rows.cast_column("image", datasets.Image(decode=False))
