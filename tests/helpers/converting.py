"""What the converters' tests share: pictures, and a build read back."""

import io
import json

import fsspec
from PIL import Image

from granvit.data.build import Summary, build_dataset
from granvit.data.loader import GranDataset
from granvit.data.records import Source


def picture(width: int = 40, height: int = 20, exif: int | None = None) -> bytes:
    """A JPEG; `exif` is its orientation."""
    told = Image.Exif()
    if exif:
        told[0x0112] = exif
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, "JPEG", exif=told)
    return buffer.getvalue()


def write_json(path, data) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return str(path)


def convert(source: Source, output, **options) -> tuple[Summary, dict]:
    """The build's summary, and its rows by id."""
    summary = build_dataset(source, output, **{"workers": 0, "fault_budget": 1, **options})
    data = GranDataset(output, options.get("split", "train"))
    rows = {data.rows[index]["id"]: data.rows[index] for index in range(len(data))}
    assert all(data[index] is not None for index in range(len(data))) and not data.faults.counts
    return summary, rows


def regions(row) -> list[tuple[str, list[float]]]:
    return [(region["caption"], region["box"]) for region in row["regions"]]


def to_memory(folder, name: str) -> str:
    """A copy of a folder in fsspec's file system in memory."""
    target = f"memory://{name}"
    for path in folder.rglob("*"):
        if path.is_file():
            with fsspec.open(f"{target}/{path.relative_to(folder).as_posix()}", "wb") as file:
                file.write(path.read_bytes())
    return target
