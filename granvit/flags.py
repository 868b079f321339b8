"""What a field's annotation tells tyro about its flag: `rank: Annotated[int, flags.alias("--llm.lora")] = 0`.

Annotations are not evaluated before somebody asks for them (PEP 563), which tyro does when it makes a command line: so
the configurations import, and are used from Python, where tyro is not installed.
"""

from __future__ import annotations

from typing import Any


def alias(*flags: str) -> Any:
    """Further names of the flag."""
    import tyro

    return tyro.conf.arg(aliases=flags)


def hidden() -> Any:
    """No flag: the field keeps its default."""
    import tyro

    return tyro.conf.Suppress
