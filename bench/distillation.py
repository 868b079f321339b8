"""What the targets of self-distillation are worth, and what its features cost.

    python bench/distillation.py targets|crops [--seeds 3] [--steps WARMUP PRETRAIN ADAPT]
    python bench/distillation.py bytes

targets: trains the preset quick, on one thread, with each target and with none, and writes what captions (after stage
1) and boxes (after stage 2) are worth and what became of the encoder's features
(bench/results/distillation_targets.json). All targets of a seed go on from one warmed-up LLM. Runs that the file has of
this commit are not done again.

crops: the same for the default target, with the teacher's crops as they are and of one grid for all
(bench/results/distillation_crops.json).

bytes: would one kernel for roi_gather and its loss pay? Runs both as a training step does, forward and backward, on the
meta device: nothing is computed, and every operation's inputs and outputs are added up, as if no cache held any. The
time at the bandwidth of an H200's large copy stands beside what the student's encoder alone takes at the peak of its
tensor cores. A step takes longer than that, so the share is an upper bound; of the base encoder, a row also has the
share of the step as measured (bench/results/distillation.json).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from unittest.mock import patch

import torch
from rows import Rows, provenance, results_folder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from workloads import BINS

from granvit.data.crops import Crops
from granvit.data.sample import cached_sample
from granvit.eval.metrics import is_attribute
from granvit.machine import device_name
from granvit.train.distill import Statistics, distillation_loss, feature_moments, feature_statistics
from granvit.train.guard import Termination
from granvit.train.presets import PRESETS, TrainConfig
from granvit.train.run import Run
from granvit.train.step import region_features
from granvit.world import World
from granvit_kernels import PackedLayout

TARGETS = ("mse", "cosine", "layer_norm", "standardized")
ONE_GRID = "one grid of 4 x 4"
VARIANTS = {"targets": ("target", ("none", *TARGETS)), "crops": ("crops", ("fitted to the box", ONE_GRID))}
METRICS = ("bbox2caption_rouge_l", "bbox2caption_exact", "caption2bbox_acc50", "effective_rank", "std")

IMAGES, SIDE, REGIONS, CROP = 24, 32, 120, 16
"""As the measured training step has them (nvidia-h200-training.json), every image of the most patches, and crops as the
preset paper's."""

SHAPES = {"base": (768, 12, 3072), "so400m": (1152, 27, 4304)}
"""SigLIP2's encoders: channels, layers, channels of the MLP."""

COPY, PEAK = 4.28e12, 989e12
"""Of an H200: bytes a second of a large copy (nvidia-h200.json), and bfloat16 operations a second."""


