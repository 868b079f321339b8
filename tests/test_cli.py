"""The console script: what it starts, what it says, and how little it imports."""

import importlib.metadata
import shutil
import subprocess
import sys
from pkgutil import resolve_name

import pytest

import granvit
from granvit import cli
from granvit import completion as completion_module


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


COMPLETED = {
    "granvit pl": {"plan"},
    "granvit train ad": {"adapt"},
    "granvit train smoke --precision ": {"float32", "bfloat16"},
    "granvit data convert js": {"jsonl"},
    "granvit predict RUN --pi": {"--pixels"},
    "granvit eval probe --pic": {"--picture"},
    "granvit export RUN --format l": {"lfm2-vl"},
    "granvit plan paper --mf": {"--mfu"},
    "granvit annotate --ocr": {"--ocr", "--ocr-score"},
}


@pytest.fixture(scope="module")
def completion(tmp_path_factory):
    """completion("bash") -> the file of its script."""

    def write(shell):
        path = tmp_path_factory.mktemp(shell) / "_granvit"
        path.write_text(completion_module.script(shell, {name: made.help for name, made in cli.COMMANDS.items()}))
        return path

    return write


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_commands_flags_and_their_words(completion):
    path = completion("bash")
    subprocess.run(["bash", "-n", path], check=True)
    press_tab = """
source "$1"; function=$(complete -p granvit | sed 's/.*-F \\([^ ]*\\).*/\\1/')
read -a COMP_WORDS <<< "$2"; [[ "$2" == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); $function; echo "${COMPREPLY[@]}"
"""
    for line, words in COMPLETED.items():
        done = subprocess.run(["bash", "-c", press_tab, "bash", path, line], capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == words, line


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_zsh_reads_its_script(completion):
    subprocess.run(["zsh", "-n", completion("zsh")], check=True)


def test_a_shell_that_there_is_no_completion_for_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["granvit", "--completion", "fish"])
    assert cli.main() == 2
    assert capsys.readouterr().err == "granvit: error: --completion takes bash or zsh, got 'fish'\n"
