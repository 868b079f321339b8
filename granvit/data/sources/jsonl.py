"""JSONL in, Gran dataset out: one line an image.

    {"image": path relative to the file, "width", "height", "caption": string or null, "regions": [{"box":
    [x1, y1, x2, y2] relative, "caption", "kind": "natural" or "ocr"}], "source", "licence", "id": optional}

width and height are those after EXIF orientation; the id is the image's path where none is given; a region
may carry a "score". The schema is strict: an unknown or missing key, a wrong type and a repeated key are
faults, like whatever `granvit.data.schema` rejects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from granvit.data.loader import FaultLog
from granvit.data.schema import DataFault, check_size, decode_image, is_unicode, parse_region
from granvit.data.writer import write_dataset

_KEYS = {  # key: (types, what a fault says is accepted)
    "image": ((str,), "a path relative to the file"),
    "width": ((int,), "an integer"),
    "height": ((int,), "an integer"),
    "caption": ((str, type(None)), "a string or null"),
    "regions": ((list,), "a list of objects"),
    "source": ((str,), "a string"),
    "licence": ((str,), "a string"),
    "id": ((str,), "a string"),
}
_REGION_KEYS = {"box", "caption", "kind", "score"}


def convert_jsonl(
    file: str | Path, output_dir: str | Path, split: str = "train", fault_budget: float = 0.01
) -> FaultLog:
    """Write the images and regions of a JSONL file as a Gran dataset with one split.

    Images are copied as they are. Each fault is logged with its line and skipped: a fault of a region leaves
    out the region, any other the line. All lines are read before too many faults end it, so
    that one run names them all. Returns the log of faults.

    Raises FaultBudgetExceeded when more than `fault_budget` of the lines have faults, and ValueError when
    there is no such file, it has no usable line or `output_dir` is not empty; then nothing is written.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"no JSONL file at {file}")
    with file.open("rb") as lines:
        number = sum(1 for line in lines if line.strip())
    faults = FaultLog(number, fault_budget, unit="line")
    console = Console(stderr=True)
    rows = track(
        _rows(file, faults),
        f"Converting {file.name}",
        total=number,
        console=console,
        disable=not console.is_terminal,
    )
    write_dataset(output_dir, {split: rows})
    return faults


def _rows(file: Path, faults: FaultLog) -> Iterator[dict[str, Any]]:
    """Rows of the good lines. Raises ValueError after the last line if there was none."""
    ids: dict[str, int] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            name = f"{file}:{number}"
            try:
                row = _row(file.parent, line, lambda fault: faults.add(number, name, fault))  # noqa: B023
                if row["id"] in ids:
                    raise DataFault("id", f"id {row['id']!r} is already that of line {ids[row['id']]}")
            except DataFault as fault:
                faults.add(number, name, fault)
                continue
            ids[row["id"]] = number
            yield row
    faults.check()
    if not ids:
        raise ValueError(f"{file} holds no usable line: {faults.summary()}")


def _row(folder: Path, line: bytes, drop: Callable[[DataFault], None]) -> dict[str, Any]:
    """One line as a checked row; faults of single regions go to `drop`, the first other one is raised."""
    try:
        data = json.loads(line.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise (
            error if isinstance(error, DataFault) else DataFault("json", f"not JSON in UTF-8: {error}")
        ) from None
    if not isinstance(data, dict):
        raise DataFault("json", f"a line must be an object, got {type(data).__name__}")
    _check_keys(data, _KEYS, optional={"id"})
    for key, (types, accepted) in _KEYS.items():
        if key in data and (not isinstance(data[key], types) or isinstance(data[key], bool)):
            raise DataFault("type", f"{key} must be {accepted}, got {data[key]!r:.80}")
        if isinstance(data.get(key), str) and not is_unicode(data[key]):
            raise DataFault("type", f"{key} must be {accepted} of Unicode, got {data[key]!r:.80}")
    if data["caption"] is not None and not data["caption"].strip():
        raise DataFault("caption", f"caption must be null or have text in it, got {data['caption']!r}")
    regions = []
    for index, region in enumerate(data["regions"]):
        try:
            regions.append(_region(region))
        except DataFault as fault:
            drop(DataFault(fault.kind, f"regions[{index}]: {fault}"))
    if not regions and data["caption"] is None:
        raise DataFault("empty_row", "neither a caption nor a usable region")
    content = _image_bytes(folder, data["image"])
    check_size(data["width"], data["height"], decode_image(content))
    row_id = data.get("id", data["image"])
    if not row_id:
        raise DataFault("id", "id must not be empty")
    return {
        "id": row_id,
        "image": {"bytes": content, "path": Path(data["image"]).name},
        "width": data["width"],
        "height": data["height"],
        "caption": data["caption"],
        "regions": regions,
        "source": data["source"],
        "licence": data["licence"],
    }


def _region(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise DataFault("type", f"a region must be an object, got {data!r:.80}")
    _check_keys(data, _REGION_KEYS, optional={"score"})
    if not isinstance(data["box"], list):
        raise DataFault("box", f"box must be a list [x1, y1, x2, y2], got {data['box']!r:.80}")
    region = parse_region(data)
    return {"box": list(region.box), "caption": region.caption, "kind": region.kind, "score": region.score}


def _check_keys(data: dict[str, Any], keys: Collection[str], optional: set[str]) -> None:
    missing, unknown = sorted(set(keys) - optional - set(data)), sorted(set(data) - set(keys))
    if missing:
        raise DataFault("missing_key", f"missing {', '.join(missing)}")
    if unknown:
        raise DataFault(
            "unknown_key", f"unknown key {', '.join(map(repr, unknown))}; known: {', '.join(sorted(keys))}"
        )


def _image_bytes(folder: Path, relative: str) -> bytes:
    """A file's content. Raises DataFault if the path is no file or leads out of `folder`, by links too."""
    try:
        path = (folder / relative).resolve()
        if Path(relative).is_absolute() or not path.is_relative_to(folder.resolve()):
            raise DataFault("path", f"image must lie in the file's folder or below, got {relative!r}")
        if not path.is_file():
            raise DataFault("path", f"image {relative!r} is no file")
        return path.read_bytes()
    except DataFault:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # unreadable, a NUL in the name, a loop of links
        raise DataFault("path", f"image {relative!r:.80} can't be read: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DataFault("json", f"repeated key {next(key for key in keys if keys.count(key) > 1)!r}")
    return data


def _constant(name: str) -> float:
    raise DataFault("json", f"{name} is no JSON number")
