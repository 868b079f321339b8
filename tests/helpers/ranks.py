"""What the tests of training on several ranks run on each of them."""

import copy
import ctypes
import gc
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from granvit.data.batches import Batch, Read, collate, join
from granvit.eval import __main__ as measuring
from granvit.lora import Lora
from granvit.model import GranViT
from granvit.questions.prompts import GLOBAL_CAPTION
from granvit.rehearsal.collectives import Collective, Recorder
from granvit.train import __main__
from granvit.train.feed import StepInput
from granvit.train.guard import Termination
from granvit.train.loop import Phase
from granvit.train.presets import TrainConfig, load_config
from granvit.train.run import Run
from granvit.train.step import Share
from granvit.world import RollCall, World

STEPS = {"warmup": 3, "pretrain": 20, "adapt": 5}


# Who has what: for each step the four portions of its batch, each a list of (row, how many questions, with regions).
# Rank r of R has portions r, r + R, ...; so the steps are the same for any number of ranks.
EVERY, NONE = 3, []
SPLITS = [
    [[(row, EVERY, True) for row in range(12)], [(12, 1, True)], [(13, EVERY, False)], [(14, 2, True), (15, 3, True)]],
    [[(1, EVERY, True), (2, 3, True)], NONE, [(3, 1, True)], NONE],  # no picture left on a rank, of 2 as of 4
    [[(row, 1, False)] for row in range(4)],  # no region anywhere
    [[(4, EVERY, True)], [(5, 1, False)], [(6, EVERY, True)], [(7, 1, False)]],  # on some ranks alone
    [NONE, NONE, NONE, NONE],
    [NONE, [(8, 3, True)], NONE, NONE],
    [[(row, 4, True)] for row in range(20, 24)],
]


def portion_batches(run: Run, stage, world: World, splits=SPLITS) -> Iterator[Batch]:
    """This rank's batch of each split."""
    for split in splits:
        samples, asked = [], []
        for row, many, whole in [one for portion in split[world.rank :: world.ranks] for one in portion]:
            sample = run.splits["train"][row]
            sample = sample if whole else replace(sample, regions=(), caption=f"a picture, number {row}")
            samples.append(sample)
            asked.append(run.processor.questions(sample, stage.tasks)[:many])
        yield of(run, samples, asked)


def of(run: Run, samples: list, asked: list) -> Batch:
    capacity, crops = run.config.data.capacity, run.config.crops
    if not samples:  # as the loader hands it out where every picture of it is faulty
        return join([Read([[]], [], [], [])], run.processor, capacity, crops)
    return collate(samples, asked, run.processor, capacity, crops)


def taken(phase: Phase, steps: Iterable[StepInput]) -> list[dict]:
    """The lines of these steps, which are read together at the end."""
    for step in steps:
        phase.take(step)
    return phase.read()


def fresh(run: Run) -> GranViT:
    """The model that the run began with; a phase in pieces copies it itself."""
    return run.model if run.sharing.pieces else copy.deepcopy(run.model)


def through_loader(run: Run, stage, world: World, steps: int) -> dict:
    """The stage's own steps."""
    phase = run.new_phase(replace(stage, steps=steps), fresh(run))
    return outcome(phase, taken(phase, phase.batches()))


def through_splits(run: Run, stage, world: World, packs: int = 4) -> dict:
    phase = run.new_phase(replace(stage, packs=packs), fresh(run))
    return outcome(phase, taken(phase, (phase.feed.step([batch]) for batch in portion_batches(run, stage, world))))


def accumulated(run: Run, stage, world: World, target: str) -> dict:
    """Steps of two batches each, from the splits."""
    run.config = replace(run.config, distill=replace(run.config.distill, target=target))
    phase = run.new_phase(replace(stage, packs=4, accumulate=2), fresh(run))
    batches = list(portion_batches(run, stage, world))
    return outcome(phase, taken(phase, (phase.feed.step(batches[i : i + 2]) for i in (0, 2, 5))))


