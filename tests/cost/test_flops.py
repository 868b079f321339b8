from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from granvit.cost.flops import Sizes, count, operations, pictures_of
from granvit.data.batches import collate
from granvit.data.crops import Crops
from granvit.lora import Lora, adapters, add_adapters
from granvit.questions.schema import Region, Sample
from granvit.train.distill import Teacher
from granvit.train.presets import Distill
from granvit.train.stages import Stage
from granvit.train.step import stage_loss

STAGES = [("encoder", "projector"), ("projector", "llm"), ("encoder", "projector", "llm"), ("projector",)]
MATRICES = ("aten.mm", "aten.addmm")


@pytest.fixture(params=["bbox2caption", "caption2bbox"])
def step(tiny, request):
    """A model, the batch of a step without padding, and its pictures. caption2bbox has no boxes in its prompts, for
    which the region prompt then has nothing to compute."""
    model, processor = tiny(box_style="both", max_image_tokens=12)
    samples, asked = [], []
    for seed in range(2):
        image = torch.randint(0, 256, (48, 64, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        regions = tuple(
            Region((0.1 * i, 0.2, 0.1 * i + 0.5, 0.7), caption, "natural")
            for i, caption in enumerate(("a red striped circle", "the blue star on the left"))
        )
        samples.append(Sample(str(seed), image, "a scene with 2 things", regions, "test", ""))
        asked.append(processor.questions(samples[-1], ["global_caption", request.param]))
    crops = Crops(tokens=6)
    batch = collate(samples, asked, processor, 4096, crops)
    assert (batch.packed.image_index >= 0).all()
    return model, batch, pictures_of(samples, asked, processor, crops.choose(samples, asked, [range(2)], processor))


def counted(model, batch, train) -> dict[str, int]:
    """What torch counts of a step, by operator."""
    for name, group in model.groups().items():
        for parameter in group:
            parameter.requires_grad_(name in train)
    stage = Stage("pretrain", train=train, tasks=("bbox2caption",), distill=float("encoder" in train))
    teacher = Teacher(model.encoder, 0.9) if "encoder" in train else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stage_loss(model, teacher, batch, stage, Distill())["loss"].backward()
    return {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("train", STAGES)
def test_matrices_are_those_that_torch_counts(step, train):
    model, batch, pictures = step
    sizes, counts = Sizes.of(model), count(pictures)
    if "encoder" not in train:
        counts = replace(counts, crop_patches=0, crop_pairs=0)
    assert counts.tokens == batch.packed.input_ids.numel() and counts.answers == len(batch.packed.targets)
    without_attention = replace(sizes, encoder_attention=0, llm_attention=0, region_attention=0, region_values=0)
    found = counted(model, batch, train)
    assert sum(found.get(name, 0) for name in MATRICES) == operations(without_attention, counts, train).total


@pytest.mark.parametrize("train", STAGES)
def test_adapters_learn_in_place_of_the_llm(step, train):
    given, batch, pictures = step
    model, whole = deepcopy(given), Sizes.of(given)
    add_adapters(model.llm, Lora(4))
    sizes = Sizes.of(model)
    assert sizes.adapters == sum(parameter.numel() for parameter in adapters(model.llm))
    assert replace(sizes, adapters=0) == whole
    counts = count(pictures)
    if "encoder" not in train:
        counts = replace(counts, crop_patches=0, crop_pairs=0)
    without_attention = replace(sizes, encoder_attention=0, llm_attention=0, region_attention=0, region_values=0)
    found = counted(model, batch, train)
    assert sum(found.get(name, 0) for name in MATRICES) == operations(without_attention, counts, train).total


@pytest.mark.parametrize("train", STAGES)
def test_attention_is_at_most_what_torch_counts_of_the_squares(step, train):
    """Torch counts the products of the whole square where the mask lets a part through, and not the region prompt's,
    which is an operator of ours."""
    model, batch, pictures = step
    counts = count(pictures)
    if "encoder" not in train:
        counts = replace(counts, crop_patches=0, crop_pairs=0)
    only = replace(Sizes.of(model), **{
        name: 0 for name in ("patch", "encoder", "projector", "cells", "geometry", "region_logits", "region",
                             "llm", "output", "locations", "region_attention")
    })  # fmt: skip
    # In float32 on the CPU our packed attention takes SDPA, whose products without a kernel of their own are counted.
    found = sum(number for name, number in counted(model, batch, train).items() if name not in MATRICES)
    # Not counted: the queries folded into W_key once, forward and both gradients. W_value is a product by heads, too.
    found -= 6 * len(model.region_prompt.queries) * model.region_prompt.key.weight.numel()
    rows, length = batch.packed.input_ids.shape
    square = replace(counts, pairs=rows * length**2)
    useful = operations(only, counts, train).total
    assert useful <= found <= operations(only, square, train).total
    assert operations(only, replace(counts, pairs=0), train).total < useful
