"""A tiny model on disk, and stand-ins for the packages that ask it."""

import importlib
import sys
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def export(tiny, tmp_path_factory):
    """A folder with a tiny model whose boxes are location tokens, and the model."""
    model, processor = tiny(box_format="bins", box_style="tokens")
    folder = tmp_path_factory.mktemp("export")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder), model, processor


@pytest.fixture
def stand_in(monkeypatch):
    """stand_in(module, name=value...): a module of that name and contents, in packages of nothing else."""

    def put(path, **contents):
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        vars(sys.modules[path]).update(contents)

    return put


@pytest.fixture
def fresh(monkeypatch):
    """fresh(name) -> the module, imported anew, over the stand-ins that there are."""

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        monkeypatch.delitem(sys.modules, name)
        return module

    return load