def not_finite(run: Run, stage, world: World) -> dict:
    """Four steps. In the second the last rank's loss is infinite, though its gradient is finite."""
    phase = run.new_phase(replace(stage, steps=4), fresh(run))
    given = phase.loss_of

    def spoilt(model, teacher, step: int, batch: Batch, share: Share) -> dict:
        values, more = given(model, teacher, step, batch, share), math.inf if step == 2 else 0.0
        wrong = ("loss", "loss_caption") if world.rank == world.ranks - 1 else ()
        return values | {name: values[name] + more for name in wrong}

    phase.loss_of = spoilt
    lines, kept = [], []
    for step in phase.batches():
        lines += taken(phase, [step])
        tensors = [t.to_local() if isinstance(t, DTensor) else t for t in phase.tensors().values()]
        kept.append([tensor.detach().clone() for tensor in tensors])
    equal = [all(map(torch.equal, before, after)) for before, after in pairwise(kept)]
    return {"lines": lines, "unchanged": world.gather(equal)}


def outcome(phase, lines: list[dict]) -> dict:
    tensors = phase.tensors(whole=True)
    weights = {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}
    return {"lines": lines, "weights": weights}


def outcomes(config: TrainConfig, folder: Path, world: World, parallel: str) -> dict[str, dict]:
    """{case: lines and weights}. config.data.path is a folder with whole/ and faulty/, two datasets."""
    cases = {}
    whole, faulty = (
        replace(config, parallel=parallel, data=replace(config.data, path=f"{config.data.path}/{name}"))
        for name in ("whole", "faulty")
    )
    text = replace(whole, model=replace(whole.model, box_style="text", box_format="text"))

    def run_of(config: TrainConfig, name: str) -> Run:
        return Run(config, folder / f"{name}-{parallel}-{world.ranks}", world, torch.device("cpu"), Termination())

    run = run_of(whole, "whole")
    for stage in (whole.warmup, whole.pretrain, whole.adapt):
        cases[f"{stage.name} steps"] = through_loader(run, stage, world, STEPS[stage.name])
        cases[f"{stage.name} splits"] = through_splits(run, stage, world)
    captions = replace(whole.pretrain, tasks=(GLOBAL_CAPTION,))
    cases["no region question"] = through_loader(run, captions, world, 3)
    for target in ("mse", "cosine", "layer_norm", "standardized"):
        cases[f"{target} accumulated"] = accumulated(run, whole.pretrain, world, target)
    run = run_of(replace(whole, micro_packs=1), "micro")
    for stage in (whole.warmup, whole.pretrain, whole.adapt):
        # 8, 4 or 2 parts of each split on 1, 2 or 4 ranks; where it has fewer sequences, parts have none.
        cases[f"{stage.name} in micro-batches"] = through_splits(run, stage, world, packs=8)
    if parallel == "ddp":
        cases["muon"] = through_loader(run, replace(whole.pretrain, optimizer="muon"), world, 5)
    cases["not finite"] = not_finite(run_of(whole, "not-finite"), whole.pretrain, world)
    run = run_of(faulty, "faulty")
    cases["faulty pictures"] = through_loader(run, faulty.pretrain, world, 12)
    run = run_of(text, "text")
    for stage in (text.pretrain, text.adapt):
        cases[f"{stage.name} with boxes as text"] = through_loader(run, stage, world, 3)
    run = run_of(replace(whole, precision="bfloat16"), "bfloat16")
    cases["in bfloat16"] = through_loader(run, whole.pretrain, world, 2)
    return cases | with_adapters(whole, folder, world, parallel)


def with_adapters(config: TrainConfig, folder: Path, world: World, parallel: str) -> dict[str, dict]:
    """{case: lines and weights} of an LLM that learns by adapters, and is frozen in stage 1."""
    cases, path = {}, Path(config.data.path).parent
    for precision in ("float32", "bfloat16"):
        model = replace(config.model, llm=str(path / "llm"), lora=Lora(4))
        case = replace(config, parallel=parallel, precision=precision, model=model)
        name = folder / f"lora-{precision}-{parallel}-{world.ranks}"
        run = Run(case, name, world, torch.device("cpu"), Termination())
        for stage in (case.pretrain, case.adapt):
            cases[f"{stage.name} with adapters in {precision}"] = through_loader(run, stage, world, 2)
    return cases


