"""Work that takes long: over several processes, and with a progress bar."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import Progress, track

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


T = TypeVar("T")


@contextmanager
def process_map(workers: int | None, tasks: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map` over so many processes (None: one a core), or the builtin for fewer than two of either."""
    processes = min(tasks, os.cpu_count() or 1 if workers is None else workers)
    if processes < 2:
        yield map
        return
    quiet = (signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a process without a word: the caller says it
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), signal.signal, quiet) as pool:
        try:
            yield pool.map
        except BrokenProcessPool as error:
            raise ValueError("a worker process died, for want of memory perhaps; fewer --workers need less") from error
        finally:
            pool.shutdown(cancel_futures=True)


def over_processes(function: Callable[[int], T], items: Sequence[int], workers: int | None) -> Iterator[T]:
    """function(item) of each, as soon as it is there, in so many processes (None: one a core; fewer than two: this
    one). A process gets the function once, so that it may keep what it loads. Raises ValueError where one dies."""
    processes = min(os.cpu_count() or 1 if workers is None else workers, len(items))
    if processes <= 1:
        yield from map(function, items)
        return
    # Spawn: a function may hold what doesn't survive a fork (CUDA, connections, threads).
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _keep, (function,)) as pool:
        ahead = iter(items)
        with blocked(signal.SIGINT):  # a process that Ctrl-C ended while it imports would say so, in many lines
            running = {pool.submit(_call, item) for item in islice(ahead, 2 * processes)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    result = future.result()
                    running |= {pool.submit(_call, item) for item in islice(ahead, 1)}
                    yield result
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process died, for want of memory perhaps; the same command goes on, with fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _keep(function: Callable[[int], Any]) -> None:
    global _kept
    _kept = function
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word: the caller says it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    end_with_parent()


def _call(item: int) -> Any:
    return _kept(item)


def progress_bar() -> Progress:
    """One that shows where stderr is a terminal."""
    console = Console(stderr=True)
    return Progress(console=console, disable=not console.is_terminal)


def progress(steps: Iterable[Any], title: str, total: int) -> Iterator[Any]:
    """The steps, with a progress bar where stderr is a terminal."""
    console = Console(stderr=True)
    return track(steps, title, total=total, console=console, disable=not console.is_terminal)


@contextmanager
def shared_memory(workers: int) -> Iterator[None]:
    """For a DataLoader with so many workers. Raises ValueError where /dev/shm has no room for what they hand over, or
    for the locks that they begin with."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        # Bus error: pages of a file of shared memory are taken when they are first written. An error of a worker's own
        # comes here without its number.
        full = any(sign in str(error) for sign in ("unable to allocate shared memory", "Bus error"))
        if not (workers and (full or getattr(error, "errno", None) in (errno.ENOSPC, errno.EROFS))):
            raise
        raise ValueError(
            "workers hand over what they read in /dev/shm, which is full: make it larger (docker --shm-size 8g), or "
            "read without workers (--data.workers 0)"
        ) from None


@contextmanager
def blocked(number: signal.Signals) -> Iterator[None]:
    """While processes are started that keep from a signal, or see to it themselves. Libraries start threads of their
    own in a process before a line of ours runs there: those have to have it from their parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begun(loader: DataLoader) -> Iterator[Any]:
    """iter(loader), of one whose processes keep from SIGTERM."""
    with blocked(signal.SIGTERM):
        return iter(loader)


def end_with_parent(keep_from_sigterm: bool = False) -> None:
    """For a process that works for its parent: end with it, also where that is killed and can't say so.

    keep_from_sigterm: of SIGTERM take only the parent's. torchrun, schedulers and timeout send it to all processes of a
    run, to have it saved: a worker that went then would take the run with it, and one forked with the run's handler
    for it would raise in the middle of handing something over, and keep the lock.
    """
    if keep_from_sigterm and not hasattr(signal, "sigtimedwait"):  # macOS
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        keep_from_sigterm = False
    if keep_from_sigterm:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_watch_parent, args=(keep_from_sigterm,), daemon=True).start()


def _watch_parent(for_sigterm: bool) -> None:
    parent = multiprocessing.parent_process()
    # A fork server's children are not the parent's: its end shows by a pipe's. Under fork, though, later children hold
    # that pipe open too.
    direct = os.getppid() == parent.pid
    while os.getppid() == parent.pid if direct else parent.is_alive():
        if not for_sigterm:
            time.sleep(2)
        elif (told := signal.sigtimedwait({signal.SIGTERM}, 2)) and told.si_pid == parent.pid:
            break
    os._exit(0)
