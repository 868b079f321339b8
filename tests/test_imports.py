"""What imports where packages are missing: a GPU machine that nobody prepared has neither datasets nor tyro."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = [str(ROOT / "bench"), str(ROOT / "tests" / "train")]
TRAINING = {"datasets", "dill", "multiprocess", "pandas", "xxhash", "tyro", "docstring_parser", "typeguard"}
"""tyro, datasets and what these need: what reads data sets and command lines."""
REST = {
    "pydantic", "pydantic_core", "annotated_types", "jiwer", "rapidfuzz", "rouge_score", "nltk", "pycocoevalcap",
    "pypdfium2", "font_caladea", "font_hanken_grotesk", "font_amatic_sc", "font_fredoka_one", "matplotlib", "peft",
    "rapidocr", "onnxruntime", "gguf", "tensorboard", "liger_kernel",
}  # fmt: skip
"""What is needed for a thing or two, and imported there."""

IMPORT = """
import importlib, sys
for name in {missing!r}:
    sys.modules[name] = None  # importing it fails as if it were not installed, and find_spec does not find it
sys.path[:0] = {folders!r}
for name in {modules!r}:
    importlib.import_module(name)
"""


@pytest.mark.parametrize(
    ("modules", "missing"),
    [
        pytest.param(["one_question", "test_gpu_training", "test_meta"], TRAINING | REST, id="a step on a GPU"),
        pytest.param(
            ["granvit.model", "granvit.train.__main__", "granvit.train.run", "granvit.eval.__main__",
             "granvit.eval.report", "granvit.cost.plan", "granvit.predict"],
            REST, id="the commands",
        ),
    ],
)  # fmt: skip
def test_modules_import_without(modules, missing):
    if absent := sorted(name for name in TRAINING - missing if find_spec(name) is None):
        pytest.skip(f"not installed here either: {', '.join(absent)}")
    script = IMPORT.format(missing=sorted(missing), folders=FOLDERS, modules=modules)
    environment = os.environ | {"GRANVIT_BENCH_DEVICE": "cpu"}  # else the benchmark asks for a GPU
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
