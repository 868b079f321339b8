"""Checkpoints of a run: safetensors and JSON in a folder each, written aside by all ranks while training goes on.

A checkpoint is a folder PHASE-STEP or PHASE-STEP-final that holds

    rank-00000.safetensors ...   what each rank wrote: tensors, or pieces of them and where they lie in the whole
    manifest.json                phase, step, plain values, size and SHA-256 of each file above, and of itself

It is written under another name, synced, and renamed when the manifest is in it: a crash leaves no half of one behind
that is taken for a whole. The number of ranks that read need not be the number that wrote (torch.distributed.checkpoint
cuts the pieces anew), and nothing that is read can run code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_save_plan,
)
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from granvit.train.manifest import Manifest

log = logging.getLogger(__name__)
# torch says so at each save and load of a run that is one process, where it is what we want
warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")

PATIENCE = timedelta(hours=24)  # of a rank whose part is written, with those that still write
_NAME = re.compile(r"(?P<phase>[a-z][a-z0-9_]*)-(?P<step>\d{7,})(?P<final>-final)?")
_ASIDE = (".tmp", ".old")
_MANIFEST = "manifest.json"
LOSS = "held_out_loss"
"""The value of a checkpoint by which it is the best of its phase: the lowest."""

T = TypeVar("T")


class Checkpoints:
    """The folder `checkpoints/` of a run, which all its ranks see.

    Of a phase's checkpoints the newest `keep` stay, besides those whose step is a multiple of `keep_every` (0: none)
    and the best, whose values have the lowest LOSS: the link PHASE-best leads to it. A final one stays, and takes the
    place of the newest.

    group: a gloo group of all ranks, None in a run of one process. Every rank makes one, and calls each method at the
    same point: they agree through it. (What goes on in the background has a group of its own, so that it can't get
    between; wait() before the processes part.) failures: how many saves in a row have failed, the same number on every
    rank; it changes in wait(), with which save() begins.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0, group: dist.ProcessGroup | None = None) -> None:
        if keep < 1 or keep_every < 0:
            raise ValueError(f"of the checkpoints at least one is kept, got keep={keep}, keep_every={keep_every}")
        self.folder, self.keep, self.keep_every, self.group = folder, keep, keep_every, group
        self.failures = 0
        self._first = group is None or dist.get_rank(group) == 0
        self._background = None
        if group is not None:
            ranks = dist.get_process_group_ranks(group)
            self._background = dist.new_group(ranks, PATIENCE, "gloo", use_local_synchronization=True)
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if self._first:
            self._restore()

    def save(self, phase: str, step: int, tensors: Mapping[str, Tensor], values: dict, final: bool = False) -> None:
        """Copy `tensors` to host memory, and write them in the background; where `final`, wait until they are written.

        Every rank gives the same names. A DTensor is written by all ranks, each its piece; any other tensor is the same
        on every rank, and one of them writes it. values: anything JSON takes; those of the first rank are written, and
        a tuple comes back as a list. A save that fails is logged and counted (see failures), and leaves the folder as
        it was. Raises ValueError where the ranks' tensors differ in name, shape or dtype.
        """
        self.wait()
        name = f"{phase}-{step:07d}{'-final' if final else ''}"
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} can't be a checkpoint's name: a phase is lower-case letters, digits and _")
        body = {"phase": phase, "step": step, "ranks": _ranks(self.group), "values": values}
        body = json.loads(json.dumps(body))  # now, as the caller may change the values while we write
        mine = _share(tensors, self.group)
        plan = create_default_local_save_plan({key: tensors[key] for key in mine}, is_coordinator=False)
        self._copies = _copy(tensors, mine, self._copies)
        # not a daemon: an interpreter that ends writes its checkpoint to the end
        self._thread = threading.Thread(target=self._write, args=(name, _Planner(plan, self._copies), body))
        self._thread.start()
        if final:
            self.wait()
            self._copies = {}

    def wait(self) -> None:
        """Until the last save is on disk, or has failed."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        self.failures = 0 if self._error is None else self.failures + 1

    def newest(self, phase: str) -> Path | None:
        """The checkpoint from which `phase` goes on, or None. Raises ValueError where its manifest is damaged: one
        flipped bit must not send a run back, or a stage that has ended to its begin."""

        def last() -> Path | None:
            folders = checkpoints_of(self.folder, phase)
            if not folders:
                return None
            try:
                _manifest(folders[-1])
            except ValueError as error:
                raise ValueError(f"{error}; {_advice(folders[-1])}") from error
            return folders[-1]

        self.wait()
        # the first rank's answer: a network's file system may show the others a new one later
        return _together(self.group, last if self._first else None)[0]

    def final(self, phase: str) -> Path | None:
        """The checkpoint with which `phase` ended, or None."""
        newest = self.newest(phase)
        return newest if newest is not None and newest.name.endswith("-final") else None

    def _write(self, name: str, planner: _Planner, body: dict) -> None:
        """The thread: all ranks write their files, then the first makes a checkpoint of them. All find the same
        error, or none."""
        began, group, work = time.perf_counter(), self._background, self.folder / f".{name}.tmp"
        mine = _file_name(0 if group is None else dist.get_rank(group))
        try:
            _together(group, self._clear if self._first else None)
            writer = _Writer(work, mine)
            dcp.save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
            written = _together(group, lambda: {mine: _sync(work / mine)} if (work / mine).exists() else {})
            body |= {"files": {file: entry for files in written for file, entry in files.items()}}
            _together(group, (lambda: self._publish(work, name, body)) if self._first else None)
            self._error = None
        except (Exception, dcp.CheckpointException) as error:
            self._error = _cause(error)
        if self._first and self._error is not None:
            shutil.rmtree(work, ignore_errors=True)
            log.warning("checkpoint %s could not be written, the one before it stands: %s", name, self._error)
        elif self._first:
            log.info("checkpoint %s written in %.1f s", name, time.perf_counter() - began)
            self._prune(body["phase"], body["step"], name)

    def _restore(self) -> None:
        """Put back what a crash found between the two renames of _publish."""
        for path in self.folder.glob(".*.old"):
            if not (self.folder / path.stem[1:]).exists():
                path.rename(self.folder / path.stem[1:])

    def _clear(self) -> None:
        """Remove what crashes left."""
        for path in self.folder.iterdir():
            if path.name.startswith(".") and path.suffix in _ASIDE and _NAME.fullmatch(path.stem[1:]):
                shutil.rmtree(path)

    def _publish(self, work: Path, name: str, body: dict) -> None:
        """Give the written files in `work` their manifest, and their name."""
        body = {"format": 1, **body}
        with (work / _MANIFEST).open("w") as file:
            json.dump({**body, "sha256": _digest_of(body)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(work)
        path, old = self.folder / name, self.folder / f".{name}.old"
        if path.exists():  # saved twice (then it is as good), or damaged, so that the run has gone back
            path.rename(old)
        try:
            work.rename(path)
        except OSError:
            self._restore()
            raise
        _sync_folder(self.folder)
        if old.exists():
            shutil.rmtree(old, ignore_errors=True)

    def _prune(self, phase: str, step: int, name: str) -> None:
        """Remove what isn't to be kept now that `name` is there."""
        steps = {path: int(_NAME.fullmatch(path.name)["step"]) for path in checkpoints_of(self.folder, phase)}
        running = [path for path in steps if not path.name.endswith("-final")]
        # later ones: the run could not go on from them and went back, so they are none of its past
        past = [path for path in running if steps[path] <= step]
        kept = [] if name.endswith("-final") else past[-self.keep :]
        best = best_of([path for path in steps if path in past or path not in running])
        if best is not None:
            kept = [*kept, best]
            self._link(f"{phase}-best", best.name)
        for path in running:
            lasting = self.keep_every and steps[path] % self.keep_every == 0 and path in past
            if path not in kept and not lasting:
                try:
                    aside = self.folder / f".{path.name}.tmp"
                    path.rename(aside)  # so that nobody takes what a crash leaves of it for a checkpoint
                    shutil.rmtree(aside)
                except OSError as error:
                    log.warning("the checkpoint %s, no longer needed, could not be removed: %s", path, error)

    def _link(self, name: str, target: str) -> None:
        """Let the link `name` lead to `target`, another name in the folder, at every moment to this or the one before.
        """
        link, aside = self.folder / name, self.folder / f".{name}"
        try:
            aside.unlink(missing_ok=True)
            aside.symlink_to(target)
            if link.is_dir() and not link.is_symlink():  # somebody copied the run, and what the link led to with it
                shutil.rmtree(link)
            aside.replace(link)
        except OSError as error:
            log.warning("%s can't become a link to %s, the best checkpoint so far: %s", link, target, error)


