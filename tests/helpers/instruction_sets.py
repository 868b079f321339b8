"""Tests of a C++ kernel with other instruction sets than this process has chosen for it."""

import os
import subprocess
import sys

import pytest

from granvit_kernels import native

TESTING = """
import sys
import pytest
from granvit_kernels import native
sys.exit(native.why_not() or pytest.main(sys.argv[1:]))
"""


def passes_with(isa: str, tests: str, *files: str) -> None:
    """Runs the chosen tests (pytest's -k) of files in a process of its own, because the choice is made once. Skips
    where this machine lacks the instruction set, and where all tests of this process run with it anyway."""
    if native.library().isa() == isa:
        pytest.skip(f"{isa} is what the other tests run with")
    command = [sys.executable, "-c", TESTING, "-q", "-x", "-p", "no:cacheprovider", *files, "-k", tests]
    environment = {**os.environ, "GRANVIT_KERNELS_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "this machine lacks it" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout
