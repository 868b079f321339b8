"""A checkpoint's manifest.json: phase, step and plain values, and of each file its size and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

NAME = "manifest.json"
# no separator, no "..": a manifest can't name anything outside of its folder
_FILE = re.compile(r"rank-\d{5,}\.safetensors")


@dataclass(frozen=True)
class File:
    __pydantic_config__ = {"extra": "forbid", "strict": True}
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """sha256: of all the other fields, as JSON with its keys sorted. Raises ValueError for numbers out of range and for
    names that are not a rank's file."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}
    format: Literal[1]
    phase: str
    step: int
    ranks: int
    values: dict[str, Any]
    files: dict[str, File]
    sha256: str

    def __post_init__(self) -> None:
        if self.step < 0 or self.ranks < 1:
            raise ValueError(f"step is {self.step}, ranks is {self.ranks}; they are at least 0 and 1")
        for name in self.files:
            if not _FILE.fullmatch(name):
                raise ValueError(f"files: {name!r} is not a name such as rank-00000.safetensors")


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint `path`. Raises ValueError naming the file where it is none, or damaged."""
    from pydantic import TypeAdapter, ValidationError

    file = path / NAME
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            raise ValueError("it is not a plain file")
        content = file.read_bytes()
        manifest = TypeAdapter(Manifest).validate_json(content)
        body = json.loads(content)
        if body.pop("sha256") != digest_of(body):
            raise ValueError("its SHA-256 is not the one it names")
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{file} is not a checkpoint's manifest: {first['loc']}: {first['msg']}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a checkpoint's manifest: {error}") from error
    return manifest


def write_manifest(path: Path, body: dict[str, Any]) -> None:
    """Write the manifest of the files in `path`, and wait until all of the folder is on disk. body: every field but
    format and sha256."""
    body = {"format": 1, **body}
    (path / NAME).write_text(json.dumps({**body, "sha256": digest_of(body)}, indent=1))
    sync(path / NAME)
    sync(path)


def check_files(path: Path, rank: int = 0, ranks: int = 1) -> None:
    """Raises ValueError where the checkpoint does not hold the files of its manifest and no others, or one of them is
    damaged. Each of several ranks computes the digests of its part of them."""
    files = read_manifest(path).files
    there = {entry.name for entry in path.iterdir()} - {NAME}
    for name in sorted(files.keys() ^ there):
        fault = "missing" if name in files else "none of the checkpoint's files"
        raise ValueError(f"{path / name} is {fault}")
    for name, file in files.items():
        status = (path / name).lstat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path / name} is not a plain file")
        if status.st_size != file.size:
            raise ValueError(f"{path / name} is damaged: it has {status.st_size} bytes, and should have {file.size}")
    for name in sorted(files)[rank::ranks]:
        if _digest(path / name) != files[name].sha256:
            raise ValueError(f"{path / name} is damaged: its SHA-256 is not the one in {NAME}")


def entry_of(path: Path) -> dict[str, Any]:
    """What a manifest says of this file, once it is on disk."""
    sync(path)
    return {"size": path.stat().st_size, "sha256": _digest(path)}


def sync(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
