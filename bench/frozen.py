"""What freezing saves in one training step: FLOPs, and bytes kept for the backward pass.

    python bench/frozen.py          writes bench/results/frozen.json

At the smoke preset's size both are counted over a real step; at the paper's size FLOPs alone, over tensors without
memory. Operators of granvit_kernels count nothing, and neither does what is not a matrix product.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from kept import Kept
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Siglip2VisionConfig

from granvit.cost.shapes import ENCODERS, LLMS
from granvit.data.batches import PackLoader
from granvit.data.loader import GranDataset
from granvit.data.sample import build_sample
from granvit.machine import commit, device_name
from granvit.model import GranViT, GranViTConfig, VisionEncoder
from granvit.questions.packing import PackedBatch
from granvit.questions.segments import find_segments
from granvit.train.build import build
from granvit.train.distill import Teacher
from granvit.train.optimizer import freeze
from granvit.train.parallel.memory import checkpoint_activations
from granvit.train.presets import PRESETS
from granvit.train.stages import GROUPS, Stage
from granvit.train.step import stage_loss
from granvit_kernels import PackedLayout

RESULTS = Path(__file__).parent / "results" / "frozen.json"
SMOKE, PAPER = PRESETS["smoke"], PRESETS["paper"]
PACKS = 12

NAMES = {"SigLIP2-base": "siglip2-base", "SigLIP2-so400m": "siglip2-so400m"}
GRID, IMAGES, TEXT, ANSWERS = (32, 32), 3, 340, 120  # an image's grid, a sequence's images, an image's text and answers


def trained(stage: Stage) -> dict[str, Stage]:
    """The stage as it is, and with everything trained."""
    return {"frozen": stage, "trained": replace(stage, train=GROUPS)}


def smoke() -> dict:
    """FLOPs and bytes kept, of a step of each stage."""
    steps = {}
    with tempfile.TemporaryDirectory() as folder:
        build_sample(Path(folder) / "data", images=200, seed=0, workers=1)
        data = GranDataset(Path(folder) / "data", "train")
        torch.manual_seed(0)
        model, processor = build(SMOKE.model, data)
        for stage in (SMOKE.pretrain, SMOKE.adapt):
            tasks = dict.fromkeys(stage.tasks, 1.0)
            loader = PackLoader(
                data, processor, tasks, capacity=SMOKE.data.capacity, packs=PACKS, workers=0, crops=SMOKE.crops
            )
            batch = next(iter(loader))
            for name, one in trained(stage).items():
                steps[f"{stage.name}, {name}"] = smoke_step(model.train(), batch, one)
    return steps


def smoke_step(model: GranViT, batch, stage: Stage) -> dict[str, int]:
    freeze(model.groups(), stage.train)
    counts = {}
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(model)
        teacher = Teacher(model.encoder, 0.9) if stage.distill else None
        with FlopCounterMode(display=False) as flops:
            with Kept(model) as kept:
                loss = stage_loss(model, teacher, batch, stage, SMOKE.distill)["loss"]
            loss.backward()
        prefix = "checkpointed_" * checkpointed
        counts |= {f"{prefix}flops": flops.get_total_flops(), f"{prefix}kept_bytes": kept.bytes}
    model.encoder.checkpointing = False
    for layer in model.llm.get_decoder().layers:
        layer.gradient_checkpointing = False
    return counts


def paper() -> dict:
    """FLOPs of stage 2, for two encoders and both pixel shuffles."""
    steps = {}
    for name, shape in NAMES.items():
        for factor in (1, 2):
            with torch.device("meta"):
                vision = Siglip2VisionConfig(**ENCODERS[shape])
                kind, sizes = LLMS["qwen2.5-1.5b"]
                text = kind(**sizes)
                config = GranViTConfig(
                    vision_config=vision, text_config=text, text_vocab=151665, pixel_shuffle=factor, box_format="text",
                    box_style="text", attn_implementation="sdpa", max_image_tokens=1024,
                )  # fmt: skip
                llm = AutoModelForCausalLM.from_config(text, attn_implementation="sdpa")
                model = GranViT(config, VisionEncoder(vision), llm).train()
            for state, stage in trained(PAPER.adapt).items():
                steps[f"{name}, pixel shuffle {factor}, {state}"] = paper_step(model, stage, factor)
    return steps


def paper_step(model: GranViT, stage: Stage, factor: int) -> int:
    """FLOPs of one sequence."""
    freeze(model.groups(), stage.train)
    layout = PackedLayout.from_grids([GRID] * IMAGES)
    patches = torch.empty(layout.num_tokens, 16 * 16 * 3, device="meta")
    with FlopCounterMode(display=False) as flops:
        with torch.set_grad_enabled("encoder" in stage.train):
            features = model.encoder(patches, layout)
        index = torch.arange(layout.num_tokens).view(IMAGES, GRID[0] // factor, factor, GRID[1] // factor, factor)
        merged = features[index.movedim(2, 3).reshape(-1, factor**2).to("meta")].flatten(1)
        embeds = model.projector(merged)
        batch = sequence(len(embeds), IMAGES * TEXT, IMAGES * ANSWERS)
        regions = torch.empty(0, model.config.region_tokens, embeds.shape[1], device="meta")
        model.answer_losses(batch, embeds, regions).sum().backward()
    return flops.get_total_flops()


def sequence(image_tokens: int, text_tokens: int, answers: int) -> PackedBatch:
    """A packed batch of one sequence, as far as shapes go."""
    numbers = {"input_ids": (1, image_tokens + text_tokens), "image_slots": (image_tokens,), "region_slots": (0,)}
    numbers |= dict.fromkeys(("position_ids", "labels", "image_index", "question_index"), numbers["input_ids"])
    numbers |= {"box_image_index": (0,), "answer_slots": (answers,), "targets": (answers,)}
    tensors = {name: torch.empty(shape, dtype=torch.int64, device="meta") for name, shape in numbers.items()}
    nothing = np.zeros((1, 0), dtype=np.int64)  # the dense mask is counted, which needs no segments
    segments = find_segments(nothing, nothing)
    boxes = torch.empty(0, 4, device="meta")
    return PackedBatch(images=[], boxes=boxes, regions=0, segments=segments, **tensors)


def saving(counts: dict[str, int]) -> dict[str, float]:
    """The share that freezing saves, by what precedes ", frozen"."""
    return {
        name.removesuffix(", frozen"): 1 - count / counts[name.replace(", frozen", ", trained")]
        for name, count in counts.items()
        if name.endswith(", frozen")
    }


def main() -> None:
    small, large = smoke(), paper()
    result = {
        "commit": commit(),
        "device": device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "smoke": small,
        "smoke_saved": {
            key: saving({name: counts[key] for name, counts in small.items()}) for key in ("flops", "kept_bytes")
        },
        "paper_sequence": {"grid": GRID, "images": IMAGES, "text_tokens": IMAGES * TEXT, "answers": IMAGES * ANSWERS},
        "paper_flops": large,
        "paper_flops_saved": saving(large),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
