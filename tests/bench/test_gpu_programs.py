"""The programs that bench/gpu.py's steps run, as far as they go without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def load(monkeypatch):
    """load(name) -> bench/NAME.py in a dry run."""
    monkeypatch.setenv("GRANVIT_BENCH_DEVICE", "cpu")
    monkeypatch.syspath_prepend(str(BENCH))

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"dry_{name}", BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


NCU = """==PROF== Connected to process 7 (/usr/bin/python3)
==PROF== Profiling "forward" - 0: 0%....50%....100% - 2 passes
==PROF== Disconnected from process 7
"ID","Process ID","Process Name","Kernel Name","Grid Size","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed","dram__bytes_read.sum","dram__bytes_write.sum","smsp__inst_executed.sum","smsp__issue_active.avg.per_cycle_active","sm__warps_active.avg.pct_of_peak_sustained_active","launch__registers_per_thread"
"","","","","","ns","%","byte","byte","inst","inst/cycle","%","register/thread"
"0","7","python3","void at::native::fill(int)","(1, 1, 1)","9","1","1","1","1","1","1","1"
"1","7","python3","forward(const int *, bfloat16)","(21504, 1, 1)","400,128","40.5","805306368","1,024","7000000","0.75","50","69"
==WARNING== a line after the table
"""  # noqa: E501


def test_ncus_table_is_read(load):
    ncu = load("ncu")
    (row,) = ncu.parse(NCU)
    assert row.pop("seconds") == pytest.approx(400128e-9) and row.pop("dram_share") == pytest.approx(0.405)
    assert row == {
        "kernel": "forward", "grid": "(21504, 1, 1)", "dram_bytes_read": 805306368, "dram_bytes_written": 1024,
        "instructions": 7e6, "issue_active": 0.75, "occupancy": 0.5, "registers": 69,
    }  # fmt: skip
    assert not list(ncu.parse("==ERROR== no permission\n"))


@pytest.mark.parametrize("signature, name", [
    ("forward", "forward"),
    ("backward_walk(const float *, int)", "backward_walk"),
    ("void granvit::<unnamed>::resample_kernel<__nv_bfloat16, (int)4>(granvit::PackJob<(int)540>)", "resample_kernel"),
    ("void granvit::(anonymous namespace)::copy_kernel<float>(granvit::PackJob<540>)", "copy_kernel"),
])  # fmt: skip
def test_ncus_kernels_have_their_functions_names(load, signature, name):
    assert load("ncu").function_name(signature) == name


@pytest.mark.parametrize("told", ["==ERROR== ERR_NVGPUCTRPERM", "==ERROR== Failed to initialize the profiler"])
def test_ncu_says_once_that_it_can_t_read_counters(load, monkeypatch, tmp_path, told):
    ncu = load("ncu")
    monkeypatch.setenv("GRANVIT_BENCH_RESULTS", str(tmp_path))
    calls = []
    monkeypatch.setattr(ncu, "run_command", lambda command: calls.append(command) or (1, f"a line\n{told}\n"))
    with pytest.raises(SystemExit, match=f"counters here: {told}"):
        ncu.main()
    assert len(calls) == 1


def test_ncu_leaves_the_clocks_alone(load, monkeypatch):
    ncu = load("ncu")
    monkeypatch.setattr(ncu, "DRY", False)
    command = ncu.command("roi_gather")
    assert command[: command.index(sys.executable)][:3] == ["ncu", "--clock-control", "none"]
    assert command[-2:] == [str(BENCH / "ncu.py"), "roi_gather"]


def test_the_sanitizer_watches_every_operator(load):
    sanitize = load("sanitize")
    assert set(sanitize.CHECKS["memcheck"]) == set(sanitize.RUNS) == set(sanitize.OPERATORS)
    command = sanitize.command("racecheck", "pack_patches")
    assert command[:3] == ["compute-sanitizer", "--tool", "racecheck"] and command[-1] == "pack_patches"


@pytest.mark.parametrize(
    ("error", "passes"), [(0.0, True), (1e-3, True), (0.05, False), (float("nan"), False), (float("inf"), False)]
)
def test_the_rule_of_accuracy(load, error, passes):
    exact = torch.linspace(-1, 1, 5, dtype=torch.float64)
    usual = exact + torch.tensor([0, 1e-3, 0, 0, 0])
    share = load("accuracy").share_of_allowed(exact + error, usual, exact, torch.bfloat16)
    assert (share <= 1) == passes


def test_accuracy_fails_where_no_kernel_ran(tmp_path):
    variables = {**os.environ, "GRANVIT_BENCH_DEVICE": "cpu", "GRANVIT_BENCH_RESULTS": str(tmp_path)}
    variables["GRANVIT_KERNELS_BACKEND"] = "roi_gather=reference"
    done = subprocess.run([sys.executable, str(BENCH / "accuracy.py")], env=variables, capture_output=True, text=True)
    assert done.returncode == 1 and "no kernel ran for roi_gather" in done.stderr
    rows = json.loads((tmp_path / "dry-run-accuracy.json").read_text())
    assert {row["operator"] for row in rows} == {"roi_gather", "region_attention", "region_pool", "pack_patches"}
    assert all(row["share_of_allowed"] <= 1 for row in rows) and len(rows) == 28


def test_a_training_run_gives_what_it_has_however_far_it_came(load, tmp_path):
    train = load("gpu_train")
    lines = [{"stage": "pretrain", "step": i, "seconds": s} for i, s in enumerate((9.0, 9.0, 0.5, 0.7, 0.5))]
    lines.append({"stage": "pretrain", "step": 5, "evaluation": "after", "caption2bbox_acc50": 0.25, "seconds": 2.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    speed, evaluation = train.rows_of(tmp_path, {"pretrain": 5})
    assert speed == {"stage": "pretrain", "when": "training", "steps": 5, "median_step_seconds": 0.5}
    assert (evaluation["when"], evaluation["caption2bbox_acc50"]) == ("after", 0.25)
    assert train.rows_of(tmp_path / "nothing", {}) == []


def test_training_says_what_is_missing():
    code = (
        "import importlib.util as u, runpy, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name in ('tyro', 'datasets') else find(name, *rest)\n"
        f"sys.argv = ['gpu_train.py']; sys.path.insert(0, {str(BENCH)!r})\n"
        f"runpy.run_path({str(BENCH / 'gpu_train.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "training lacks datasets, tyro: `make gpu-wheels`" in done.stderr


COVERED = """
import sys
import aot, torch, warm
from workloads import regions

