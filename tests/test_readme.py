"""The README tells the truth: its example runs, its commands and links exist."""

import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run_example(section: str) -> tuple[str, dict]:
    """The Python example under a heading, and the names that it leaves."""
    (text,) = re.findall(rf"^## {section}$(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    return code, names


def test_the_example_of_the_operators_runs_and_has_the_shapes_of_its_comments():
    code, names = run_example("The operators alone")
    for name, shape in re.findall(r"^(\w+) = .*# \[([\d, ]+)\]", code, re.MULTILINE):
        assert list(names[name].shape) == [int(n) for n in shape.split(",")], name
    assert {"features", "pooled"} <= names.keys()


def test_the_example_of_the_model_runs_on_what_a_run_leaves(tiny, tmp_path, monkeypatch, capsys):
    for part in tiny():
        part.save_pretrained(tmp_path / "runs" / "smoke" / "export")
    Image.new("RGB", (64, 48), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    code, names = run_example("The model alone")
    assert capsys.readouterr().out.startswith("[") and "import granvit.model" in code
    assert names["features"].shape == (names["layout"].num_tokens, names["model"].config.vision_config.hidden_size)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_ci_calls_a_command_that_stands_here():
    assert re.search(r"^python -m pytest", README, re.MULTILINE)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make (\w+)`", README))))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
