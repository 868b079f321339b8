"""A Ray cluster of two nodes, on this machine: the same files as one machine writes, whichever process is killed."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from granvit.data.__main__ import main
from granvit.data.shards import WORK

pytestmark = pytest.mark.ray
pytest.importorskip("ray", reason="needs ray[data]")

READER = '''
import os, signal, time
from pathlib import Path
from granvit.data.annotate import Line

class Reader:
    """Reads a picture's first pixel. Dies over number 21: once, or always where the file `always` is."""
    def __call__(self, images):
        folder = Path(__file__).parent
        for image in images:
            time.sleep(0.02)
            if image.getpixel((0, 0))[0] == 21 and not (folder / "died").exists():
                (folder / "always").exists() or (folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return [[Line((1, 1, 9, 9), "pixel %d %d %d" % image.getpixel((0, 0)), 0.9)] for image in images]
'''


@pytest.fixture(scope="module")
def address():
    """Of a cluster of two nodes with a CPU each, one of which counts a GPU."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1, num_gpus=1)  # Ray believes that
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder of 40, one of them broken, and beside it the module of a reader."""
    (tmp_path / "in").mkdir()
    for i in range(40):
        Image.new("RGB", (40, 32), (i, 0, 7)).save(tmp_path / "in" / f"{i:02}.png")
    (tmp_path / "in" / "05.png").write_bytes(b"\x89PNG no")
    (tmp_path / "granvit_test_reader.py").write_text(READER)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "in"
    sys.modules.pop("granvit_test_reader", None)


def annotate(pictures: Path, output: Path, *options: str) -> list[str]:
    return ["annotate", str(pictures), "--ocr", "granvit_test_reader:Reader", "--shard-rows", "4",
            "--fault-budget", "0.1", "--output", str(output), *options]  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_in_between_the_same_files_as_of_one_machine(address, pictures, tmp_path, caplog):
    """Annotated, while the command and a worker are killed; then filtered."""
    output, single = tmp_path / "out", tmp_path / "single"
    command = [sys.executable, "-m", "granvit.data", *annotate(pictures, output, "--ray", address, "--workers", "2")]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    process = subprocess.Popen(command, env=paths, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list((output / WORK).glob("0*.json"))) < 2:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert main(annotate(pictures, output, "--ray", address, "--gpus-per-worker", "0.5")) == 0
    assert (tmp_path / "died").exists() and "05.png" in caplog.text
    assert main(annotate(pictures, single, "--workers", "0")) == 0
    assert files(output) == files(single) and len(files(single)) == 11
    rules = ["--short-side", "0", "--unique-pictures", "--max-characters", "11"]
    for output, options in ((tmp_path / "one", ["--workers", "0"]), (tmp_path / "many", ["--ray", address])):
        assert main(["filter", str(single), *rules, "--output", str(output), *options]) == 0
    assert files(tmp_path / "many") == files(tmp_path / "one") and len(files(tmp_path / "one")) == 2


def test_a_shard_that_kills_its_workers_ends_the_command(address, pictures, tmp_path, capsys):
    (tmp_path / "always").touch()
    assert main(annotate(pictures, tmp_path / "out", "--ray", address, "--workers", "1")) == 1
    said = capsys.readouterr().err
    assert "error: 3 workers died, for want of memory perhaps, each while it read" in said and "20.png to" in said


def test_what_a_node_lacks_is_one_line(address, pictures, tmp_path, capsys):
    (tmp_path / "granvit_test_reader.py").write_text("""
from granvit.data.annotate.annotator import NoModel
class Reader:
    def __call__(self, images):
        raise NoModel("no model here")
""")
    assert main(annotate(pictures, tmp_path / "out", "--ray", address)) == 1
    assert f"granvit annotate: error: no model here (on {platform.node()})\n" in capsys.readouterr().err
    assert main(annotate(pictures, tmp_path / "out", "--ray", "127.0.0.1:1")) == 1
    assert "no way to a Ray cluster at '127.0.0.1:1': [Errno 111] Connection refused. " in capsys.readouterr().err
