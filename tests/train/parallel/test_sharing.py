"""Which way ranks share a model, and what it takes on each."""

from dataclasses import replace

import pytest
import torch

from granvit.cost.shapes import config_of, on_meta
from granvit.lora import Lora
from granvit.train.guard import Termination
from granvit.train.parallel.sharing import choose, state_bytes
from granvit.train.presets import PRESETS
from granvit.train.run import Run
from granvit.world import World

PAPER = PRESETS["paper"]
TWO_NODES = World(ranks=16, local=8)


@pytest.fixture(scope="module")
def paper():
    return on_meta(config_of(PAPER.model))


@pytest.mark.parametrize(
    ("asked", "gigabytes", "world", "chosen", "gathered"),
    [
        ("auto", 80, TWO_NODES, "ddp", False),
        ("auto", 24, TWO_NODES, "hsdp", True),
        ("auto", 24, World(ranks=8, local=8), "fsdp", True),
        ("auto", 5.5, TWO_NODES, "fsdp", False),
        ("fsdp", 80, TWO_NODES, "fsdp", True),
        ("hsdp", 80, TWO_NODES, "hsdp", True),
        ("hsdp", 80, World(ranks=8, local=8), "fsdp", True),  # a node's copy is the only one
        ("ddp", 24, TWO_NODES, "ddp", False),
        ("auto", 1, World(), "ddp", False),
    ],
)
def test_what_fits_is_chosen(paper, asked, gigabytes, world, chosen, gathered):
    """The paper's model has 25 GB of weights, gradients and moments in stage 2, and 3.1 GB of a frozen LLM in stage 1.
    """
    sharing = choose(replace(PAPER, parallel=asked), paper, world, int(gigabytes * 1e9))
    assert (sharing.parallel, sharing.gathered) == (chosen, gathered), sharing.why
    if world.ranks > 1:
        assert sharing.why.startswith(f"parallel {asked}: {chosen}. ") and f"{gigabytes:g} GB" in sharing.why


def test_muon_has_copies(paper):
    muon = replace(PAPER, pretrain=replace(PAPER.pretrain, optimizer="muon"))
    assert choose(muon, paper, TWO_NODES, int(1e9)).parallel == "ddp"


@pytest.mark.parametrize("rank", [0, 4])
def test_bytes_are_those_of_a_phase(small_config, llm_folder, tmp_path, rank):
    model = replace(small_config.model, llm=str(llm_folder("llama")), lora=Lora(rank))
    config = replace(small_config, model=model)
    run = Run(config, tmp_path / "run", World(), torch.device("cpu"), Termination())
    for stage in (config.pretrain, config.adapt, replace(config.adapt, optimizer="adamw")):
        phase = run.new_phase(stage, run.model)
        kept = {name: t for name, t in phase.tensors(whole=True).items() if not name.startswith("teacher.statistics")}
        moments = [t for name, t in kept.items() if name.startswith("optimizer.") and t.dim()]
        tied = run.model.llm.lm_head.weight.nbytes if "model.llm.lm_head.weight" in kept else 0  # by two names
        under = sum(p.nbytes for p in run.model.llm.parameters()) if rank else 0
        under -= sum(p.nbytes for p in run.model.groups()["llm"]) if rank else 0
        rest = sum(t.nbytes for name, t in kept.items() if not name.startswith("optimizer.") and "scale" not in name)
        expected = rest - tied + under + sum(t.nbytes for t in moments) + sum(p.nbytes for p in phase.trained)
        assert state_bytes(run.model, stage, 1) == pytest.approx(expected, abs=0), stage.name
        frozen = [p for p in run.model.parameters() if not p.requires_grad and p.numel()]
        frozen = sum(p.numel() for p in frozen) - under // 4
        assert state_bytes(run.model, stage, 4, 2) == pytest.approx((expected - under) / 4 + under + 2 * frozen, abs=1)
