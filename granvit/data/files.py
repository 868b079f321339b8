"""Files of a source, on this machine or wherever fsspec reaches ("s3://...", "zip://folder::photos.zip").

Names inside annotations are untrusted: `inside` lets none leave the folder that the user gave.
"""

from __future__ import annotations

import os
import posixpath
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO
from zipfile import BadZipFile

import fsspec
from fsspec import AbstractFileSystem

from granvit.questions.schema import DataFault

MAX_BYTES = 256_000_000
"""An image file of more bytes is not read."""

# What is seen of files and archives that are missing or broken: KeyError is zip's for a member that is not there,
# RuntimeError for one with a password, ImportError fsspec's where a protocol's package is missing.
_UNREADABLE = (OSError, ValueError, ImportError, KeyError, EOFError, RuntimeError, BadZipFile, zlib.error)


def is_remote(location: str) -> bool:
    return "://" in location or "::" in location


def local(folder: str) -> list[str]:
    """[folder], for `Source.inputs`, unless it is remote: what has no real folders may not know this one."""
    return [] if is_remote(folder) else [folder]


def parent(location: str) -> str:
    """The folder of a file."""
    if not is_remote(location):
        return os.path.dirname(location) or "."
    before, path, after = _split(location)
    return f"{before}{path.rpartition('/')[0]}{after}"


def suffix(location: str) -> str:
    """The ending of a file's name, in small letters: ".parquet"."""
    return posixpath.splitext(_split(location)[1])[1].lower()


def _split(location: str) -> tuple[str, str, str]:
    """What is before the path, the path, and what is after it: "simplecache::", "s3://a/b" and "", or "", "zip://a/b"
    and "::photos.zip"."""
    parts = location.split("::")
    at = next((index for index, part in enumerate(parts) if "://" in part), 0)
    return "".join(f"{part}::" for part in parts[:at]), parts[at], "".join(f"::{part}" for part in parts[at + 1 :])


def _system(location: str) -> tuple[AbstractFileSystem, str]:
    """What a remote location lies in, and its path there. Archives are kept open: fsspec would read an archive's whole
    directory again for each file."""
    before, path, after = _split(location)
    if before or not after:
        return fsspec.url_to_fs(location)
    protocol, _, inner = path.partition("://")
    return _archive(protocol, after), inner


@lru_cache(maxsize=8)
def _archive(protocol: str, rest: str) -> AbstractFileSystem:
    return fsspec.url_to_fs(f"{protocol}://{rest}")[0]


@contextmanager
def open_file(location: str) -> Iterator[IO[bytes]]:
    """A file opened for reading bytes. Raises ValueError that names it where it can't be opened."""
    try:
        if is_remote(location):
            system, path = _system(location)
            opened = system.open(path, "rb")
        elif os.path.isfile(location):  # to open a FIFO or a device could take for ever
            opened = open(location, "rb")
        else:
            raise FileNotFoundError("it is a folder" if os.path.isdir(location) else "no such file")
    except _UNREADABLE as error:
        raise ValueError(f"{location} can't be opened: {error}") from error
    with opened as file:
        yield file


# What local files, S3, Google's and Azure's stores, the hub and memory call size, date and version.
_STATE = ("size", "mtime", "ETag", "LastModified", "etag", "last_modified", "updated", "blob_id", "created")


def state(location: str) -> str:
    """What changes when a file does: its size and date, as far as they are known; of a folder nothing is told.
    Raises ValueError where there is neither."""
    if not is_remote(location):
        if os.path.isdir(location):
            return "folder"
        if not os.path.isfile(location):
            raise ValueError(f"no file or folder at {location}")
        status = os.stat(location)
        return f"{status.st_size} {status.st_mtime_ns}"
    try:
        system, path = _system(location)
        info = system.info(path)
    except _UNREADABLE as error:
        raise ValueError(f"{location} can't be read: {error}") from error
    return " ".join(str(info.get(key, "")) for key in _STATE)


