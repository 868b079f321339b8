"""The package as a folder for Hugging Face's `kernels`: what is written where, and that it loads and runs."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import every_operator
import pytest
import torch

import granvit_kernels
from granvit_kernels import hub
from granvit_kernels.hub.__main__ import main

HELPERS = Path(every_operator.__file__).parent

PROMISED = {
    1: "PackedLayout fit_grid pack_patches plan_packing region_attention region_pool roi_gather unpack_patches",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    hub.write(folder)
    return folder


def test_loads_and_runs_without_granvit(folder, tmp_path):
    """By the reference and, where there is Triton, by its interpreter: as the package itself."""
    pytest.importorskip("kernels")
    variables = {**os.environ, "PYTHONPATH": str(HELPERS), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, HELPERS / "load_from_hub.py", folder, tmp_path]
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = every_operator.results(granvit_kernels)
    for backend in ["reference", *(["triton"] if find_spec("triton") else [])]:
        given = torch.load(tmp_path / backend, weights_only=True)
        assert set(given) == set(expected) == set(granvit_kernels.__all__)
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-5)


def test_the_version_stands_for_its_names():
    assert set(PROMISED[hub.VERSION].split()) <= set(granvit_kernels.__all__)


def test_nothing_but_sources_is_written(tmp_path):
    folder = tmp_path / "kernel"  # the other tests import from theirs, which leaves compiled files there
    hub.write(folder)
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert {path.suffix for path in files} == {".py", ".json", ".md", ".toml", ".nix"}
    for name in ("build/torch-cuda/metadata.json", "build/torch-cpu/layout.py", "torch-ext/granvit_kernels/layout.py"):
        assert Path(name) in files
    assert not [path for path in files if path.name == "__main__.py" or "hub" in path.parts]


def test_a_folder_of_its_own_is_replaced_as_a_whole(folder, tmp_path, monkeypatch):
    target = tmp_path / "kernel"
    target.mkdir()  # an empty one will do
    hub.write(target)
    assert (target / "build.toml").read_bytes() == (folder / "build.toml").read_bytes()
    stale = target / "build" / "torch-cpu" / "stale.py"
    stale.touch()
    fill = hub.fill

    def fail(new):
        fill(new)
        raise OSError("no space")

    monkeypatch.setattr(hub, "fill", fail)
    with pytest.raises(OSError, match="no space"):
        hub.write(target)
    assert stale.exists() and os.listdir(tmp_path) == ["kernel"]
    monkeypatch.setattr(hub, "fill", fill)
    hub.write(target)
    assert not stale.exists() and os.listdir(tmp_path) == ["kernel"]


@pytest.mark.parametrize(
    ("ours", "name", "message"),
    [
        (False, "", "target is a file; it takes a folder that is new, empty, or written by this command"),
        (False, "build.toml", "target holds build.toml, which this command did not write; it takes"),
        (True, ".git", "target holds .git, which this command did not write"),
    ],
)
def test_a_folder_of_others_is_refused(tmp_path, monkeypatch, ours, name, message):
    target = tmp_path / "target"
    if ours:
        hub.write(target)
    if name:
        target.mkdir(exist_ok=True)
    (target / name).touch()
    held = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["hub", "--output", str(target)])
    with pytest.raises(SystemExit, match=f"nothing was written: .*{message}"):
        main()
    assert sorted(tmp_path.rglob("*")) == held


@pytest.mark.parametrize("target", ["/", hub.PACKAGE / "kernel"], ids=str)
def test_the_root_and_the_package_are_refused(target, monkeypatch):
    monkeypatch.setattr(hub, "fill", None)
    with pytest.raises(FileExistsError, match=f"^{target} is the root folder, or inside the package; it takes"):
        hub.write(Path(target))


def test_links_in_a_loop_are_named(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr(sys, "argv", ["hub", "--output", str(tmp_path / "loop" / "kernel")])
    with pytest.raises(SystemExit, match="nothing was written: .*loop"):
        main()


def test_the_command_says_how_to_load_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hub", "--output", str(tmp_path / "kernel")])
    main()
    assert f"get_local_kernel(Path('{tmp_path}/kernel'))" in capsys.readouterr().out
