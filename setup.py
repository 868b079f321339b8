"""Builds granvit_kernels._native with CMake. Needs cmake and a C++17 compiler; ninja and nvcc if found.

`pip install -e .` or, for work on csrc, `python setup.py build_ext --inplace` (rebuilds only what changed).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_program(name: str) -> str | None:
    """Path of a program on PATH, or beside this Python (an environment used without activation)."""
    beside = os.path.dirname(sys.executable)
    return shutil.which(name) or shutil.which(name, path=beside)


class CMakeBuild(build_ext):
    """Hands the one extension to CMake."""

    def build_extension(self, ext: Extension) -> None:
        """Raises SystemExit with one line that says what is missing or what failed."""
        import pybind11

        cmake = find_program("cmake")
        if cmake is None:
            raise SystemExit(
                "granvit: building the kernels needs cmake: `pip install cmake` or your system's package"
            )
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        # A cache holds absolute paths of the last build's environment, which pip may have deleted since.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        ninja = find_program("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), *generator,
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DGRANVIT_OUTPUT_NAME={target.name}",
            f"-DGRANVIT_OUTPUT_DIR={target.parent}",
        ]  # fmt: skip
        target.parent.mkdir(parents=True, exist_ok=True)
        self._run(configure, "configuring")
        self._run([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)], "compiling")

    @staticmethod
    def _run(command: list[str], doing: str) -> None:
        # pip's build isolation hides an environment's packages through PYTHONPATH, and cmake may be one of these.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        try:
            subprocess.run(command, check=True, env=environment)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"granvit: {doing} the kernels failed ({error.returncode}); the reason is above"
            ) from None


setup(
    ext_modules=[Extension("granvit_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
