"""The README tells the truth: its example runs, its commands and links exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_of_the_operators_runs_and_has_the_shapes_of_its_comments():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    for name, shape in re.findall(r"^(\w+) = .*# \[([\d, ]+)\]", code, re.MULTILINE):
        assert list(names[name].shape) == [int(n) for n in shape.split(",")], name
    assert {"features", "pooled"} <= names.keys()


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_ci_calls_a_command_that_stands_here():
    assert re.search(r"^python -m pytest", README, re.MULTILINE)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make (\w+)`", README))))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
