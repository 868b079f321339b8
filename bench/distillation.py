"""What the features of self-distillation cost: would one kernel for roi_gather and its loss pay?

    python bench/distillation.py          writes bench/results/distillation.json

Runs both as a training step does, forward and backward, on the meta device: nothing is computed, and every operation's
inputs and outputs are added up, as if no cache held any. The time at the bandwidth of an H200's large copy stands
beside what the student's encoder alone takes at the peak of its tensor cores. A step takes longer than that, so the
share is an upper bound; of the base encoder, a row also has the share of the step as measured.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rows import Rows, provenance, results_folder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from workloads import BINS

from granvit.train.distill import Statistics, distillation_loss
from granvit.train.step import region_features
from granvit_kernels import PackedLayout

TARGETS = ("mse", "cosine", "layer_norm", "standardized")

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


def main() -> None:
    rows = Rows(results_folder() / "distillation.json", ("shape", "target"))
    for shape in SHAPES:
        for target in TARGETS:
            made = row(shape, target)
            rows.save({**made, **provenance("counted")})
            time = f"{made['seconds'] * 1e6:.0f} us, {made['share']:.2%} of the encoder's bound"
            print(f"{shape} {target}: {made['bytes'] / 1e6:.0f} MB, {time}")


if __name__ == "__main__":
    main()
