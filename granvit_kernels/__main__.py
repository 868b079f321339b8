"""`python -m granvit_kernels`: which backend runs where, which libraries are used, and why the others are not."""

from __future__ import annotations

import os

import torch
from rich.console import Console
from rich.table import Table

from . import backends, libraries, native


def main() -> None:
    console = Console()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    reason = native.why_not()
    if reason is None:
        cuda = "built" if native.library().cuda else "not built"
        reason = f"instruction set {native.library().isa()}, CUDA kernels {cuda}"
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {gpu}", highlight=False)
    console.print(f"native library: {reason}", highlight=False)
    forced = os.environ.get(backends.VARIABLE)
    if forced:
        console.print(f"{backends.VARIABLE}={forced} forces a backend", highlight=False)
    table = Table("operator", "backend", "runs", "why not")
    last = None
    for operator, name, reason in backends.survey():
        verdict = "[green]yes[/green]" if reason is None else "[red]no[/red]"
        table.add_row("" if operator == last else operator, name, verdict, reason or "")
        last = operator
    console.print(table)
    table = Table("part of a training step", "library", "used", "why not")
    for part, name, reason in libraries.survey():
        verdict = "[green]yes[/green]" if reason is None else "[red]no[/red]"
        table.add_row(part, name, verdict, reason or "")
    console.print(table)


if __name__ == "__main__":
    main()
