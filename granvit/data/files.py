"""Files of a source, on this machine or wherever fsspec reaches ("s3://...", "zip://folder::photos.zip").

Names inside annotations are untrusted: `inside` lets none leave the folder that the user gave.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

import fsspec

from granvit.data.schema import DataFault

MAX_BYTES = 256_000_000
"""An image file of more bytes is not read."""


def is_remote(location: str) -> bool:
    return "://" in location or "::" in location


def parent(location: str) -> str:
    """The folder of a file."""
    first, chained, rest = location.partition("::")
    if not is_remote(location):
        return os.path.dirname(location) or "."
    return f"{first.rpartition('/')[0]}{chained}{rest}"


@contextmanager
def open_file(location: str) -> Iterator[IO[bytes]]:
    """A file opened for reading bytes. Raises ValueError that names it where it can't be opened."""
    try:
        if is_remote(location):
            held = fsspec.open(location, "rb")  # an archive is closed when nothing holds this any more
            opened = held.open()
        elif os.path.isfile(location):  # to open a FIFO or a device could take for ever
            opened = open(location, "rb")
        else:
            raise ValueError(f"no file at {location}")
    except (OSError, ImportError) as error:  # fsspec raises ImportError where a protocol's package is missing
        raise ValueError(f"{location} can't be opened: {error}") from error
    with opened as file:
        yield file


def state(location: str) -> str:
    """What changes when a file does: its size and date, as far as they are known; of a folder nothing is told.
    Raises ValueError where there is neither."""
    if not is_remote(location):
        if os.path.isdir(location):
            return "folder"
        if not os.path.isfile(location):
            raise ValueError(f"no file at {location}")
        found = os.stat(location)
        return f"{found.st_size} {found.st_mtime_ns}"
    system, path = fsspec.url_to_fs(location)
    try:
        info = system.info(path)
    except OSError as error:
        raise ValueError(f"{location} can't be read: {error}") from error
    return " ".join(str(info.get(key, "")) for key in ("size", "mtime", "ETag", "LastModified"))


def list_files(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    """Names relative to `folder`, sorted, of the files in it and below whose name ends in one of `suffixes`, in
    capitals too. Hidden files and folders are left out. Raises ValueError where there is no such folder."""
    if is_remote(folder):
        system, root = fsspec.url_to_fs(folder)
        if not system.isdir(root):
            raise ValueError(f"no folder at {folder}")
        names = [PurePosixPath(path).relative_to(root).as_posix() for path in system.find(root)]
    else:
        if not os.path.isdir(folder):
            raise ValueError(f"no folder at {folder}")
        names = [
            (Path(here) / name).relative_to(folder).as_posix() for here, _, files in os.walk(folder) for name in files
        ]
    wanted = tuple(suffix.lower() for suffix in suffixes)
    return sorted(
        name
        for name in names
        if name.lower().endswith(wanted) and not any(part.startswith(".") for part in name.split("/"))
    )


def inside(folder: str, name: str) -> str:
    """Where the file `name` of `folder` is. Raises DataFault of kind `path` where a name leads out of the folder,
    by a link too."""
    refused = DataFault("path", f"image must lie in {folder} or below, got {name!r:.80}")
    if is_remote(folder):
        if is_remote(name) or name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise refused
        first, chained, rest = folder.partition("::")
        separator = "" if first.endswith("/") else "/"
        return f"{first}{separator}{name}{chained}{rest}"
    try:
        path = (Path(folder) / name).resolve()
        if Path(name).is_absolute() or not path.is_relative_to(Path(folder).resolve()):
            raise refused
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, a loop of links
        raise (
            error if isinstance(error, DataFault) else DataFault("path", f"image {name!r:.80} can't be read: {error}")
        ) from None
    return str(path)


def read_image(folder: str, name: str) -> bytes:
    """The bytes of an image file of `folder`. Raises DataFault of kind `path` (leads out of the folder, is no file,
    can't be read) or `image_bytes` (more than MAX_BYTES)."""
    location = inside(folder, name)
    if not is_remote(folder) and not os.path.isfile(location):
        raise DataFault("path", f"image {name!r:.80} is no file")
    try:
        with open_file(location) as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError, KeyError) as error:  # KeyError: zip's for a member that is not there
        raise DataFault("path", f"image {name!r:.80} can't be read: {error}") from None
    if len(content) > MAX_BYTES:
        raise DataFault("image_bytes", f"image {name!r:.80} has more than the limit of {MAX_BYTES} bytes")
    return content
