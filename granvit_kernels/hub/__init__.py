"""The package as a kernel of Hugging Face's `kernels`: a folder that get_local_kernel loads, and that can be pushed.

`python -m granvit_kernels.hub --output DIR` writes it. The folder holds Python and Triton only: the native library is a
matter of `pip install`, and in its place runs the reference.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]

NAME = "granvit-kernels"
VERSION = 1
"""Of the names in granvit_kernels.__all__ and what they take: raise it where one goes or changes incompatibly."""
BACKENDS = ("cuda", "cpu")

BUILD = f"""\
# Written by python -m granvit_kernels.hub.
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "apache-2.0"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
pyext = ["py", "json"]
"""
"""build.toml: what kernel-builder needs to build the variants anew from torch-ext/."""

FLAKE = """\
{
  description = "granvit_kernels";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""

OLDER = '''\
"""The package in the folder above, for versions of `kernels` that look for it in here."""

import importlib.util
import sys
from pathlib import Path

if "{id}" not in sys.modules:
    spec = importlib.util.spec_from_file_location("{id}", Path(__file__).parents[1] / "__init__.py")
    sys.modules["{id}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["{id}"])
__all__ = sys.modules["{id}"].__all__
globals().update((name, getattr(sys.modules["{id}"], name)) for name in __all__)
'''


def write(output: Path) -> None:
    """Write the kernel's folder, in place of an earlier one; a reader sees the old or the new one.

    Raises FileExistsError where `output` is a file, holds something that this did not write, is the root folder or
    inside the package.
    """
    output = output.resolve()
    if output.parent == output or PACKAGE in output.parents:  # the next would copy this one, as the package's
        raise FileExistsError(f"{output} is the root folder, or inside the package; it takes a folder elsewhere")
    output.parent.mkdir(parents=True, exist_ok=True)
    new, old = (output.with_name(f".{output.name}.{os.getpid()}.{state}") for state in ("new", "old"))
    try:
        fill(new)
        refuse_strange(output, {entry.name for entry in new.iterdir()})
        if output.exists():
            output.rename(old)
        try:
            new.rename(output)
        except BaseException:
            if old.exists():
                old.rename(output)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def refuse_strange(output: Path, names: set[str]) -> None:
    """FileExistsError unless `output` is missing, empty, or an earlier kernel's folder: its build.toml, and no other
    names."""
    if not output.exists():
        return
    if not output.is_dir():
        raise FileExistsError(f"{output} is a file; it takes a folder that is new, empty, or written by this command")
    held = {entry.name for entry in output.iterdir()}
    build = output / "build.toml"
    ours = build.is_file() and build.read_text(errors="replace").startswith(BUILD.splitlines()[0])
    strange = sorted(held - names if ours else held)
    if strange:
        raise FileExistsError(
            f"{output} holds {strange[0]}, which this command did not write; it takes a folder that is new, empty, or "
            "written by this command"
        )


def fill(folder: Path) -> None:
    """The kernel's files, in a folder that does not exist yet."""
    sources = package_files()
    content = hashlib.sha256()
    for path, data in sources.items():
        content.update(f"{path} {len(data)}\n".encode() + data)
    for backend in BACKENDS:
        # Operators are registered as torch.ops.ID: another content takes another name, so that both can be loaded.
        identifier = f"_{NAME.replace('-', '_')}_{backend}_{content.hexdigest()[:8]}"
        older = OLDER.format(id=identifier).encode()
        save(folder / "build" / f"torch-{backend}", {**sources, f"{NAME.replace('-', '_')}/__init__.py": older})
        write_metadata(folder / "build" / f"torch-{backend}", identifier, backend)
    save(folder / "torch-ext" / NAME.replace("-", "_"), sources)
    here = Path(__file__).parent
    save(
        folder,
        {
            "benchmarks/benchmark.py": (here / "benchmark.py").read_bytes(),
            "CARD.md": (here / "CARD.md").read_bytes(),
            "build.toml": BUILD.encode(),
            "flake.nix": FLAKE.encode(),
        },
    )


def package_files() -> dict[str, bytes]:
    """{path in the package: content} of what a kernel consists of: no commands, and nothing that was compiled."""
    paths = [*PACKAGE.rglob("*.py"), *PACKAGE.glob("tuned/*.json")]
    named = {path.relative_to(PACKAGE).as_posix(): path for path in paths}
    return {
        name: named[name].read_bytes()
        for name in sorted(named)
        if name != "__main__.py" and not name.startswith("hub/")
    }


def save(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_metadata(variant: Path, identifier: str, backend: str) -> None:
    """metadata.json, with a hash of every other file."""
    hashes = {
        path.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(variant.rglob("*"))
        if path.is_file()
    }
    metadata = {
        "name": NAME, "id": identifier, "version": VERSION, "license": "apache-2.0", "python-depends": [],
        "backend": {"type": backend}, "digest": {"algorithm": "sha256", "files": hashes},
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