cases = [case for case in warm.cases() if case.dtype == "bfloat16" and ("heads", 2) not in case.options]
with aot.compile_only(90) as launches:
    for case in cases:
        aot.launch(case)
beforehand = {launch.kernel.hash for launch in launches}
missed = set()
for letter in "ABCD":
    made = regions(letter, "cpu")
    place = made.layout.to("meta"), made.boxes.to("meta"), made.image_index.to("meta")
    for case in cases:
        with aot.compile_only(90) as launches:
            for direction in aot.directions(case, *place).values():
                direction()
        missed |= {launch.name for launch in launches if launch.kernel.hash not in beforehand}
print(*sorted(missed), len(beforehand))
"""


def test_what_is_compiled_beforehand_is_what_the_workloads_launch():
    pytest.importorskip("triton")
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"GRANVIT_BENCH_DEVICE": "cpu", "PYTHONPATH": os.pathsep.join([str(BENCH.parent), str(BENCH)])}
    done = subprocess.run([sys.executable, "-c", COVERED], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *missed, kernels = done.stdout.split()
    assert not missed and int(kernels) > 15


def test_what_is_tuned_is_what_the_launchers_ask_for(load):
    pytest.importorskip("triton")
    tune = load("tune")
    source = "".join(path.read_text() for path in (BENCH.parent / "granvit_kernels" / "ops").rglob("triton_launch.py"))
    for target in tune.targets():
        kernel = target.kernel.removeprefix(target.case.operator + "_")
        assert f'"{kernel}"' in source, f"no launcher asks for {target.kernel}"
        assert len(target.candidates()) == len({json.dumps(fields) for fields in target.candidates()}) > 8


def test_what_was_tuned_before_stays(load, monkeypatch, tmp_path):
    tune = load("tune")
    monkeypatch.setattr(tune.launch, "TUNED", tmp_path / "tuned")
    monkeypatch.setenv("GRANVIT_BENCH_RESULTS", str(tmp_path))
    for key, warps in (("768 2", 1), ("1152 2", 2), ("768 2", 4)):
        tune.keep("roi_gather_forward", key, {"warps": warps})
    for path in (tmp_path / "tuned" / "dry-run.json", tmp_path / "dry-run-tuned.json"):
        assert json.loads(path.read_text()) == {"roi_gather_forward": {"768 2": {"warps": 4}, "1152 2": {"warps": 2}}}
