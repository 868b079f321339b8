"""The console script: what it starts, what it says, and how little it imports."""

import importlib.metadata
import subprocess
import sys
from pkgutil import resolve_name

import pytest

import granvit
from granvit import cli


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_commands_have_a_main(name):
    assert callable(resolve_name(cli.COMMANDS[name].main))


def test_each_command_gets_the_words_behind_it(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "resolve_name", lambda name: lambda: seen.append((name, sys.argv[1:])))
    for name, command in cli.COMMANDS.items():
        monkeypatch.setattr(sys, "argv", ["granvit", name, "--help"])
        cli.main()
        assert seen[-1] == (command.main, [*command.words, "--help"])


def test_help_names_all_and_imports_nothing():
    code = """
import sys
from granvit.cli import main
sys.argv = ["granvit", "--help"]
assert main() == 0
heavy = {"torch", "numpy", "transformers", "tyro", "rich", "granvit.train", "granvit.data"} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {name} " in done.stdout for name in cli.COMMANDS)


def test_unknown_commands_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["granvit", "trian"])
    assert cli.main() == 2
    assert "no command 'trian'" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["granvit", "--version"])
    assert cli.main() == 0
    assert capsys.readouterr().out.strip() == granvit.__version__ == importlib.metadata.version("granvit")
