"""Run as a program: loads a kernel's folder by Hugging Face's `kernels` where granvit can't be imported.

Arguments: the folder, and one for what the operators give: `reference`, and where there is Triton, `triton`, by its
interpreter.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from kernels import get_local_kernel
from kernels._rust import Digest, DigestAlgorithm, Metadata
from kernels.benchmark import Benchmark

folder, output = Path(sys.argv[1]), Path(sys.argv[2])

sys.modules["granvit"] = sys.modules["granvit_kernels"] = None  # an import of one would fail
numpy = sys.modules.pop("numpy")
sys.modules["numpy"] = None  # kernels import torch and the standard library alone
kernel = get_local_kernel(folder)
sys.modules["numpy"] = numpy

variant = Path(kernel.__file__).parent
metadata = Metadata.read_from_file(variant / "metadata.json")
metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
assert kernel.__name__ == metadata.id and hasattr(getattr(torch.ops, metadata.id), "roi_gather")

spec = importlib.util.spec_from_file_location("older", variant / metadata.name.python_name / "__init__.py")
older = importlib.util.module_from_spec(spec)  # as versions of `kernels` load it that know no other place
spec.loader.exec_module(older)
assert older.__all__ == kernel.__all__ and older.roi_gather is kernel.roi_gather

import every_operator  # noqa: E402

torch.save(every_operator.results(kernel), output / "reference")

# ---- each benchmark once, as `kernels benchmark` runs them ----
spec = importlib.util.spec_from_file_location("benchmark_module", folder / "benchmarks" / "benchmark.py")
benchmarks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmarks)
ran = set()
for kind in vars(benchmarks).values():
    if not (isinstance(kind, type) and issubclass(kind, Benchmark) and kind is not Benchmark):
        continue
    for name in [name.removeprefix("benchmark_") for name in dir(kind) if name.startswith("benchmark_")]:
        made = kind()
        made.kernel = kernel
        torch.manual_seed(made.seed)
        made.setup()
        getattr(made, f"benchmark_{name}")()
        torch.testing.assert_close(made.out, getattr(made, f"verify_{name}")(), atol=1e-3, rtol=1e-4)
        ran.add(kind.__name__)
assert ran == {"PackPatches", "RegionAttention", "RegionPool", "RoiGather"}, ran

# ---- the operators by Triton's interpreter ----
if importlib.util.find_spec("triton") is None:
    sys.exit()
import interpreter  # noqa: E402

interpreter.mend()
ran, expected = set(), set()


def tell(name, direction, function):
    def told(*args):
        ran.add((name, direction))
        return function(*args)

    return told


for name, candidates in sys.modules[f"{metadata.id}.backends"].operators().items():
    if "triton" in candidates:
        module = candidates["triton"]
        module.why_not = lambda **problem: None  # the interpreter takes tensors on the CPU
        for direction in ("forward", "backward"):
            expected.add((name, direction))
            setattr(module, direction, tell(name, direction, getattr(module, direction)))
torch.save(every_operator.results(kernel), output / "triton")
assert ran == expected and len(ran) >= 4, (ran, expected)
