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


@pytest.mark.parametrize(
    "imports",
    ["import granvit; import transformers", "import transformers; import granvit", "import granvit.data.prompts"],
)
def test_auto_classes_know_the_model_in_any_order(imports, tiny, tmp_path):
    for part in tiny():
        part.save_pretrained(tmp_path)
    code = f"""
import importlib.util
{imports}
importlib.util.find_spec("transformers")  # to look for it is not to import it
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
classes = AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
names = [type(kind.from_pretrained({str(tmp_path)!r})).__name__ for kind in classes]
assert names == ["GranViTConfig", "GranViT", "GranViT", "GranViTProcessor"], names
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_reloaded_granvit_leaves_transformers_importable():
    code = """
import importlib, sys, granvit
importlib.reload(granvit)
import transformers
assert "granvit.model" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_transformers_is_imported_where_the_model_can_not_be():
    code = """
import sys, warnings
sys.modules["granvit.lora"] = None
import granvit
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers
assert any("granvit.model can't be imported" in str(warning.message) for warning in caught), caught
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_listed():
    assert {*granvit.__all__} <= {*dir(granvit)}


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
