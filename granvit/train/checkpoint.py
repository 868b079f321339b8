"""Checkpoints of a run: safetensors and JSON in a folder each, written by all ranks while training goes on.

A checkpoint is a folder PHASE-STEP or PHASE-STEP-final that holds

    rank-00000.safetensors ...   what each rank wrote: tensors, or pieces of them and where they lie in the whole
    manifest.json                phase, step, plain values, size and SHA-256 of each file above, and of itself

torch.distributed.checkpoint (DCP) copies the tensors, plans who writes what, and runs the writing in a thread; so the
number of ranks that read need not be the number that wrote. Ours is what it does not do: a checkpoint is written under
another name, synced, and renamed when the manifest is in it, so that a crash leaves no half of one behind that is
taken for a whole; and nothing that is read can run code.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor

from granvit.errors import Failed
from granvit.train import retention
from granvit.train.manifest import check_files, digest_of, entry_of, read_manifest, write_manifest
from granvit.world import PATIENCE, World

log = logging.getLogger(__name__)
# torch says so at each save and load of a run that is one process, where it is what we want
warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")

SINGLE = World()


class Checkpoints:
    """The folder `checkpoints/` of a run, which all its ranks see.

    Of a phase's checkpoints the newest `keep` stay, besides those whose step is a multiple of `keep_every` (0: none)
    and the best, whose values have the lowest LOSS: the link PHASE-best leads to it. A final one stays, and takes the
    place of the newest.

    Every rank makes one, and calls each method at the same point. (What goes on in the background has a gloo group of
    its own, so that it can't get between; wait() before the processes part.) failures: how many saves in a row have
    failed, the same number on every rank; it changes in wait(), with which save() begins.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0, world: World = SINGLE) -> None:
        if keep < 1 or keep_every < 0:
            raise ValueError(f"of the checkpoints at least one is kept, got keep={keep}, keep_every={keep_every}")
        self.folder, self.keep, self.keep_every, self.world = folder, keep, keep_every, world
        self.failures = 0
        self._background = dist.new_group(timeout=PATIENCE, backend="gloo") if world.ranks > 1 else None
        self._staged = ""  # what the copies in host memory are of
        self._written: threading.Event | None = None
        self._error: str | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if world.leads:
            retention.restore(folder)

    def save(self, phase: str, step: int, tensors: Mapping[str, Tensor], values: dict, final: bool = False) -> None:
        """Copy `tensors` to host memory, and write them in the background; where `final`, wait until they are written.

        Every rank gives the same names. A DTensor is written by all ranks, each its piece; any other tensor is the same
        on every rank, and one of them writes it. values: anything JSON takes; those of the first rank are written, and
        a tuple comes back as a list. A save that fails is logged and counted (see failures), and leaves the folder as
        it was. Raises ValueError where the ranks' tensors differ in name, shape or dtype.
        """
        self.wait()
        name = f"{phase}-{step:07d}{'-final' if final else ''}"
        if not retention.NAME.fullmatch(name):
            raise ValueError(f"{name!r} can't be a checkpoint's name: a phase is lower-case letters, digits and _")
        body = {"phase": phase, "step": step, "ranks": self.world.ranks, "values": values}
        body = json.loads(json.dumps(body))  # now, as the caller may change the values while we write
        self._prepare_copies(tensors)
        began, written = time.perf_counter(), threading.Event()
        # DCP's executor is no daemon: an interpreter that ends writes its checkpoint to the end.
        writing = dcp.async_save(
            share(tensors, self.world), storage_writer=_Writer(self.folder, name, self.world.rank, body),
            planner=DefaultSavePlanner(flatten_state_dict=False), process_group=self._background,
            async_stager=self._stager, no_dist=self.world.ranks == 1,
        )  # fmt: skip
        self._written = written
        writing.add_done_callback(lambda writing: self._conclude(writing, name, began, written))
        if final:
            self.wait()
            self._staged = ""
            del self._stager  # and the memory of its copies

    def wait(self) -> None:
        """Until the last save is on disk, or has failed."""
        if self._written is None:
            return
        self._written.wait()
        self._written = None
        self.failures = 0 if self._error is None else self.failures + 1

    def newest(self, phase: str) -> Path | None:
        """The checkpoint from which `phase` goes on, or None. Raises ValueError where its manifest is damaged (on the
        other ranks Failed): one flipped bit must not send a run back, or a stage that has ended to its begin."""

        def last() -> Path | None:
            path = next(reversed(retention.checkpoints_of(self.folder, phase)), None)
            if path is not None:
                with _advice(path):
                    read_manifest(path)
            return path

        self.wait()
        return self.world.first(last)  # a network's file system may show the other ranks a new one later

    def final(self, phase: str) -> Path | None:
        """The checkpoint with which `phase` ended, or None."""
        newest = self.newest(phase)
        return newest if newest is not None and newest.name.endswith("-final") else None

    def _prepare_copies(self, tensors: Mapping[str, Tensor]) -> None:
        """Have a stager whose copies are of such tensors, or of none yet. Raises ValueError, on all ranks, where they
        were given different ones."""
        table = sorted((name, str(t.dtype), list(t.shape), isinstance(t, DTensor)) for name, t in tensors.items())
        staged, *others = self.world.gather(digest_of({"tensors": table}))
        if set(others) - {staged}:
            raise ValueError("the ranks were given tensors of other names, shapes or dtypes to save in one checkpoint")
        if staged != self._staged:
            # Copies that are kept are pinned, which takes a GPU. DefaultStager would not do: its copies of tensors that
            # share memory (tied embeddings) share memory too, which safetensors refuses.
            self._stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())
            self._staged = staged

    def _conclude(self, writing: Future, name: str, began: float, written: threading.Event) -> None:
        """In DCP's thread, when all ranks have come to the same end of it."""
        error = writing.exception()
        self._error = None if error is None else _cause(error)
        try:
            if self.world.leads and error is not None:
                shutil.rmtree(retention.aside(self.folder, name), ignore_errors=True)
                log.warning("checkpoint %s could not be written, the one before it stands: %s", name, self._error)
            elif self.world.leads:
                log.info("checkpoint %s written in %.1f s", name, time.perf_counter() - began)
                retention.prune(self.folder, name, self.keep, self.keep_every)
        finally:
            written.set()  # the future itself is done before its callbacks are