def list_files(
    folder: str,
    suffixes: tuple[str, ...],
    follow_links: bool = False,
    on_link: Callable[[str], None] = lambda name: None,
) -> list[str]:
    """Names relative to `folder`, sorted, of the files in it and below whose name ends in one of `suffixes`, in
    capitals too. Hidden files and folders are left out.

    follow_links: links to folders are followed, each folder is listed once; else on_link is called with their names.
    Raises ValueError where there is no such folder.
    """
    if is_remote(folder):
        try:
            system, root = _system(folder)
            paths = system.find(root) if system.isdir(root) else None
        except _UNREADABLE as error:
            raise ValueError(f"{folder} can't be read: {error}") from error
        if paths is None:
            raise ValueError(f"no folder at {folder}")
        names = [PurePosixPath(path).relative_to(root).as_posix() for path in paths]
        names = [name for name in names if not _hidden(name)]
    else:
        if not os.path.isdir(folder):
            raise ValueError(f"no folder at {folder}")
        names = list(_walk(folder, follow_links, on_link))
    wanted = tuple(suffix.lower() for suffix in suffixes)
    return sorted(name for name in names if name.lower().endswith(wanted))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _walk(folder: str, follow_links: bool, on_link: Callable[[str], None]) -> Iterator[str]:
    """Names of the files of a local folder and below, relative to it; hidden ones and hidden folders left out."""
    listed = set()  # real paths, where links are followed: they may lead in a circle
    for here, folders, files in os.walk(folder, followlinks=follow_links):
        if follow_links:
            if (real := os.path.realpath(here)) in listed:
                folders.clear()
                continue
            listed.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(here).relative_to(folder)
        yield from ((below / name).as_posix() for name in files if not name.startswith("."))
        if not follow_links:
            for name in folders:
                if os.path.islink(os.path.join(here, name)):
                    on_link((below / name).as_posix())


def join(folder: str, name: str) -> str:
    """Where the file `name` of `folder` is, for names that are known to be in it."""
    before, path, after = _split(folder)
    return f"{before}{path}{'' if path.endswith('/') else '/'}{name}{after}"


def inside(folder: str, name: str, follow_links: bool = False) -> str:
    """Where the file `name` of `folder` is. Backslashes part folders where no file has them in its name.

    Raises DataFault of kind `path` where a name leads out of the folder; by a link too, unless follow_links.
    """
    refused = DataFault("path", f"image must lie in {folder} or below, got {name!r:.80}")
    if is_remote(folder):
        name = name.replace("\\", "/")
        if is_remote(name) or name.startswith("/") or ".." in name.split("/"):
            raise refused
        return join(folder, name)
    if "\\" in name and not os.path.exists(os.path.join(folder, name)):
        name = name.replace("\\", "/")
    lexical = os.path.normpath(name)
    if os.path.isabs(name) or lexical.split(os.sep)[0] == "..":
        raise refused
    try:
        path, root = (Path(folder) / lexical).resolve(), Path(folder).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, a loop of links
        raise DataFault("path", f"{name!r:.80} can't be read: {error}") from None
    if not follow_links and not path.is_relative_to(root):
        message = f"{name!r:.80} is or lies behind a link that leads out of {folder}, to {str(path)!r:.200}"
        raise DataFault("path", f"{message}; --follow-links accepts it")
    return str(path)


def rebase(folder: str, name: str, other: str) -> str:
    """What the file `name` of `folder` is called from the folder `other`: with ".." in it, which `inside` refuses,
    where it lies elsewhere."""
    (before, here, after), (other_before, there, other_after) = _split(folder), _split(other)
    if (before, after) != (other_before, other_after):
        return ".."
    return posixpath.relpath(posixpath.join(here, name), there)


def read_image(folder: str, name: str, follow_links: bool = False) -> bytes:
    """The bytes of an image file of `folder`. Raises DataFault of kind `path` (leads out of the folder, is no file,
    can't be read) or `image_bytes` (more than MAX_BYTES)."""
    return read_file(folder, name, MAX_BYTES, "image", follow_links)


def read_file(folder: str, name: str, limit: int, what: str, follow_links: bool = False) -> bytes:
    """The bytes of a file of `folder`, which faults call `what`. Raises DataFault of kind `path`, or of kind
    "`what`_bytes" where there are more than `limit`."""
    location = inside(folder, name, follow_links)
    if not is_remote(folder) and not os.path.isfile(location):
        broken = f" (its link leads to {location!r:.200})" if os.path.islink(os.path.join(folder, name)) else ""
        raise DataFault("path", f"{what} {name!r:.80} is no file{broken}")
    try:
        with open_file(location) as file:
            content = file.read(limit + 1)
    except _UNREADABLE as error:
        raise DataFault("path", f"{what} {name!r:.80} can't be read: {error}") from None
    if len(content) > limit:
        raise DataFault(f"{what}_bytes", f"{what} {name!r:.80} has more than the limit of {limit} bytes")
    return content


def output_fault(path: str | Path) -> str | None:
    """Why no file can be written at `path` (None: one can), to be said before the work and not after it."""
    folder = Path(path).resolve().parent
    if Path(path).is_dir():
        return "it is a folder; give a file"
    if not folder.is_dir():
        return "there is no such folder"
    return None if os.access(path if Path(path).exists() else folder, os.W_OK) else "it can't be written"
