"""What a wheel holds, what CI calls and what CONTRIBUTING.md names, without building anything."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
JOBS = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]
NAMES = ("roi_gather", "region_attention", "voc")
"""What NAME stands for in CONTRIBUTING.md, by example."""


@pytest.mark.parametrize("package", ["granvit", "granvit_kernels"])
def test_a_wheel_holds_every_file_of_a_package(package):
    """Files that are not modules are listed by pattern: a new kind of file would stay behind."""
    git = subprocess.run(["git", "ls-files", package], cwd=ROOT, capture_output=True, text=True)
    if git.returncode or not git.stdout:
        pytest.skip("not a git checkout, so what belongs to the package is not known")
    wanted = {ROOT / name for name in git.stdout.splitlines() if not name.endswith(".py")}
    patterns = SETTINGS["tool"]["setuptools"]["package-data"][package]
    assert wanted <= {path for pattern in patterns for path in (ROOT / package).glob(pattern)}


def test_python_versions_agree():
    project = SETTINGS["project"]
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert project["requires-python"] == f">={versions[0]}"
    for job in ("test", "release-test"):
        assert JOBS[job]["strategy"]["matrix"]["python"] == versions
    minors = ",".join(version.removeprefix("3.1") for version in versions)
    assert SETTINGS["tool"]["cibuildwheel"]["build"] == f"cp31{{{minors}}}-manylinux_x86_64"


def test_ci_calls_what_there_is():
    commands = "\n".join(step["run"] for step in STEPS if "run" in step)
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make ([\w-]+)", commands, re.MULTILINE)
    assert {"lint", "test", "docs", "wheel", "wheel-test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    optional = SETTINGS["project"]["optional-dependencies"]
    extras = {extra for listed in re.findall(r"\.\[([\w,-]+)\]", commands) for extra in listed.split(",")}
    assert extras and extras <= set(optional)
    for path in re.findall(r"-c (\S+)", commands):
        assert (ROOT / path).is_file(), path
    (ruff,) = re.findall(r"ruff==\S+", commands)
    assert ruff in optional["test"]
    assert set(optional["release"]) <= {word.strip("'") for word in commands.split()}


def test_jobs_wait_for_jobs_and_actions_are_pinned():
    for job in JOBS.values():
        needed = job.get("needs", [])
        assert ({needed} if isinstance(needed, str) else set(needed)) <= set(JOBS)
    actions = [step["uses"] for step in STEPS if "uses" in step]
    assert actions and all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action) for action in actions)


BUILT = ("build/", "dist/")


def paths(text: str) -> list[str]:
    """Paths between backticks, but for what is built. A file without a folder lies in that of the path before it."""
    named = []
    for section in text.split("\n## "):
        folder = ROOT
        for word in " ".join(re.findall(r"```\w*\n.*?```|`[^`]+`", section, re.DOTALL)).replace("`", " ").split():
            if not re.fullmatch(r"[\w.-]+/[\w./-]*|[\w.-]+\.(py|md|h|cpp|toml|txt)", word) or word.startswith(BUILT):
                continue
            path = ROOT / word if "/" in word or (ROOT / word).exists() else folder / word
            folder = path.parent
            named.append(str(path))
    return named


def test_the_files_of_contributing_exist():
    named = paths(CONTRIBUTING)
    assert len(named) > 40
    missing = [path for path in named if not any(Path(path.replace("NAME", name)).exists() for name in NAMES)]
    assert not missing
