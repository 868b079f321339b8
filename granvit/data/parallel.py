"""Work that takes long: over several processes, and with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import track


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


def progress(steps: Iterable[Any], title: str, total: int) -> Iterator[Any]:
    """The steps, with a progress bar where stderr is a terminal."""
    console = Console(stderr=True)
    return track(steps, title, total=total, console=console, disable=not console.is_terminal)