class _Writer(dcp.HuggingFaceStorageWriter):
    """HuggingFaceStorageWriter but for two things. Its files become visible together, as a checkpoint whose manifest
    has their checksums. And they are written tensor by tensor: its own builds the whole file in memory, twice, with
    Python's lock held, so that training stands still for 1 s a GB."""

    def __init__(self, folder: Path, name: str, rank: int, body: dict) -> None:
        super().__init__(str(retention.aside(folder, name)), save_distributed=True)
        self.folder, self.name, self.body = folder, name, body
        self.file = f"rank-{rank:05d}.safetensors"

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        return plan  # the folder is made after the first rank has cleared what crashes left

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        """On the first rank."""
        retention.clear(self.folder)
        return plans

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future[list]:
        """This rank's file, if it has anything to write; its value is [(name, entry in the manifest)]."""
        future: torch.futures.Future[list] = torch.futures.Future()
        path = Path(self.path) / self.file
        offsets = {i.index.fqn: {"saved_offsets": list(i.tensor_data.chunk.offsets)} for i in plan.items}
        metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
        try:
            path.parent.mkdir(exist_ok=True)
            if plan.items:
                save_file({i.index.fqn: planner.resolve_data(i) for i in plan.items}, path, metadata=metadata)
            future.set_result([(path.name, entry_of(path))] if plan.items else [])
        except Exception as error:  # as one that pickles, since it goes to the other ranks, which would hang
            raise OSError(f"{path.name}: {error}") from error
        return future

    def finish(self, metadata: dcp.Metadata, results: list[list[tuple[str, dict]]]) -> None:
        """On the first rank, when all have written."""
        written = {name: entry for of_rank in results for name, entry in of_rank}
        write_manifest(Path(self.path), {**self.body, "files": written})
        retention.publish(self.folder, self.name)


