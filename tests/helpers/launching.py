"""Processes that train together: under torchrun, as users start them, and forked off one that has imported
everything, which takes seconds a rank otherwise."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from granvit.world import start, stop


def torchrun(ranks: int, *words: object, **options: Any) -> subprocess.Popen:
    """`torchrun --nproc-per-node RANKS WORDS...`, at a port that the system picks; its output is a pipe."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks, "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", *words]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
        **options,
    )  # fmt: skip


def environment() -> dict[str, str]:
    """For processes that share few cores, find granvit where we do, and say where they are when they are aborted."""
    words = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return os.environ | words


def output_of(process: subprocess.Popen, seconds: float) -> str:
    """What the process prints until it ends. Fails where that takes longer, with the stacks of all its processes."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        for member in psutil.Process(process.pid).children(recursive=True):
            member.send_signal(signal.SIGABRT)
        time.sleep(2)
        process.kill()
        pytest.fail(f"not over after {seconds} s: {process.args}\n{process.communicate()[0]}")


def forked(work: Callable[..., None], *arguments: Any, output: Path) -> multiprocessing.Process:
    """A process, started, that runs work(*arguments), of a helper's top level, and prints to a file."""
    with patch.dict(os.environ, environment()):
        process = server().Process(target=_printing, args=(output, work, arguments))
        process.start()
    return process


def _printing(output: Path, work: Callable[..., None], arguments: tuple) -> None:
    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        work(*arguments)


def server() -> multiprocessing.context.BaseContext:
    """Forks processes off one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["checkpointing", "ranks"])
    return context


def run_ranks(work: Callable[..., None], ranks: int, *arguments: Any, seconds: float = 400) -> None:
    """work(world, *arguments), of a helper's top level, in that many processes. Raises what one of them raises; fails
    where they take longer, or one dies of a signal, with their stacks."""
    server()
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, environment()):
        ends = time.monotonic() + seconds
        context = mp.start_processes(
            _rank, (work, ranks, Path(folder), arguments), ranks, join=False, start_method="forkserver"
        )
        try:
            while not context.join(max(0, ends - time.monotonic())):
                if time.monotonic() > ends:
                    for process in context.processes:
                        os.kill(process.pid, signal.SIGABRT)
                    time.sleep(2)
                    _fail(f"{work.__name__} on {ranks} ranks: not over after {seconds} s", folder)
        except mp.ProcessExitedException as died:  # without an exception, so that its stack is all it left
            _fail(f"{work.__name__} on {ranks} ranks: {died}", folder)


def _fail(said: str, folder: str) -> None:
    pytest.fail("\n".join([said, *(path.read_text() for path in sorted(Path(folder).glob("stack-*")))]))


def _rank(rank: int, work: Callable[..., None], ranks: int, folder: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    local = ranks // 2 if ranks > 2 else ranks  # four are two nodes of two
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(local)}
    with open(folder / f"stack-{rank}", "w") as stack:
        faulthandler.enable(stack)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
        )
        try:
            work(start("cpu")[0], *arguments)
        finally:
            stop()
            faulthandler.disable()