def checkpoints_of(folder: Path, phase: str) -> list[Path]:
    """The checkpoints of `phase` in a run's `checkpoints/`, the newest last."""
    checkpoints = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and match["phase"] == phase and path.is_dir() and not path.is_symlink():
            checkpoints.append((int(match["step"]), match["final"] is not None, path))
    return [path for _, _, path in sorted(checkpoints)]


def best_of(checkpoints: list[Path]) -> Path | None:
    """The checkpoint with the lowest LOSS among its values; None where none has one."""
    losses = {}
    for path in checkpoints:
        with suppress(ValueError):  # damaged: the best of the others is
            losses[path] = _manifest(path).values.get(LOSS, math.inf)
    best = min(losses, key=losses.get, default=None)
    return best if losses.get(best, math.inf) < math.inf else None


def load(
    path: Path, tensors: Mapping[str, Tensor], subset: bool = False, group: dist.ProcessGroup | None = None
) -> dict:
    """Fill `tensors` in place from the checkpoint `path`, whatever number of ranks wrote it; returns its plain values.

    subset: the checkpoint may hold more tensors than those. group: a gloo group of all ranks that read it, every one of
    which calls this; each checks a part of the files. Raises ValueError, on all ranks and before any tensor has
    changed, for a damaged file (naming it) and for tensors that are missing, unexpected, or of another shape or dtype;
    OSError where a disk fails later than that.
    """
    path = Path(path)

    def check() -> None:
        manifest = _manifest(path)
        _check_folder(path, manifest)
        rank = 0 if group is None else dist.get_rank(group)
        for name in sorted(manifest.files)[rank :: _ranks(group)]:
            if _digest(path / name) != manifest.files[name].sha256:
                raise ValueError(f"{path / name} is damaged: its SHA-256 is not the one in {_MANIFEST}")

    try:
        _together(group, check)
    except ValueError as error:
        raise ValueError(f"{error}; {_advice(path)}") from error
    _together(group, lambda: _check_tensors(path, tensors, subset))
    reader, planner = dcp.HuggingFaceStorageReader(str(path)), DefaultLoadPlanner(flatten_state_dict=False)
    try:
        dcp.load(dict(tensors), storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:  # a BaseException
        raise OSError(f"{path} could not be read to its end: {_cause(error)}") from error
    return _manifest(path).values


def _advice(path: Path) -> str:
    return f"remove the folder {path}, and the same command goes on from what is there besides"


def read_values(path: Path) -> dict:
    """The plain values of the checkpoint `path`, without its tensors. Raises ValueError if its manifest is damaged."""
    return _manifest(Path(path)).values


class _Planner(DefaultSavePlanner):
    """Writes `copies` by a plan that was made from the tensors themselves, which may have changed since."""

    def __init__(self, plan: dcp.SavePlan, copies: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self.plan, self.copies = plan, copies

    def create_local_plan(self) -> dcp.SavePlan:
        return self.plan

    def resolve_data(self, write_item: dcp.planner.WriteItem) -> Tensor:
        return self.copies[write_item.index.fqn]


class _Writer(dcp.HuggingFaceStorageWriter):
    """HuggingFaceStorageWriter but for how the file comes about.

    Its own builds the whole file in memory, twice, with Python's lock held: training stands still for 1 s a GB.
    """

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.name = name

    def write_data(self, plan: dcp.SavePlan, planner: _Planner) -> torch.futures.Future[list]:
        future: torch.futures.Future[list] = torch.futures.Future()
        future.set_result([])
        if plan.items:
            offsets = {i.index.fqn: {"saved_offsets": list(i.tensor_data.chunk.offsets)} for i in plan.items}
            try:
                save_file(
                    {item.index.fqn: planner.resolve_data(item) for item in plan.items},
                    Path(self.path) / self.name,
                    metadata={"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)},
                )
            except Exception as error:  # of a kind that pickles, since it goes to the other ranks, which would hang
                raise OSError(f"{self.name}: {error}") from error
        return future


def _share(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> list[str]:
    """The names this rank writes: its pieces of the DTensors, and a part of the others. Raises ValueError, on all
    ranks, where they were given different ones."""
    if group is None:
        return list(tensors)
    table = sorted((name, str(t.dtype), list(t.shape), isinstance(t, DTensor)) for name, t in tensors.items())
    tables: list[Any] = [None] * _ranks(group)
    dist.all_gather_object(tables, _digest_of({"tensors": table}), group=group)
    if len(set(tables)) > 1:
        raise ValueError("the ranks were given tensors of different names, shapes or dtypes to save in one checkpoint")
    loads, rank, mine = [0] * _ranks(group), dist.get_rank(group), []
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        writer = rank
        if not isinstance(tensors[name], DTensor):  # the largest first, to whom has least so far
            writer = loads.index(min(loads))
            loads[writer] += tensors[name].nbytes
        if writer == rank:
            mine.append(name)
    return mine


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], names: list[str], kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory of this rank's pieces of `names`; in those of `kept` that fit, since fresh memory takes
    longer to get than to fill. Tensors that share memory (tied embeddings) get a copy each."""
    copies = {}
    for name in names:
        tensor = tensors[name].to_local() if isinstance(tensors[name], DTensor) else tensors[name]
        copy = kept.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        copies[name] = copy.copy_(tensor, non_blocking=True)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copies


def _ranks(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _together(group: dist.ProcessGroup | None, action: Callable[[], T] | None) -> list[T]:
    """What `action` returns on each rank; None: nothing to do on this one. If it fails on any, ValueError on all."""
    mine = cause = None
    try:
        mine = action() if action is not None else None
    except Exception as error:  # any: the other ranks wait
        cause = error
    results: list[Any] = [(mine, None if cause is None else _cause(cause))]
    if group is not None:
        results, own = [None] * _ranks(group), results[0]
        dist.all_gather_object(results, own, group=group)
    for rank, (_, failure) in enumerate(results):
        if failure is not None:
            raise ValueError(failure if group is None else f"rank {rank}: {failure}") from cause
    return [result for result, _ in results]


def _cause(error: BaseException) -> str:
    """What went wrong, in a line."""
    if isinstance(error, dcp.CheckpointException):  # of all ranks: {rank: (error, its traceback)}
        rank, (error, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"rank {rank}: {_cause(error)}"
    return str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"


def _manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint `path`. Raises ValueError naming the file where it is none, or damaged."""
    from pydantic import ValidationError

    from granvit.train.manifest import Manifest

    file = path / _MANIFEST
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            raise ValueError("it is not a plain file")
        body = json.loads(file.read_bytes())
        manifest = Manifest.model_validate(body)
        if body.pop("sha256") != _digest_of(body):
            raise ValueError("its SHA-256 is not the one it names")
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{file} is not a checkpoint's manifest: {first['loc']}: {first['msg']}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a checkpoint's manifest: {error}") from error
    return manifest


def _check_folder(path: Path, manifest: Manifest) -> None:
    """Raises ValueError where the folder doesn't hold the manifest's files, of the sizes it says, and no others."""
    there = {entry.name for entry in path.iterdir()} - {_MANIFEST}
    for name in sorted(manifest.files.keys() - there):
        raise ValueError(f"{path / name} is missing")
    for name in sorted(there - manifest.files.keys()):
        raise ValueError(f"{path / name} is none of the checkpoint's files")
    for name, file in manifest.files.items():
        status = (path / name).lstat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path / name} is not a plain file")
        if status.st_size != file.size:
            raise ValueError(f"{path / name} is damaged: it has {status.st_size} bytes, and should have {file.size}")


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], subset: bool) -> None:
    """Raises ValueError where the checkpoint's tensors are not those to be filled."""
    try:
        stored = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except Exception as error:  # what safetensors and torch raise over headers is of many kinds
        raise ValueError(f"{path} has files that are not a checkpoint's ({type(error).__name__}: {error})") from error
    _none_of([n for n in tensors if n not in stored], f"{path} lacks tensors")
    _none_of([n for n in stored if n not in tensors and not subset], f"{path} has tensors that are not known here")
    differing, holes = [], []
    for name, tensor in tensors.items():
        saved = stored[name]
        if saved.size != tensor.shape or saved.properties.dtype != tensor.dtype:
            theirs, ours = ((list(size), kind) for size, kind in (
                (saved.size, saved.properties.dtype), (tensor.shape, tensor.dtype)))  # fmt: skip
            differing.append(f"{name} ({theirs[1]} {theirs[0]} there, {ours[1]} {ours[0]} here)")
        elif sum(math.prod(chunk.sizes) for chunk in saved.chunks) != math.prod(saved.size):
            holes.append(name)
    _none_of(differing, f"{path} has tensors of another shape or dtype")
    _none_of(holes, f"{path} has tensors of which pieces are missing")


def _none_of(names: list[str], fault: str) -> None:
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(f"{fault} ({len(names)}): {shown}")


def _sync(path: Path) -> dict:
    """Wait until `path` is on disk. Returns its entry in the manifest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": _digest(path)}


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _digest_of(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