def in_a_table(config: TrainConfig, folder: Path, world: World) -> dict[str, dict]:
    """{case: lines and weights} of nodes that each share a copy; in "pretrain resumed as P" the last of three steps, of
    which the first two were taken as "hsdp" or, before "hsdp", as "ddp"."""
    config = replace(config, data=replace(config.data, path=f"{config.data.path}/whole"))
    cases = with_adapters(config, folder, world, "hsdp")

    def run_of(parallel: str) -> Run:
        name = folder / f"table-{parallel}-{world.ranks}"
        return Run(replace(config, parallel=parallel), name, world, torch.device("cpu"), Termination())

    run = run_of("hsdp")
    assert run.sharing.parallel == "hsdp" and run.sharing.gathered
    for gathered, stage in ((True, config.pretrain), (False, config.warmup), (False, config.adapt)):
        run.sharing = replace(run.sharing, gathered=gathered)
        cases[f"{stage.name} steps"] = through_loader(run, stage, world, STEPS[stage.name])
        cases[f"{stage.name} splits"] = through_splits(run, stage, world)
    runs = {parallel: run_of(parallel) for parallel in ("ddp", "fsdp", "hsdp")}

    def phase_of(parallel: str):
        run = runs[parallel]
        return run.new_phase(replace(config.pretrain, steps=STEPS["pretrain"]), fresh(run))

    for first, others in (("hsdp", ("ddp", "fsdp")), ("ddp", ("hsdp",))):
        phase = phase_of(first)
        taken(phase, islice(phase.batches(), 2))
        assert not [name for name in phase.tensors() if "model.llm" in name], "it is frozen"
        runs[first].checkpoints.save("pretrain", 2, phase.tensors(), phase.values())
        runs[first].checkpoints.wait()
        for parallel in others:
            phase = phase_of(parallel)
            phase.resume(runs[first].checkpoints.newest("pretrain"))
            cases[f"pretrain resumed as {parallel}"] = outcome(phase, taken(phase, islice(phase.batches(), 1)))
    return cases


def keep_outcomes(world: World, folder: Path) -> None:
    """For every case the lines of its steps and the tensors after them, in FOLDER/ddp.pt, FOLDER/fsdp.pt and, of 2 x 2
    ranks, FOLDER/hsdp.pt."""
    config = load_config(folder / "config.yaml")
    for parallel in ("ddp", "fsdp", *(["hsdp"] if world.local < world.ranks else [])):
        of_table = parallel == "hsdp"
        cases = in_a_table(config, folder, world) if of_table else outcomes(config, folder, world, parallel)
        if world.leads:
            torch.save(cases, folder / f"{parallel}.pt")


def adapted(config: TrainConfig, folder: Path, world: World, parallel: str) -> dict[str, dict]:
    """{case: lines and weights} of an encoder that runs through the adapter."""
    config = replace(config, parallel=parallel)
    run = Run(config, folder / f"adapted-{parallel}-{world.ranks}", world, torch.device("cpu"), Termination())
    cases = {f"{stage.name} steps": through_loader(run, stage, world, 2) for stage in (config.pretrain, config.adapt)}
    return cases | {"pretrain splits": through_splits(run, config.pretrain, world)}


def keep_adapted(world: World, folder: Path) -> None:
    """As `keep_outcomes`."""
    config = load_config(folder / "config.yaml")
    for parallel in ("ddp", "fsdp"):
        cases = adapted(config, folder, world, parallel)
        if world.leads:
            torch.save(cases, folder / f"{parallel}.pt")


def train(_: World, folder: Path) -> None:
    """`python -m granvit.train --config FOLDER/config.yaml`; what it says is added to FOLDER/output."""
    with open(folder / "output", "a") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    sys.argv = ["granvit.train", "--config", str(folder / "config.yaml")]
    try:
        __main__.main()
    except SystemExit as end:  # as Python itself deals with it
        print(end.code, file=sys.stderr)
    finally:
        sys.stdout.flush()


