"""granvit_kernels loads under another name, alone and together with itself."""

import shutil
import subprocess
import sys
from pathlib import Path

import granvit_kernels

SCRIPT = """
import sys
import torch

sys.modules["granvit_kernels"] = None  # an absolute import of it would fail here
numpy = sys.modules.pop("numpy")
sys.modules["numpy"] = None  # the package imports torch and the standard library alone
import renamed_kernels

sys.modules["numpy"] = numpy


def pooled(kernels):
    layout = kernels.PackedLayout.from_grids([(3, 4)])
    tokens = torch.arange(24.0).reshape(12, 2).requires_grad_()
    boxes, index = torch.tensor([[0.5, 0.5, 3.0, 2.5]]), torch.zeros(1, dtype=torch.int32)
    output = kernels.roi_gather(tokens, layout, boxes, index)
    return output.detach(), *torch.autograd.grad(output.square().sum(), tokens)


renamed = pooled(renamed_kernels)
assert not [name for name in sys.modules if name.startswith("granvit_kernels.")]
del sys.modules["granvit_kernels"]
import granvit_kernels

for from_copy, from_original in zip(renamed, pooled(granvit_kernels), strict=True):
    assert torch.equal(from_copy, from_original)
assert torch.ops.renamed_kernels.roi_gather.default is not torch.ops.granvit.roi_gather.default
"""


def test_loads_under_another_name(tmp_path):
    package = Path(granvit_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "renamed_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"PYTHONPATH": f"{tmp_path}:{package.parent}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