class Moved(TorchDispatchMode):
    """Adds up the bytes of every operation's tensors, views apart."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return output


def row(shape: str, target: str) -> dict:
    channels, layers, mlp = SHAPES[shape]
    layout = PackedLayout.from_grids([(SIDE, SIDE)] * IMAGES).to("meta")
    features = torch.empty(layout.num_tokens, channels, dtype=torch.bfloat16, device="meta", requires_grad=True)
    crops = PackedLayout.from_grids([(CROP, CROP)] * REGIONS).to("meta")
    seen = torch.empty(crops.num_tokens, channels, dtype=torch.bfloat16, device="meta")
    boxes, index = torch.empty(REGIONS, 4, device="meta"), torch.empty(REGIONS, dtype=torch.int64, device="meta")
    statistics = Statistics(channels, torch.device("meta"))
    with Moved() as moved:
        student = region_features(features, layout, boxes, index, (BINS, BINS))
        teacher = region_features(seen, crops, boxes, index, (BINS, BINS))
        distillation_loss(student, teacher, target, statistics).mean().backward()
        if target == "standardized":
            statistics.moments(student, teacher)
    # A token's products forward, and twice as many backward.
    operations = 3 * 2 * layers * (4 * channels**2 + 2 * channels * mlp) * layout.num_tokens
    seconds, encoder = moved.bytes / COPY, operations / PEAK
    return {
        "shape": shape, "target": target, "images": IMAGES, "regions": REGIONS, "bytes": moved.bytes,
        "seconds": seconds, "encoder_seconds": encoder, "share": seconds / encoder,
    } | ({"share_of_step": seconds / step_seconds()} if shape == "base" else {})  # fmt: skip


def step_seconds() -> float:
    """The fastest measured training step of the base encoder on an H200."""
    rows = json.loads((Path(__file__).parent / "results" / "nvidia-h200-training.json").read_text())
    return min(row["median"] for row in rows if row["provider"] == "granvit" and row["shape"] == "base")


def count_bytes() -> None:
    rows = Rows(results_folder() / "distillation.json", ("shape", "target"))
    for shape in SHAPES:
        for target in TARGETS:
            made = row(shape, target)
            rows.save({**made, **provenance("counted")})
            time = f"{made['seconds'] * 1e6:.0f} us, {made['share']:.2%} of the encoder's bound"
            print(f"{shape} {target}: {made['bytes'] / 1e6:.0f} MB, {time}")


def of(target: str, seed: int, steps: list[int] | None) -> TrainConfig:
    """The run that is measured: of the preset quick, but for the target."""
    quick = PRESETS["quick"]
    path = str(cached_sample(quick.data.images, seed=0, pages=quick.data.pages))
    warmup, pretrain, adapt = steps or (quick.warmup.steps, quick.pretrain.steps, quick.adapt.steps)
    distill = quick.distill if target == "none" else replace(quick.distill, target=target)
    return replace(
        quick,
        warmup=replace(quick.warmup, steps=warmup),
        pretrain=replace(
            quick.pretrain, steps=pretrain, distill=0.0 if target == "none" else quick.pretrain.distill, eval_every=0
        ),
        adapt=replace(quick.adapt, steps=adapt),
        distill=distill,
        data=replace(quick.data, path=path, eval_images=120, workers=1),
        seed=seed,
        threads=1,
        device="cpu",
    )


def trained(config: TrainConfig, folder: Path, warm: Path) -> dict[str, float]:
    """Metrics of a run in `folder`. warm: a folder for the seed's warmed-up LLM, which the first run leaves there."""
    if warm.exists():
        shutil.copytree(warm, folder / "checkpoints")
    run = Run(config, folder, World(), torch.device(config.device), Termination())
    run.phase(config.warmup)
    if not warm.exists():
        shutil.copytree(folder / "checkpoints", warm)
    began = time.perf_counter()
    run.phase(config.pretrain)
    seconds = time.perf_counter() - began
    captions = run.evaluation(config.pretrain, config.pretrain.steps, "after")
    test = run.splits["test"]
    with torch.no_grad():
        features, _ = run.model.eval().encode([test[i].image for i in range(min(64, len(test)))])
    run.phase(config.adapt)
    boxes = run.evaluation(config.adapt, config.adapt.steps, "after")
    kept = {name: captions[name] for name in METRICS if name in captions}
    kept |= {name: captions[name] for name in captions if name.startswith("bbox2caption_") and is_attribute(name)}
    kept |= {"caption2bbox_acc50": boxes["caption2bbox_acc50"], "pretrain_seconds": seconds}
    spread = feature_statistics(feature_moments(features))
    return kept | {name: float(value) for name, value in spread.items()}


def compare(what: str, seeds: int, steps: list[int] | None) -> None:
    """Train each of `what`'s variants with each seed. The row of a run has its variant under `what`'s singular."""
    name, variants = VARIANTS[what]
    rows = Rows(results_folder() / f"distillation_{what}.json", (name, "seed"))
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            for variant in variants:
                config = of(variant if what == "targets" else PRESETS["quick"].distill.target, seed, steps)
                stages = (config.warmup, config.pretrain, config.adapt)
                key = {name: variant, "seed": seed, "steps": [stage.steps for stage in stages]}
                if not rows.has(**key):
                    with one_grid() if variant == ONE_GRID else nullcontext():
                        measured = trained(config, Path(folder) / variant, Path(folder) / "warm")
                    rows.save({**key, **measured, **provenance(device_name("cpu"))})
    print(f"{name:14}" + "".join(f"{metric:>24}" for metric in METRICS))
    for variant in variants:
        runs = [row for row in rows.kept() if row[name] == variant]
        columns = ([run[metric] for run in runs] for metric in METRICS)
        shown = (f"{fmean(c):.3f} +- {stdev(c) if len(c) > 1 else 0:.3f}" for c in columns)
        print(f"{variant:14}" + "".join(f"{text:>24}" for text in shown))


@contextmanager
def one_grid() -> Iterator[None]:
    """Crops as they were before: 4 x 4 patches each, whatever the student sees."""
    with patch.object(Crops, "grid", lambda *_: (4, 4)):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*VARIANTS, "bytes"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs=3, metavar=("WARMUP", "PRETRAIN", "ADAPT"))
    arguments = parser.parse_args()
    if arguments.what == "bytes":
        count_bytes()
    else:
        compare(arguments.what, arguments.seeds, arguments.steps)


if __name__ == "__main__":
    main()