def load(path: Path, tensors: Mapping[str, Tensor], subset: bool = False, world: World = SINGLE) -> dict:
    """Fill `tensors` in place from the checkpoint `path`, whatever number of ranks wrote it; returns its plain values.

    subset: the checkpoint may hold more tensors than those. world: the ranks that read it, every one of which calls
    this; each checks a part of the files. Raises ValueError, on all ranks and before any tensor has changed, for a
    damaged file (naming it) and for tensors that are missing, unexpected, or of another shape or dtype; OSError where a
    disk fails later than that.
    """
    path = Path(path)
    try:
        with _advice(path):
            world.each(lambda: check_files(path, world.rank, world.ranks))
        world.each(lambda: _check_tensors(path, tensors, subset))
    except Failed as error:  # another rank has
        raise ValueError(str(error)) from error
    reader, planner = dcp.HuggingFaceStorageReader(str(path)), DefaultLoadPlanner(flatten_state_dict=False)
    group, no_dist = world.control, world.ranks == 1
    try:
        dcp.load(dict(tensors), storage_reader=reader, planner=planner, process_group=group, no_dist=no_dist)
    except dcp.CheckpointException as error:  # a BaseException
        raise OSError(f"{path} could not be read to its end: {_cause(error)}") from error
    return read_values(path)


def read_values(path: Path) -> dict:
    """The plain values of the checkpoint `path`, without its tensors. Raises ValueError if its manifest is damaged."""
    return read_manifest(Path(path)).values


@contextmanager
def _advice(path: Path) -> Iterator[None]:
    """Let what is found wrong inside be said with what to do about it."""
    try:
        yield
    except (ValueError, Failed) as error:
        advice = f"remove the folder {path}, and the same command goes on from what is there besides"
        raise ValueError(f"{error}; {advice}") from error


def share(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """What this rank copies and writes: its pieces of the DTensors, and a part of the others. DCP's planner would
    share these out as well, but only after each rank has copied all."""
    whole = sorted((n for n, t in tensors.items() if not isinstance(t, DTensor)), key=lambda n: (-tensors[n].nbytes, n))
    mine = set(whole[world.rank :: world.ranks])
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor) or name in mine}


def _cause(error: BaseException) -> str:
    """What went wrong, in a line."""
    if isinstance(error, dcp.CheckpointException):  # of all ranks: {rank: (error, its traceback)}
        rank, (error, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"rank {rank}: {_cause(error)}"
    return str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], subset: bool) -> None:
    """Raises ValueError where the checkpoint's tensors are not those to be filled; DCP would cast other dtypes."""
    try:
        stored = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except Exception as error:  # what safetensors and torch raise over headers is of many kinds
        raise ValueError(f"{path} has files that are not a checkpoint's ({type(error).__name__}: {error})") from error
    theirs = {name: f"{saved.properties.dtype} {list(saved.size)}" for name, saved in stored.items()}
    ours = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}
    faults = {
        "lacks tensors": [name for name in ours if name not in theirs],
        "has tensors that are not known here": [name for name in theirs if name not in ours and not subset],
        "has tensors of another shape or dtype": [
            f"{name} ({theirs[name]} there, {ours[name]} here)"
            for name in ours
            if name in theirs and ours[name] != theirs[name]
        ],
    }
    for fault, names in faults.items():
        if names:
            raise ValueError(f"{path} {fault} ({len(names)}): {', '.join(names[:3] + ['...'] * (len(names) > 3))}")
