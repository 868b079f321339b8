"""The console script: `granvit train smoke` is `python -m granvit.train smoke`, and so for the other commands.

Only the module of the command that was asked for is imported.
"""

from __future__ import annotations

import sys
from pkgutil import resolve_name
from typing import NamedTuple

from granvit.status import DONE, run


class Command(NamedTuple):
    """What the first word means. main: "module:function"; words: what the module's command line begins with."""

    main: str
    words: tuple[str, ...]
    help: str


COMMANDS = {
    "train": Command("granvit.train.__main__:main", (), "train a model through its stages"),
    "plan": Command("granvit.train.__main__:main", ("plan",), "say what a run costs: train plan"),
    "eval": Command("granvit.eval.__main__:main", (), "measure a model, beside the floors"),
    "predict": Command("granvit.predict:main", (), "caption a box of a picture, find a sentence, draw features"),
    "demo": Command("granvit.demo.__main__:main", (), "open a page to try a model in the browser"),
    "export": Command("granvit.export:main", (), "write the model of a run to a folder"),
    "data": Command("granvit.data.__main__:main", (), "make, convert and filter datasets"),
    "annotate": Command("granvit.data.__main__:main", ("annotate",), "find regions of pictures: data annotate"),
    "audit": Command("granvit.data.__main__:main", ("audit",), "write a page about a dataset: data audit"),
}


def usage() -> str:
    rows = "\n".join(f"  {name:10}{command.help}" for name, command in COMMANDS.items())
    more = "`granvit COMMAND --help` says more; --version says the version, --completion bash (or zsh) prints a\n"
    return f"usage: granvit COMMAND ...\n\n{rows}\n\n{more}script by which the shell completes commands and flags."


def main() -> int | None:
    """Run the command that sys.argv asks for; its exit status, 2 for an unknown one."""
    word, *rest = sys.argv[1:] or ["--help"]
    if word in ("-h", "--help"):
        print(usage())
        return DONE
    if word == "--version":
        import granvit

        print(granvit.__version__)
        return DONE
    return run("granvit", lambda: start(word, rest))


def start(word: str, rest: list[str]) -> int | None:
    """The exit status of a command with these arguments. Raises ValueError where there is none of this name."""
    if word == "--completion":
        from granvit.completion import script

        print(script(*rest[:1] or [""], {name: command.help for name, command in COMMANDS.items()}))
        return DONE
    if word not in COMMANDS:
        raise ValueError(f"there is no command {word!r}; there are {', '.join(COMMANDS)}")
    command = COMMANDS[word]
    sys.argv = ["granvit", *command.words, *rest]
    return resolve_name(command.main)()
