"""docs/tutorial.md: its blocks run in their order, and leave what its text says."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from granvit import cli

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tutorial.md"


def run_commands(code: str, monkeypatch) -> None:
    """Run each line of a bash block by the console script's function: a process a line would take half a minute."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        assert words[0] == "granvit", f"{line}: the tutorial's commands are those of granvit"
        monkeypatch.setattr(sys, "argv", words)
        assert not cli.main(), line


@pytest.mark.slow
def test_the_tutorial_runs_from_pictures_to_a_similarity_map(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for language, code in blocks:
        if language == "bash":
            run_commands(code, monkeypatch)
        else:
            exec(compile(code, str(PAGE), "exec"), names)

    assert len(list(Path("photos").iterdir())) == 20
    assert Path("runs/mine/report/index.html").is_file() and Path("mymodel/README.md").is_file()
    assert [type(caption) for caption in names["captions"]] == [str, str] and len(names["boxes"]) == 2
    with torch.no_grad():
        ours, layout = names["model"].encode("photos/coffee.jpg")
    theirs = names["outputs"].last_hidden_state[0, : layout.num_tokens]
    assert torch.cosine_similarity(ours, theirs).min() > 0.99  # pixels are rounded otherwise
    assert Image.open("similar.png").size == (640, 426)  # the photograph's shape
