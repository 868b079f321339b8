"""Result files of benchmarks: rows, aims, and what one comparison makes of peers that fail and of wrong results."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module", autouse=True)
def bench_on_path():
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.fixture
def rows():
    return importlib.import_module("rows")


class Benchmark(SimpleNamespace):
    """What comparison.compare uses of pytest-benchmark's fixture."""

    def pedantic(self, target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()


def compare(path, ours, peers=None, **options):
    """The rows that a comparison of `ours` and peers {name: make} leaves in `path`."""
    rows, comparison = importlib.import_module("rows"), importlib.import_module("comparison")
    kept = rows.Rows(path, ("provider",))
    common = {"operator": "o", "mode": "m", "workload": "w", "device": "d", "commit": "c"}
    try:
        comparison.compare(
            Benchmark(extra_info={}), kept, common, {"granvit": lambda: ours}, peers or {}, rounds=3, **options
        )
    finally:
        made = {row["provider"]: row for row in kept.kept()}
    return made


# ---- files ----


def test_the_variable_names_the_folder_which_is_made(rows, tmp_path, monkeypatch):
    monkeypatch.delenv("GRANVIT_BENCH_RESULTS", raising=False)
    assert rows.results_folder() == BENCH / "results"
    monkeypatch.setenv("GRANVIT_BENCH_RESULTS", str(tmp_path / "a" / "b"))
    assert rows.results_folder() == tmp_path / "a" / "b" and rows.results_folder().is_dir()


def test_a_dry_run_keeps_rows_only_in_a_folder_of_its_own(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("GRANVIT_BENCH_DEVICE", "cpu")
    monkeypatch.delenv("GRANVIT_BENCH_RESULTS", raising=False)
    assert rows.gpu_file() is None
    rows.Rows(rows.gpu_file(), ("a",)).save({"a": 1})
    monkeypatch.setenv("GRANVIT_BENCH_RESULTS", str(tmp_path))
    assert rows.gpu_file() == tmp_path / "dry-run.json"
    assert rows.gpu_file("training") == tmp_path / "dry-run-training.json"


def test_a_row_takes_the_place_of_the_older_one_whatever_its_commit(rows, tmp_path):
    kept = rows.Rows(tmp_path / "x.json", ("device", "mode"))
    kept.save({"device": "a", "mode": "f", "commit": "1"}, {"device": "b", "mode": "f", "commit": "1"})
    kept.save({"device": "a", "mode": "f", "commit": "2"})
    assert kept.kept() == [{"device": "b", "mode": "f", "commit": "1"}, {"device": "a", "mode": "f", "commit": "2"}]
    assert len((tmp_path / "x.json").read_text().splitlines()) == 4, "a line a row"
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


def test_processes_that_save_at_once_lose_no_row(tmp_path):
    program = (
        "import pathlib, rows, sys; kept = rows.Rows(pathlib.Path(sys.argv[1]), ('n',)); "
        "[kept.save({'n': f'{sys.argv[2]}{i}'}) for i in range(100)]"
    )
    paths = {**os.environ, "PYTHONPATH": f"{BENCH}{os.pathsep}{BENCH.parent}"}
    command = sys.executable, "-c", program, str(tmp_path / "x.json")
    writers = [subprocess.Popen([*command, name], env=paths) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    kept = {row["n"] for row in json.loads((tmp_path / "x.json").read_text())}
    assert kept == {f"{name}{i}" for name in "ab" for i in range(100)}


def test_what_this_commit_has_measured_is_known(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "commit_of_this_run", lambda: "abc1234")
    kept = rows.Rows(tmp_path / "x.json", ("mode",))
    about = rows.provenance("d")
    assert set(about) == {"device", "versions", "commit"} and about["versions"]["torch"] == torch.__version__
    kept.save({"mode": "f", **about}, {"mode": "b", **about, "failed": "x"}, {"mode": "c", **about, "commit": "other"})
    assert kept.has(mode="f") and kept.has(mode="b") and not kept.has(mode="c")
    assert kept.has(mode="f", failed=None) and not kept.has(mode="b", failed=None)


@pytest.mark.parametrize("commit", ["unknown", "abc1234-dirty"])
def test_a_commit_that_does_not_say_what_code_ran_is_measured_again(rows, tmp_path, monkeypatch, commit):
    monkeypatch.setattr(rows, "commit_of_this_run", lambda: commit)
    kept = rows.Rows(tmp_path / "x.json", ("mode",))
    kept.save({"mode": "f", **rows.provenance("d")})
    assert not kept.has(mode="f")


# ---- comparisons ----


def test_rows_of_a_comparison(tmp_path):
    made = compare(
        tmp_path / "x.json", lambda: 1, {"peer": lambda: lambda: 2},
        aims={"peer": ("ratio", 0.0), "granvit": ("per_second", float("inf"))},
        derived=lambda median: {"per_second": 7 / median},
    )  # fmt: skip
    ours, peer = made["granvit"], made["peer"]
    assert ours["ratio"] == 1 and peer["ratio"] == peer["median"] / ours["median"]
    assert ours["per_second"] == 7 / ours["median"]
    assert peer["quantiles"][0] <= peer["median"] <= peer["quantiles"][1]
    assert peer["aim"] == {"figure": "ratio", "least": 0.0} and peer["reached"] is True
    assert ours["aim"] == {"figure": "per_second", "least": float("inf")} and ours["reached"] is False


def test_a_peer_that_fails_or_deviates_loses_its_own_row(tmp_path):
    near = importlib.import_module("comparison").near(torch.ones(3))

    def broken():
        raise OSError("no such library")

    peers = {
        "right": lambda: lambda: torch.ones(1, 3), "wrong": lambda: lambda: torch.tensor([1, 1, 1.1]),
        "not a number": lambda: lambda: torch.tensor([1, 1, torch.nan]), "broken": broken, "late": lambda: broken,
    }  # fmt: skip
    aims = {name: ("ratio", 0.0) for name in peers}
    made = compare(tmp_path / "x.json", lambda: torch.ones(3), peers, check=near, aims=aims)
    assert {name for name, row in made.items() if "failed" in row} == {"wrong", "not a number", "broken", "late"}
    assert made["broken"]["failed"] == "OSError: no such library" and made["wrong"]["failed"].startswith("wrong: ")
    assert {name for name in peers if made[name]["reached"]} == {"right"}
    assert made["granvit"]["median"] > 0


def test_a_peer_that_fails_while_it_is_timed_loses_its_own_row(tmp_path):
    calls = []

    def tires():
        calls.append(len(calls))
        if len(calls) == 3:
            raise MemoryError("no room")

    made = compare(tmp_path / "x.json", lambda: 1, {"tires": lambda: tires, "peer": lambda: lambda: 2})
    assert made["tires"]["failed"] == "MemoryError: no room" and len(calls) == 3
    assert made["granvit"]["median"] > 0 and made["peer"]["median"] > 0


def test_ours_must_give_a_result(tmp_path):
    near = importlib.import_module("comparison").near(torch.ones(3))
    with pytest.raises(TypeError):
        compare(tmp_path / "x.json", lambda: None, check=near)
    made = compare(tmp_path / "y.json", lambda: torch.ones(3), {"a mask": lambda: lambda: None}, check=near)
    assert made["a mask"]["median"] > 0


def test_a_wrong_result_of_ours_fails_and_is_kept(tmp_path):
    near = importlib.import_module("comparison").near(torch.ones(3))
    with pytest.raises(AssertionError, match="off by 1.0"):
        compare(tmp_path / "x.json", lambda: torch.ones(3) * 1.001, check=near)
    assert json.loads((tmp_path / "x.json").read_text())[0]["failed"].startswith("wrong: result 0 is off by 1.0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_near_and_a_wrong_token_is_not(dtype):
    near = importlib.import_module("comparison").near
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    near(exact)(exact.to(dtype), 1)
    shifted = exact.roll(1).to(dtype)
    with pytest.raises(AssertionError, match="is off by"):
        near(exact)(shifted, 4)


# ---- exact results ----


def test_exact_results_are_the_specifications():
    """bench/expected.py against the operators' references in float64, which are written otherwise."""
    from granvit_kernels import region_attention, roi_gather

    expected, workloads = importlib.import_module("expected"), importlib.import_module("workloads")
    made = workloads.make_regions([(5, 7), (3, 4)], 4, "cpu")
    place = made.layout, made.boxes, made.image_index
    tokens = workloads.randn(made.layout.num_tokens, 6, dtype=torch.float64).requires_grad_()
    for bins, ratio in ((7, 2), (1, 0), (2, 0), (3, 1)):
        output = roi_gather(tokens, *place, (bins, bins), ratio)
        grad = workloads.randn(*output.shape, dtype=torch.float64, seed=1)
        given = expected.roi_gather(made, tokens, None, bins, ratio)
        torch.testing.assert_close(given.double(), output, rtol=0, atol=1e-5)
        exact = torch.autograd.grad(output, tokens, grad)[0]
        given = expected.roi_gather(made, tokens, grad, bins, ratio)
        torch.testing.assert_close(given.double(), exact, rtol=0, atol=1e-5)
        assert expected.read_tokens(made, bins, ratio) == int((exact != 0).any(1).sum())
    query = workloads.randn(2, 3, 4, dtype=torch.float64).requires_grad_()
    key, value = (
        workloads.randn(len(tokens), 3, 4, dtype=torch.float64, seed=i).requires_grad_() for i in (2, 3)
    )
    for coverage in (False, True):
        output = region_attention(query, key, value, *place, coverage=coverage)
        upstream = workloads.randn(*output.shape, dtype=torch.float64, seed=4)
        exact = output, *torch.autograd.grad(output, (query, key, value), upstream)
        given = expected.region_attention(made, query, key, value, upstream, coverage)
        for one_way, other in zip(given, exact, strict=True):
            torch.testing.assert_close(one_way.double(), other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("coverage", [False, True])
def test_flex_attention_gives_the_exact_result(coverage):
    """Its backward needs a GPU, so a dry run of the benchmarks does not come to check it."""
    expected, workloads = importlib.import_module("expected"), importlib.import_module("workloads")
    made = workloads.make_regions([(5, 7), (3, 4)], 4, "cpu")
    tensors = workloads.randn(2, 3, 16), *workloads.randn(2, made.layout.num_tokens, 3, 16, seed=1)
    peers = importlib.import_module("attention_peers").flex_attention_peers(made, *tensors, coverage)
    upstream = torch.zeros(len(made.boxes), 2, 3, 16)
    exact, *_ = expected.region_attention(made, *tensors, upstream, coverage)
    torch.testing.assert_close(peers["FlexAttention"]()(*tensors), exact, rtol=1e-5, atol=1e-5)
    assert peers["FlexAttention's block mask"]()(*tensors) is None


# ---- aims ----


def test_every_aim_is_of_a_comparison_and_none_is_asked_twice():
    workloads = importlib.import_module("workloads")
    cases = [aim[:4] for aim in workloads.AIMS]
    assert len(set(cases)) == len(cases), "a row has one aim"
    assert workloads.aims("roi_gather", "forward", "A") == {
        workloads.GRAPH: ("share", 0.70), "torchvision": ("ratio", 5)
    }  # fmt: skip
    assert workloads.aims("roi_gather", "forward", "B") == {}


def test_check_lists_what_falls_short(rows, tmp_path, capsys):
    check = importlib.import_module("check")
    row = {"operator": "roi_gather", "mode": "forward", "workload": "A", "device": "card", "commit": "abc"}
    rows.Rows(tmp_path / "card.json", ("provider",)).save(
        rows.judged({**row, "provider": "granvit", "share": 0.9}, "share", 0.7),
        rows.judged({**row, "provider": "torchvision", "ratio": 4.25}, "ratio", 5),
        rows.judged({**row, "provider": "broken", "failed": "OSError: gone"}, "ratio", 5),
        rows.judged({**row, "provider": "without figure"}, "ratio", 5),
        {**row, "provider": "without aim", "ratio": 0.1},
    )
    (tmp_path / "card-steps.json").write_text('[{"step": "build"}]')
    (tmp_path / "figures.json").write_text('{"commit": "abc"}')
    check.main(["--results", str(tmp_path)])
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["operator", "mode", "workload", "provider", "figure", "aim", "device", "commit"]
    assert [line.split() for line in lines] == [
        ["roi_gather", "forward", "A", "torchvision", "ratio", "4.25", "ratio", "5", "card", "abc"],
        ["roi_gather", "forward", "A", "broken", "OSError:", "gone", "ratio", "5", "card", "abc"],
        ["roi_gather", "forward", "A", "without", "figure", "no", "ratio", "ratio", "5", "card", "abc"],
    ]
    assert last.endswith("5 rows; 1 of 4 aims reached; 1 rows could not be measured")


def test_measured_times_stand_beside_the_floors_of_their_shape():
    predicted = importlib.import_module("predicted")

    def floor(direction, issue, memory, shape="12 x 64, K = 1"):
        return {
            "operator": "region_attention", "direction": direction, "workload": "A", "shape": shape,
            "issue_seconds": {"H200": issue}, "memory_seconds": {"H200": memory},
        }  # fmt: skip

    floors = [floor("forward", 1, 2), floor("backward", 4, 1), floor("forward", 9, 9, "12 x 64, K = 16")]
    row = {"operator": "region_attention", "mode": "forward+backward", "workload": "A, 12 x 64, 1 query"}
    graph = row | {"provider": "granvit, CUDA graph", "median": 10.0}
    rows = [graph, row | {"provider": "granvit", "median": 11.0}, graph | {"workload": "A, 12 x 64, 4 queries"}]
    [prediction] = predicted.predictions(floors, rows, "H200")
    assert prediction[2:] == ("A, 12 x 64, 1 query", 5, 3, 10.0) and prediction.ratio == 2


def test_a_gpus_file_has_predictions_for_each_operator():
    predicted = importlib.import_module("predicted")
    for device, (_, table) in predicted.load(BENCH / "results").items():
        assert {entry.operator for entry in table} == {"roi_gather", "region_attention", "pack_patches"}, device


def test_a_gpus_tuned_launches_among_the_results_are_no_rows(tmp_path):
    (tmp_path / "nvidia-h200-tuned.json").write_text('{"device": "NVIDIA H200", "launches": {}}')
    assert importlib.import_module("predicted").load(tmp_path) == {}


def test_counted_instructions_stand_beside_those_that_a_gpu_executed():
    predicted = importlib.import_module("predicted")
    trips = (("copy", 2), ("copy", 3), ("resample", 9))
    parts = [{"kernel": kernel, "instructions": 10, "trips": number} for kernel, number in trips]
    floor = {"operator": "pack_patches", "workload": "A", "shape": "patches of 16", "parts": parts}
    row = {"operator": "pack_patches", "kernel": "copy_kernel", "instructions": 49.0}
    row |= {"issue_active": 0.5, "dram_share": 0.6, "occupancy": 0.7}
    [execution] = predicted.executions([floor, floor | {"workload": "B"}], [row, row | {"kernel": "unknown"}])
    assert execution[2:] == (50, 49.0, 0.5, 0.6, 0.7)
