"""bench/gpu.py with steps of a few milliseconds: limits, budget, going on, the table. No GPU."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def load(name: str):
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCH))
    return module


steps = load("gpu_steps")
gpu = load("gpu")
ABOUT = {"device": "a chip", "versions": {"torch": "2"}, "commit": "abc"}


def test_training_s_figures_stand_also_where_a_peer_failed(tmp_path):
    row = {"shape": "base", "mode": "pretrain", "compiled": False, "commit": "abc"}
    ours = row | {"provider": "granvit", "median": 0.25, "regions_per_second": 480.0, "mfu": 0.4}
    rows = [ours, row | {"provider": "a peer", "failed": "out of memory"}]
    (tmp_path / "a-chip-training.json").write_text(json.dumps(rows))
    assert steps.training("", tmp_path / "a-chip", "abc") == [
        "base pretrain eager, granvit: 250 ms, 480 regions/s, MFU 0.40", "base pretrain eager, a peer failed",
    ]  # fmt: skip


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """driver(arguments, steps) -> exit status; rows lie in tmp_path/a-chip-steps.json."""

    def run(arguments: str, *steps, **about) -> int:
        probed = {"file": str(tmp_path / "a-chip-steps.json"), **ABOUT, **about}
        monkeypatch.setattr(gpu, "probe", lambda variables: dict(probed))
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return gpu.main(arguments.split(), steps)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return run


def kept(folder: Path) -> dict[str, dict]:
    return {row["step"]: row for row in json.loads((folder / "a-chip-steps.json").read_text())}


def step(name: str, code: str, seconds: int = 1, limit: float = 20, **more) -> steps.Step:
    return steps.Step(name, ("-c", code), seconds, limit, **more)


def counting(name: str, path: Path, **more) -> steps.Step:
    """Adds a letter to a file each time it runs."""
    return step(name, f"open({str(path)!r}, 'a').write({name[0]!r})", **more)


def test_a_failing_step_does_not_stop_the_next(driver, tmp_path, capsys):
    assert driver("", step("bad", "print('the reason'); raise SystemExit(3)"), step("good", "print('= 7 of 7')")) == 0
    rows = kept(tmp_path)
    assert (rows["bad"]["verdict"], rows["good"]["verdict"]) == ("failed", "passed")
    assert "the reason" in rows["bad"]["told"] and rows["good"]["figures"] == ["7 of 7"]
    assert all(row["device"] == "a chip" and row["commit"] == "abc" for row in rows.values())
    shown = capsys.readouterr().out
    assert "  | the reason\n" in shown and "1 of 2 passed, 1 failed, 0 cut off, 0 dropped" in shown


def test_the_exit_status_is_1_where_nothing_was_measured(driver):
    assert driver("", step("build", "", measures=False), step("bad", "raise SystemExit(1)")) == 1
    assert driver("--only build", step("build", "", measures=False), step("bad", "raise SystemExit(1)")) == 0


def test_a_limit_ends_a_step_with_its_children(driver, tmp_path):
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; print('begun'); subprocess.run([sys.executable, '-c', {child!r}])"
    began = time.monotonic()
    assert driver("", step("slow", parent, limit=2), step("next", "")) == 0
    assert time.monotonic() - began < 30
    assert kept(tmp_path)["slow"]["verdict"] == "cut off" and kept(tmp_path)["next"]["verdict"] == "passed"
    stat = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    deadline = time.monotonic() + 30
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the child lives"
        time.sleep(0.05)


def test_a_process_that_ignores_sigterm_ends_too(driver, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.3)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    began = time.monotonic()
    assert driver("", step("deaf", deaf, limit=1)) == 1
    assert time.monotonic() - began < 30 and kept(tmp_path)["deaf"]["verdict"] == "cut off"


def test_the_budget_drops_the_last_steps_first(driver, tmp_path, capsys):
    many = [step("first", "", 40), step("second", "", 70), step("third", "", 10)]
    assert driver("--budget 60", *many) == 0
    # The third would still fit, and comes after what didn't.
    assert list(kept(tmp_path)) == ["first"] and capsys.readouterr().out.count(" dropped ") == 2
    assert driver("--budget 60 --from second", *many) == 1
    assert driver("--budget 60 --only third", *many) == 0 and list(kept(tmp_path)) == ["first", "third"]
    assert driver("", *many) == 0 and list(kept(tmp_path)) == ["first", "third", "second"]


def test_a_limit_is_never_beyond_the_budget(driver, tmp_path):
    assert driver("--budget 3", step("slow", "import time; time.sleep(60)", seconds=1, limit=50)) == 1
    assert kept(tmp_path)["slow"]["limit"] <= 3


def test_a_second_call_goes_on_with_what_is_missing(driver, tmp_path, capsys):
    path = tmp_path / "runs"
    many = [counting("build", path, measures=False), counting("one", path), counting("two", path, seconds=50)]
    assert driver("--budget 20", *many) == 0 and path.read_text() == "bo"
    assert driver("", *many) == 0 and path.read_text() == "bobt"
    assert driver("", *many) == 0 and path.read_text() == "bobt"  # nothing is left to build for
    assert "2 of 2 passed" in capsys.readouterr().out
    assert driver("--again", *many) == 0 and path.read_text() == "bobtbot"
    for about in ({"commit": "def"}, {"device": "another"}, {"versions": {"torch": "3"}}, {"commit": "def-dirty"}):
        before = path.read_text()
        assert driver("", *many, **about) == 0 and path.read_text() == before + "bot"
    assert driver("", *many, commit="def-dirty") == 0 and path.read_text() == before + "botbot"


def test_what_was_cut_off_runs_again(driver, tmp_path):
    assert driver("", step("slow", "import time; time.sleep(60)", limit=1), step("next", "")) == 0
    assert driver("", step("slow", "print('= done')"), step("next", "raise SystemExit(1)")) == 0
    rows = kept(tmp_path)
    assert rows["slow"]["figures"] == ["done"] and rows["next"]["verdict"] == "passed"


def test_what_failed_runs_again_after_what_never_ran(driver, tmp_path, capsys):
    path = tmp_path / "runs"
    bad = step("bad", f"open({str(path)!r}, 'a').write('b'); raise SystemExit(1)")
    good = counting("good", path, seconds=50)
    assert driver("--budget 20", bad, good) == 1 and path.read_text() == "b"
    assert driver("", bad, good) == 0 and path.read_text() == "bgb"
    capsys.readouterr()
    assert driver("--budget 0.001", bad, good) == 0 and path.read_text() == "bgb"
    shown = capsys.readouterr().out
    assert "failed before" in shown and "passed before" in shown and kept(tmp_path)["bad"]["verdict"] == "failed"


def test_only_and_from(driver, tmp_path):
    path = tmp_path / "runs"
    many = [counting(name, path) for name in ("one", "two", "three", "four")]
    assert driver("--only two four", *many) == 0 and path.read_text() == "tf"
    assert driver("--again --from three", *many) == 0 and path.read_text() == "tftf"
    with pytest.raises(SystemExit, match="no step 'five'; the steps are one, two, three, four"):
        driver("--only five", *many)


def test_a_dry_run_takes_the_dry_command(driver, tmp_path, monkeypatch):
    code = "import os; print('=', os.environ['GRANVIT_BENCH_DEVICE'], os.environ['GRANVIT_COMMIT'])"
    assert driver("--dry", step("one", "raise SystemExit(1)", dry=("-c", code)), step("two", code)) == 0
    assert [row["figures"] for row in kept(tmp_path).values()] == [["cpu abc"]] * 2


def test_the_table_has_at_most_sixty_lines():
    row = {"step": "a", "verdict": "passed", "seconds": 1.0, "figures": [f"figure {i} " + "x" * 300 for i in range(99)]}
    for number in (1, 2, 10, 14):
        table = gpu.table_of([row] * number, ABOUT, 9)
        assert len(table) <= gpu.LINES and max(map(len, table)) <= gpu.WIDTH
        assert sum("passed" in line for line in table[:-1]) == number
    assert len(gpu.table_of([row], ABOUT, 9)) > 50
    assert len(gpu.table_of([], ABOUT, 9)) == 3


def test_the_ordinary_steps_fit_the_budget_and_leave_eight_files():
    ordinary = steps.STEPS[:-1]  # the last is for a second call
    assert sum(step.seconds for step in ordinary) <= gpu.BUDGET < sum(step.seconds for step in steps.STEPS)
    assert len({step.name for step in steps.STEPS}) == len(steps.STEPS)
    assert all(step.seconds <= step.limit for step in steps.STEPS)
    assert len(steps.FILES) <= 8


def test_the_tests_step_names_the_files_that_have_tests_for_a_gpu():
    root = BENCH.parent
    marked = {path for path in (root / "tests").rglob("test_*.py") if "pytest.mark." + "gpu" in path.read_text()}
    assert {root / name for name in steps.TESTS} == marked


VERBOSE = """scheduling tests via LoadScheduling
[gw0] [  0%] PASSED tests/kernels/test_gpu.py::test_roi_gather[torch.float32-8-1]
[gw1] [  1%] FAILED tests/kernels/test_gpu.py::test_keys_of_any_strides[heads first]
[gw0] [  1%] PASSED tests/kernels/test_gpu.py::test_roi_gather[torch.float32-8-2]
"""


def test_pytest_tells_how_far_it_came():
    failed = "FAILED tests/kernels/test_gpu.py::test_keys_of_any_strides[heads first]"
    assert steps.summary(VERBOSE, Path(), "") == ["2 passed, 1 failed, then cut off", failed]
    ended = "======= 1 failed, 2 passed in 3.05s ======="
    assert steps.summary(f"{VERBOSE}{failed} - assert 0\n{ended}\n", Path(), "") == [
        "1 failed, 2 passed in 3.05s", f"{failed} - assert 0",
    ]  # fmt: skip
    assert steps.summary("2 passed in 61.07s (0:01:01)\n", Path(), "") == ["2 passed in 61.07s"]
    assert steps.summary("no tests\n", Path(), "") == []


def test_the_docs_list_the_steps():
    text = (BENCH.parent / "docs" / "gpu.md").read_text()
    for step in steps.STEPS:
        assert f"| {step.name} | {step.seconds} s |" in text, step.name
    assert len(text.splitlines()) <= 60


def test_every_step_names_a_program_that_is_there():
    for step in (*steps.STEPS, steps.TUNE, steps.TRAIN):
        for command in filter(None, (step.command, step.dry)):
            for word in command:
                if word.endswith(".py") or word.startswith("tests/"):
                    assert (BENCH.parent / word.partition("::")[0]).exists(), (step.name, word)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_is_ended_leaves_its_rows(tmp_path, sent):
    begun = tmp_path / "begun"
    code = f"""
