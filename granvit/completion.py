"""`granvit --completion bash` or `zsh`: a script that completes commands, flags, and the words that these take.

tyro writes such a script for one command line of its own. Here the table in it becomes one of all commands, also of
those that argparse reads.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout, suppress
from pkgutil import resolve_name
from typing import Any

import tyro

SHELLS = ("bash", "zsh")
TABLE = re.compile(r"^COMPLETION_SPEC = (\{.*\})$", re.MULTILINE)

PARSERS = {
    "eval": "granvit.eval.__main__:make_parser",
    "predict": "granvit.predict:make_parser",
    "demo": "granvit.demo.__main__:make_parser",
    "export": "granvit.export:make_parser",
}
"""Commands that argparse reads: "module:function" of their parsers."""

Table = dict[str, Any]
"""What tyro's script knows of a command line: its options, and the tables of its subcommands."""


def script(shell: str, commands: Mapping[str, str]) -> str:
    """The script for one of SHELLS. commands: {name: a line about it} of the console script's. Raises ValueError for
    another shell."""
    if shell not in SHELLS:
        raise ValueError(f"--completion takes {' or '.join(SHELLS)}, got {shell!r}")
    from granvit.cost.command import parse as plan
    from granvit.data.__main__ import SHORT
    from granvit.data.__main__ import parse as data
    from granvit.rehearsal.command import parse as rehearse
    from granvit.train.__main__ import COMMANDS, STARTS
    from granvit.train.__main__ import parse as train
    from granvit.train.presets import PRESETS

    tables = {name: _of_argparse(resolve_name(path)()) for name, path in PARSERS.items()}
    tables["eval"]["subcommands"] = {"probe": _of_argparse(resolve_name("granvit.eval.probe.command:make_parser")())}
    tables["data"] = _of_tyro(data)
    tables |= {name: tables["data"]["subcommands"][name] for name in SHORT}
    shared = ""  # the flags are the same behind each preset
    parsers = {"train": (train, (*PRESETS, *STARTS)), "plan": (plan, PRESETS), "rehearse": (rehearse, PRESETS)}
    for name, (parse, words) in parsers.items():
        shared += f"{name} = {_of_tyro(lambda rest, parse=parse: parse(['quick', *rest]))!r}\n"
        tables[name] = _table(_Code(f"{name}['options']"), dict.fromkeys(words, _Code(name)))
    tables["train"]["subcommands"] |= {name: tables.get(name, _table([], {})) for name in COMMANDS}
    whole = _table([], {name: tables[name] | {"description": line} for name, line in commands.items()})

    def granvit() -> None:
        pass

    frame = _written(lambda rest: tyro.cli(granvit, prog="granvit", args=rest), shell)
    frame = TABLE.sub(lambda _: f"{shared}COMPLETION_SPEC = {whole!r}", frame, count=1)
    return frame.replace("complete -F", "complete -o default -F")  # where it knows nothing, files


class _Code(str):
    """Text that stands in a table as it is."""

    __repr__ = str.__str__


def _table(options: list[Table] | _Code, subcommands: dict[str, Table]) -> Table:
    return {"description": "", "options": options, "subcommands": subcommands}


def _written(parse: Callable[[list[str]], object], shell: str) -> str:
    """tyro's own script for the command line that `parse` reads."""
    said = io.StringIO()
    with redirect_stdout(said), suppress(SystemExit):
        parse(["--tyro-print-completion", shell])
    return said.getvalue()


def _of_tyro(parse: Callable[[list[str]], object]) -> Table:
    """The table of a command line that tyro reads, without defaults: they are a preset's."""
    (text,) = TABLE.findall(_written(parse, "bash"))
    return _shortened(ast.literal_eval(text))


def _shortened(table: Table) -> Table:
    options = [
        option | {"description": re.sub(r" ?\((default: .*|required)\)$", "", option["description"].split("\n")[0])}
        for option in table["options"]
    ]
    below = {name: _shortened(part) for name, part in table["subcommands"].items()}
    return _table(options, below) | {"description": table.get("description", "").split("\n")[0]}


def _of_argparse(parser: argparse.ArgumentParser) -> Table:
    return _table(list(_options(parser)), {})


def _options(parser: argparse.ArgumentParser) -> Iterator[Table]:
    for action in filter(lambda action: action.option_strings, parser._actions):
        option = {"flags": action.option_strings, "description": action.help or "", "nargs": action.nargs or 1}
        if action.nargs == 0:
            yield option | {"type": "flag"}
        elif action.choices:
            yield option | {"type": "choice", "choices": list(map(str, action.choices))}
        else:
            yield option | {"type": "value" if action.type in (int, float) else "path"}
