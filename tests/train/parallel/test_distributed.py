"""Several processes do what one does. One launch for each number of them takes all cases (see ranks.py)."""

from dataclasses import replace

import datasets
import pytest
import ranks
import torch
from launching import run_ranks
from ranks import SPLITS, outcomes

from granvit.train.presets import save_config
from granvit.world import World

CASES = [
    "warmup steps", "warmup splits", "pretrain steps", "pretrain splits", "adapt steps", "adapt splits",
    "no region question", "mse accumulated", "cosine accumulated", "layer_norm accumulated",
    "standardized accumulated", "warmup in micro-batches", "pretrain in micro-batches", "adapt in micro-batches",
    "faulty pictures", "pretrain with boxes as text", "adapt with boxes as text", "pretrain with adapters in float32",
    "adapt with adapters in float32",
]  # fmt: skip
OF_TABLE = [
    "pretrain steps", "pretrain splits", "warmup steps", "warmup splits", "adapt steps", "adapt splits",
    "pretrain with adapters in float32", "adapt with adapters in float32",
]  # fmt: skip
IN_BFLOAT16 = ["in bfloat16", "pretrain with adapters in bfloat16", "adapt with adapters in bfloat16"]


@pytest.fixture(scope="module")
def config(small_config, sample_set, llm_folder, tmp_path_factory):
    """Of a folder with whole/, the sample set, faulty/, of whose pictures two thirds can't be opened, and an LLM."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "whole").symlink_to(sample_set)
    (folder / "llm").symlink_to(llm_folder("qwen2"))
    rows = datasets.load_from_disk(str(sample_set)).cast_column("image", datasets.Image(decode=False))

    def spoil(row: dict, number: int) -> dict:
        return {"image": {"bytes": row["image"]["bytes"][:30] if number % 3 else row["image"]["bytes"], "path": None}}

    rows["train"] = rows["train"].map(spoil, with_indices=True)
    rows.save_to_disk(folder / "faulty")
    stages = {name: replace(getattr(small_config, name), packs=4) for name in ("warmup", "pretrain", "adapt")}
    data = replace(small_config.data, path=str(folder), capacity=128, fault_budget=1.0)
    return replace(small_config, **stages, data=data)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """What one process finds."""
    return outcomes(config, tmp_path_factory.mktemp("alone"), World(), "ddp")


@pytest.fixture(scope="module", params=[2, 4])
def together(config, tmp_path_factory, request):
    """What that many find, by "ddp" and "fsdp", and four as two nodes by "hsdp"."""
    folder = tmp_path_factory.mktemp("together")
    save_config(config, folder / "config.yaml")
    run_ranks(ranks.keep_outcomes, request.param, folder)
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_one_process(alone, together, parallel, case):
    """In micro-batches too, without which the one process does."""
    check(together[parallel][case], alone[case.replace("in micro-batches", "splits")])


def check(ours: dict, expected: dict) -> None:
    """Losses to 1e-5; Adam's means of the gradients to 1e-4 of the largest; weights as far as Adam's steps, which are
    of one size for however small a gradient, let them be."""
    for name in ("images", "regions"):
        assert [line[name] for line in ours["lines"]] == [line[name] for line in expected["lines"]]
    for line, other in zip(ours["lines"], expected["lines"], strict=True):
        # The first rank tells of its own features, where it has a picture.
        assert {name for name in line.keys() ^ other.keys() if not name.startswith("features_")} == set()
        assert ("loss" in line) == (line["images"] > 0)
        for name in ("loss", "loss_caption", "loss_distill"):
            assert line.get(name, 0) == pytest.approx(other.get(name, 0), abs=1e-5), (line, other)
        assert line.get("grad_norm", 0) == pytest.approx(other.get("grad_norm", 0), rel=1e-4)
    assert ours["weights"].keys() == expected["weights"].keys()
    largest = max(float(v.abs().max()) for n, v in expected["weights"].items() if n.endswith("exp_avg") and v.numel())
    wrong = {}
    for name, value in expected["weights"].items():
        off = (ours["weights"][name] - value).abs().double().flatten()
        most, mean = (float(off.max()), float(off.mean())) if off.numel() else (0.0, 0.0)
        limits = (1e-3, 1e-5)
        if name.endswith(".exp_avg"):
            limits = (1e-4 * largest, 1e-5 * largest)
        elif name.endswith(("k_proj.bias", "key.bias")):  # softmax takes a key's bias out again: all rounding
            limits = (1e-3, 1e-3)
        if not (most <= limits[0] and mean <= limits[1]):
            wrong[name] = (most, mean)
    assert not wrong


@pytest.mark.slow
def test_nodes_that_share_a_copy_each_do_what_one_process_does(alone, together):
    """What is frozen gathered once, and in stage 2 and the warm-up each time. A phase begun by copies goes on in pieces
    and the other way round."""
    if "hsdp" not in together:
        pytest.skip("two ranks are one node")
    cases = together["hsdp"]
    for case in OF_TABLE:
        check(cases[case], alone[case])
    expected = alone["pretrain steps"]["lines"][2]
    for parallel in ("ddp", "fsdp", "hsdp"):
        [line] = cases[f"pretrain resumed as {parallel}"]["lines"]
        for name in ("loss", "loss_caption", "loss_distill", "grad_norm"):
            assert line[name] == pytest.approx(expected[name], abs=1e-5, rel=1e-4), parallel


@pytest.mark.slow
@pytest.mark.parametrize("case", IN_BFLOAT16)
def test_losses_in_bfloat16_are_those_of_one_process(alone, together, case):
    for parallel in together.keys() - ({"hsdp"} if case == "in bfloat16" else set()):
        for line, other in zip(together[parallel][case]["lines"], alone[case]["lines"], strict=True):
            # FSDP's norms and biases are bfloat16 too, where autocast leaves them float32: captions' gradients show it.
            for name, tolerance in (("loss_caption", 5e-3), ("loss_distill", 5e-3), ("grad_norm", 2e-2)):
                assert line[name] == pytest.approx(other[name], rel=tolerance), (parallel, line, other)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_loss_that_is_infinite_on_one_rank_changes_nothing_on_any(alone, together, parallel):
    ours, expected = together[parallel]["not finite"], alone["not finite"]
    for lines in (ours["lines"], expected["lines"]):
        assert [line.get("skipped", False) for line in lines] == [False, True, False, False]
    assert all(equal == [True, False, False] for equal in ours["unchanged"])  # after each step but the first
    losses = [line.get("loss", 0) for line in ours["lines"]]
    assert losses == pytest.approx([line.get("loss", 0) for line in expected["lines"]], abs=1e-5)


@pytest.mark.slow
def test_muon_steps_as_in_one_process(alone, together):
    lines, expected = together["ddp"]["muon"]["lines"], alone["muon"]["lines"]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], abs=1e-4)


def test_the_splits_are_what_they_are_to_be(alone):
    """Unequal, empty on some rank, and empty on all: else the test above would show less than it says."""
    lines = alone["pretrain splits"]["lines"]
    assert [line["images"] for line in lines] == [sum(map(len, split)) for split in SPLITS]
    assert ["loss" in line for line in lines] == [True] * 4 + [False] + [True] * 2
    assert lines[2]["loss_distill"] == 0 and lines[2]["regions"] == 0
    assert 0 in [line["images"] for line in alone["faulty pictures"]["lines"]]
    assert any(0 < line["images"] < 4 for line in alone["faulty pictures"]["lines"])  # some of 4 ranks have none
    assert sum(line["images"] for line in alone["pretrain steps"]["lines"]) > 67  # and so, more than an epoch


@pytest.mark.parametrize("target", ["mse", "cosine", "layer_norm", "standardized"])
def test_batches_one_after_the_other_are_one_batch(config, alone, tmp_path, target):
    run = ranks.Run(
        replace(config, data=replace(config.data, path=f"{config.data.path}/whole"),
                distill=replace(config.distill, target=target)),
        tmp_path, World(), torch.device("cpu"), ranks.Termination(),
    )  # fmt: skip
    phase = run.new_phase(config.pretrain, run.model)
    pairs = [[a + b for a, b in zip(SPLITS[i], SPLITS[i + 1], strict=True)] for i in (0, 2, 5)]
    batches = ranks.portion_batches(run, config.pretrain, World(), pairs)
    lines = ranks.taken(phase, (phase.feed.step([batch]) for batch in batches))
    for line, other in zip(lines, alone[f"{target} accumulated"]["lines"], strict=True):
        for name in ("loss", "loss_caption", "loss_distill"):
            assert line[name] == pytest.approx(other[name], abs=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_alone_the_world_is_what_one_says():
    world = World()
    assert world.leads and world.total(1, 2.5) == [1, 2.5] and world.gather("a") == ["a"]
    assert world.first(lambda: 7) == 7
    with pytest.raises(KeyError):
        world.first(lambda: {}["nothing"])


@pytest.mark.slow
def test_what_the_first_rank_finds_wrong_is_said_once_and_without_a_traceback(config, tmp_path):
    """A name of a tracker that leads nowhere, which only the first rank looks for."""
    data = replace(config.data, path=f"{config.data.path}/whole")
    config = replace(config, output=str(tmp_path / "run"), data=data, trackers=("tensorboard", "no_such:thing"))
    save_config(config, tmp_path / "config.yaml")
    run_ranks(ranks.train, 2, tmp_path)
    output = (tmp_path / "output").read_text()
    assert "granvit train: error: trackers: 'no_such:thing' can't be made" in output, output
    assert "granvit train: error: the first rank failed (ValueError: trackers: 'no_such:thing'" in output
    assert 'granvit/train/run.py", line' not in output, output
    assert not (tmp_path / "run" / "config.yaml").exists()