def keep_held_out(world: World, folder: Path) -> None:
    """What evaluations of a stage on its way find with ddp and with fsdp: their lines, in FOLDER/held_out-RANKS.pt."""
    config, evaluations = load_config(folder / "config.yaml"), {}
    for parallel in ("ddp", "fsdp"):
        run = Run(
            replace(config, parallel=parallel), folder / f"held-out-{parallel}-{world.ranks}", world,
            torch.device("cpu"), Termination(),
        )  # fmt: skip
        run.phase(replace(config.pretrain, eval_every=2))
        evaluations[parallel] = [line for line in run.metrics.lines() if line.get("evaluation") == "during"]
        evaluations[parallel].append({"best": Path(run.checkpoints.folder / "pretrain-best").resolve().name})
    if world.leads:
        torch.save(evaluations, folder / f"held_out-{world.ranks}.pt")


def measure(_: World, *arguments: str) -> None:
    """`python -m granvit.eval ARGUMENTS`."""
    assert measuring.main(list(arguments)) == 0


def dally(world: World, folder: Path) -> None:
    """The second rank lets the others wait; what each logs is in FOLDER/log-RANK."""
    logging.basicConfig(filename=folder / f"log-{world.rank}", format="%(message)s", force=True)
    roll_call = RollCall(dist.distributed_c10d._get_default_store(), world.rank, world.ranks, seconds=0.5)
    world = replace(world, roll_call=roll_call)
    assert world.total(1) == [world.ranks]
    time.sleep(3 * (world.rank == 1))
    assert world.gather(world.rank) == list(range(world.ranks))
    assert world.first(lambda: 7) == 7


class ListeningRank(World):
    """Writes down what ranks add up on the host, too."""

    recorder = Recorder()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.recorder.collectives.append(Collective("all_reduce", 8 * tensor.numel(), "host", self.ranks))
        return super().sum(tensor)


def keep_collectives(world: World, folder: Path) -> None:
    """What collectives the first rank takes part in, in each of two steps of each stage, in words, the exchanges on the
    host too: in FOLDER/collectives-STAGE.pt."""
    config = load_config(folder / "config.yaml")
    run = Run(config, folder / "run", world, torch.device("cpu"), Termination())
    for stage in config.stages:
        world = ListeningRank(world.rank, world.ranks, control=world.control)
        run.world = world
        phase = run.new_phase(stage, fresh(run))
        phase.step, steps, batches = 1, [], phase.batches()
        for _ in range(2):
            world.recorder.collectives = []
            given = next(batches)
            with world.recorder:
                phase.take(given)
            steps.append(list(map(str, world.recorder.collectives)))
        if world.leads:
            torch.save(steps, folder / f"collectives-{stage.name}.pt")


def keep_peaks(world: World, folder: Path) -> None:
    """Bytes of memory of its own that this rank has at most while it builds a model, in FOLDER/peaks-RANK.json."""
    config, peaks = load_config(folder / "config.yaml"), {}
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is larger is given back when it is freed

    def run_of(parallel: str) -> Run:
        return Run(
            replace(config, parallel=parallel), folder / parallel, world, torch.device("cpu"), Termination()
        )  # fmt: skip

    run_of("fsdp")  # imports, and what libraries keep
    for parallel in ("fsdp", "hsdp", "ddp"):
        with peak_memory() as peak:
            run = run_of(parallel)
        peaks[parallel] = peak[0]
        if parallel == "fsdp":
            with peak_memory() as peak:
                phase = run.new_phase(replace(config.pretrain, distill=0.0, packs=4))
            peaks["a phase in pieces"] = peak[0]
            del phase
        del run
        gc.collect()
    (folder / f"peaks-{world.rank}.json").write_text(json.dumps(peaks))


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Of memory that is no file's, what this process has more of inside, at most; its only member, at the end."""
    gc.collect()
    before, peak, over = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            peak[0] = max(peak[0], anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))
