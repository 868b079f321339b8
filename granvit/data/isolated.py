"""Calls in a process of their own: what a C library does with a hostile file must not end a build.

A guard against crashes, endless loops and floods of memory; not against a library that is taken over.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from granvit.data.parallel import end_with_parent
from granvit.questions.schema import DataFault


class Isolated:
    """`function`, of a module's top level, called in a process that is started when first needed and after it died.

    seconds: a call may take. memory: bytes that the process may take besides what its modules do. Either limit, or a
    crash, is a DataFault of kind `crash`; what the function raises is raised here.
    """

    def __init__(self, function: Callable[..., Any], seconds: float, memory: int) -> None:
        self.function, self.seconds, self.memory = function, seconds, memory
        self._process: multiprocessing.process.BaseProcess | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self._process is None:
            context = multiprocessing.get_context("spawn")  # the caller may have threads, which a fork breaks
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(self.function, self.memory, theirs), daemon=True)
            self._process.start()
            theirs.close()
            self._pipe.recv()  # its modules are there: the time starts now
        try:
            self._pipe.send(arguments)
            if not self._pipe.poll(self.seconds):
                self.close()
                raise DataFault("crash", f"not done after {self.seconds:g} seconds")
            raised, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            self.close()
            raise DataFault("crash", "the library that reads it crashed, or ran out of memory") from None
        if raised:
            raise value
        return value

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(function: Callable[..., Any], memory: int, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    end_with_parent()
    pages = int(open("/proc/self/statm").read().split()[0]) if os.path.exists("/proc/self/statm") else 0
    if pages:
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send(None)
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, function(*arguments)))
        except MemoryError:
            os._exit(1)  # told as what it is, by the other side
        except Exception as error:
            pipe.send((True, error))
