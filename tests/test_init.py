"""`import granvit` is cheap, and its names come out of granvit.model."""

import subprocess
import sys
from importlib import import_module

import pytest

import granvit


def test_the_model_is_imported_with_its_first_name():
    code = """
import sys, granvit
assert "transformers" not in sys.modules and "torch" not in sys.modules
from granvit import GranViTConfig
from transformers import AutoConfig
assert AutoConfig.for_model("granvit").__class__ is GranViTConfig
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", granvit.__all__)
def test_names_are_the_models_own(name):
    from granvit import model

    assert getattr(granvit, name) is getattr(model, name)


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("granvit.data.prompts", "granvit.questions.prompts", ("describe_box", "find_box", "parse_box", "questions")),
        ("granvit.data.schema", "granvit.questions.schema", ("DataFault", "Region", "Sample")),
        ("granvit.model", "granvit.toy.tiny", ("TinyLLM", "TinyVision", "build_tiny")),
    ],
)
def test_public_names_go_on_where_they_were(old, new, names):
    if old == "granvit.data.schema":
        pytest.importorskip("datasets")
    assert all(getattr(import_module(old), name) is getattr(import_module(new), name) for name in names)


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="module 'granvit' has no attribute 'nothing'"):
        granvit.nothing  # noqa: B018
