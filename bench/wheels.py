"""python bench/wheels.py: downloads the packages that a training run wants, and the GPU machine has not, to .whl/.

For Python 3.12 on Linux, x86-64, in the versions that are installed here. A machine without a network, whose Python has
only what kernels want, gets them with the checkout: `python bench/gpu.py` unpacks them into build/gpu-packages
(`python bench/wheels.py --install`) and puts that on its steps' PYTHONPATH.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / ".whl"
TARGET = ROOT / "build" / "gpu-packages"

TRAINER = ("datasets", "dill", "multiprocess", "tyro", "docstring-parser", "typeguard")
CONFIGURATION = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection")
METRICS = ("jiwer", "rapidfuzz", "rouge-score", "nltk")
FONTS = ("font-caladea", "font-hanken-grotesk", "font-amatic-sc", "font-fredoka-one")
PACKAGES = (*TRAINER, *CONFIGURATION, *METRICS, *FONTS)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def download() -> None:
    """Raises SystemExit naming the packages that could not be had."""
    WHEELS.mkdir(exist_ok=True)
    missing = []
    for name in PACKAGES:
        wanted = [f"{name}=={importlib.metadata.version(name)}", "--quiet", "--no-deps"]
        target = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
        target += [f"--platform={platform}" for platform in PLATFORMS]
        ready = subprocess.run([*PIP, "download", *wanted, *target, "-d", str(WHEELS)], capture_output=True)
        # What has no wheel is plain Python: then a wheel made here is good anywhere.
        if ready.returncode and subprocess.run([*PIP, "wheel", *wanted, "-w", str(WHEELS)]).returncode:
            missing.append(name)
    if missing:
        raise SystemExit(f"no wheel of {', '.join(missing)}")
    size = sum(path.stat().st_size for path in WHEELS.glob("*.whl"))
    print(f"{WHEELS}: {len(PACKAGES)} packages, {size / 1e6:.0f} MB")


def install() -> None:
    """Unpack .whl/ where the steps find it; nothing where there is no wheel."""
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if not wheels:
        print("no .whl/ here: steps have what is installed (`make gpu-wheels` fetches what training wants)")
        return
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(TARGET)]
    subprocess.run([*PIP, "install", *options, *wheels], check=True)
    print(f"= {len(wheels)} packages of .whl/")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--install", action="store_true", help="unpack what was downloaded")
    install() if parser.parse_args().install else download()