import sys; sys.path.insert(0, {str(BENCH)!r})
import gpu, gpu_steps
gpu.probe = lambda _: {{"file": {str(tmp_path / "a-chip-steps.json")!r}, **{ABOUT!r}}}
slow = "import time; print('= half', flush=True); open({str(begun)!r}, 'w'); time.sleep(20)"
steps = [gpu_steps.Step(n, ("-c", c), 1, 50) for n, c in (("quick", "print('= 5 us')"), ("slow", slow), ("never", ""))]
raise SystemExit(gpu.main([], steps))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not begun.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # for the driver to read the step's first line
    process.send_signal(sent)
    shown = process.communicate(timeout=60)[0]
    if sent == signal.SIGTERM:
        assert process.returncode == 143
        assert "5 us" in shown and "unfinished" in shown and "half" in shown and "never" not in shown
    assert kept(tmp_path)["quick"]["verdict"] == "passed" and kept(tmp_path)["slow"]["verdict"] == "unfinished"


def test_without_a_gpu_it_says_so(tmp_path):
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GRANVIT_BENCH_RESULTS": str(tmp_path)}
    variables.pop("GRANVIT_BENCH_DEVICE", None)
    command = [sys.executable, str(BENCH / "gpu.py")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 1 and "no GPU can be used here" in done.stderr and not list(tmp_path.iterdir())
