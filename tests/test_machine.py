import shutil
import subprocess
from pathlib import Path

import granvit.machine
from granvit.machine import commit


def test_without_git_the_commit_is_what_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # nothing in it
    monkeypatch.setenv("GRANVIT_COMMIT", "abc1234")
    assert commit() == "abc1234"
    monkeypatch.delenv("GRANVIT_COMMIT")
    assert commit() == "unknown"


def test_results_of_benchmarks_make_no_commit_dirty(monkeypatch, tmp_path):
    """In a checkout of a file of code and a result file."""
    names = "granvit/machine.py", "bench/results/cpu.json"
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1\n")
    git = [shutil.which("git"), "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(granvit.machine, "__file__", str(tmp_path / names[0]))
    monkeypatch.delenv("GRANVIT_COMMIT", raising=False)
    first = commit()
    assert 7 <= len(first) <= 40 and "dirty" not in first
    Path(tmp_path / names[1]).write_text("2\n")
    assert commit() == first
    Path(tmp_path / names[0]).write_text("2\n")
    assert commit() == first + "-dirty"
    monkeypatch.setenv("GRANVIT_COMMIT", "abc1234")  # a copy, whose history lies elsewhere
    assert commit() == "abc1234"
