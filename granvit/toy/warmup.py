"""Warm-up of a tiny LLM on text, before stage 1 freezes it.

A frozen LLM can only teach an encoder if it knows how to speak of what stands at an image's tokens. A large one does;
one from scratch learns it here, without a pixel, from a *textual layout*: where the image's tokens will stand it gets,
for each cell, the embeddings of the captions whose boxes cover the cell, and where a region's token will stand those
of the region's own caption. It sees captions and boxes of training images alone.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from granvit.data.collate import Batch
from granvit.model import GranViT
from granvit.model.llm import embedding_rms
from granvit.questions.schema import Sample
from granvit_kernels import PackedLayout

NOISE = 0.3
"""Standard deviation of the noise on the layout, in units of the embeddings': an encoder's features are not exact."""


def layout_embeds(model: GranViT, processor, batch: Batch, seed: str) -> tuple[Tensor, Tensor]:
    """(image_embeds [N, D], region_embeds [R, K, D]) that stand for an encoder's in the warm-up. The noise on them is a
    function of `seed` and of each image's id, and so the same whatever batch an image is in."""
    bags, scale = _caption_bags(model, processor, batch)
    per_image, grids, start = [], [], 0
    for sample, (rows, columns) in zip(
        batch.samples, (model.config.token_grid(*s.image.shape[:2]) for s in batch.samples), strict=True
    ):
        count = len(sample.regions)
        share = _coverage(sample, rows, columns, bags.device)
        per_image.append(share @ bags[start : start + count])
        grids.append((rows, columns))
        start += count
    generators = [torch.Generator().manual_seed(zlib.crc32(f"{seed} {s.id}".encode())) for s in batch.samples]
    noise = [torch.randn(embeds.shape, generator=g) for embeds, g in zip(per_image, generators, strict=True)]
    image = torch.cat(per_image)
    image = image + NOISE * scale * torch.cat(noise).to(image)
    image = model.placed(image, PackedLayout.from_grids(grids, device=image.device))
    asked = _asked_regions(batch)
    region = bags[asked, None].expand(-1, model.config.region_tokens, -1)
    noise = [torch.randn(region.shape[1:], generator=generators[i]) for i in batch.packed.box_image_index.tolist()]
    region = region + NOISE * scale * torch.stack(noise).to(region) if noise else region
    return image, region


def _caption_bags(model: GranViT, processor, batch: Batch) -> tuple[Tensor, float]:
    """Each region's caption as the sum of its tokens' embeddings [R, D], at the scale of the LLM's embeddings."""
    captions = [region.caption for sample in batch.samples for region in sample.regions]
    ids = processor.tokenizer(captions, add_special_tokens=False)["input_ids"] if captions else []
    owner, flat = (
        torch.tensor(numbers, dtype=torch.int64, device=batch.regions.device)
        for numbers in ([i for i, tokens in enumerate(ids) for _ in tokens], [t for tokens in ids for t in tokens])
    )
    embeds = model.embed_ids(flat)
    bags = torch.zeros(len(ids), embeds.shape[-1], device=embeds.device).index_add(0, owner, embeds.float())
    scale = embedding_rms(model.llm.get_input_embeddings(), model.config.text_vocab)
    return bags * (scale / bags.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)), scale


def _coverage(sample: Sample, rows: int, columns: int, device: torch.device) -> Tensor:
    """Share [rows * columns, R] of each cell that each region's box covers."""
    boxes = torch.tensor([region.box for region in sample.regions], dtype=torch.float32).reshape(-1, 4)

    def along(low: Tensor, high: Tensor, cells: int) -> Tensor:
        edge = torch.arange(cells, dtype=torch.float32)[:, None]
        return (torch.minimum(high * cells, edge + 1) - torch.maximum(low * cells, edge)).clamp(0, 1)

    x = along(boxes[:, 0], boxes[:, 2], columns)
    y = along(boxes[:, 1], boxes[:, 3], rows)
    return (y[:, None] * x[None]).reshape(rows * columns, -1).to(device)


def _asked_regions(batch: Batch) -> Tensor:
    """The number (in batch.regions) of every box that a question asks about."""
    if not len(batch.packed.boxes):
        return batch.packed.box_image_index
    same = (batch.packed.boxes[:, None] == batch.regions[None]).all(-1)
    same &= batch.packed.box_image_index[:, None] == batch.region_image[None]
    return same.int().argmax(-1)
