"""What all commands share: the meaning of their exit status, and one form of what they say when something is wrong."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import TypeVar

from granvit.errors import Failed, printable

T = TypeVar("T")

DONE = 0
FAILED = 1
"""The work failed: training, a dataset over its fault budget, a full disk, an answer without a box."""
USAGE = 2
"""Bad usage or bad input: the same command fails again until the command line or what it names is mended."""
STOPPED = 75
"""Stopped by SIGTERM; the same command goes on. EX_TEMPFAIL of sysexits.h."""
INTERRUPTED = 130
"""Stopped by Ctrl-C: what shells say of SIGINT."""

INPUT = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
"""The system's errors that a given path is to blame for."""


def leads() -> bool:
    """Whether this is the first of torchrun's processes: the others would repeat what it says. `granvit.world` knows
    it too, but loads torch."""
    return os.environ.get("RANK", "0") == "0"


def run(name: str, work: Callable[[], int | None], stopped: str = "stopped", quiet: bool = False) -> int:
    """The exit status of the command `name` ("granvit train"), which does this work. Errors become lines on standard
    error, without what a terminal obeys.

    work: returns a status, None for DONE. ValueError and INPUT mean USAGE, Failed and what else the system raises
    FAILED; any other exception is a mistake of ours and is raised. stopped: what is said after Ctrl-C. quiet: nothing
    is said at all.
    """
    try:
        return work() or DONE
    except KeyboardInterrupt:
        if not quiet:
            print(f"{name}: {stopped}", file=sys.stderr)
        return INTERRUPTED
    except (Failed, ValueError, OSError) as error:
        if not quiet:
            lines = map(printable, str(error).split("\n"))  # paths and ids are other people's
            print(f"{name}: error: " + "\n  ".join(lines), file=sys.stderr)
        return USAGE if isinstance(error, (ValueError, *INPUT)) and not isinstance(error, Failed) else FAILED


def read(name: str, parse: Callable[[], T]) -> T:
    """What `parse`, which has tyro read a command line, returns. The box that tyro draws around what is wrong with it
    becomes lines of our form; it ends the process with USAGE."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return parse()
    except SystemExit as end:
        if end.code == USAGE:
            said = _unboxed(name, said.getvalue())
        raise
    finally:
        sys.stderr.write(said.getvalue())


def _unboxed(name: str, text: str) -> io.StringIO:
    """tyro's box has a title, what is wrong, a rule, and advice; frame and rules are of two kinds. On a terminal it is
    coloured."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", text).translate(str.maketrans("│╭╮╰╯─", "     -"))
    rows = [printable(row[2:].rstrip()) for row in plain.splitlines()[1:]]
    while rows and not rows[0].strip(" -"):
        rows.pop(0)
    head = []
    while rows and rows[0].strip(" -") and not rows[0].startswith(" "):  # as many lines as what is wrong takes
        head.append(rows.pop(0))
    advice = "".join(f"  {row}\n" for row in rows if row.strip(" -"))
    return io.StringIO(f"{name}: error: {' '.join(head) or text.strip()}\n{advice}")
