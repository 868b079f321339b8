"""`import granvit` is cheap, and its names come out of granvit.model."""

import subprocess
import sys

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


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="module 'granvit' has no attribute 'nothing'"):
        granvit.nothing  # noqa: B018
