"""A batch of images that have sizes and nothing else: what a step's memory is counted with."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from types import SimpleNamespace

import numpy as np
import torch

from granvit.cost.flops import Asked, Picture
from granvit.data.collate import Batch
from granvit.model import GranViTConfig
from granvit.questions.packing import IGNORE, Part, pack_parts
from granvit.questions.prompts import BBOX2CAPTION, Question
from granvit.questions.schema import Sample

BOX = (0.25, 0.25, 0.75, 0.75)
"""Of every region. How large regions are changes a step's memory little."""


def batch_of(rows: Sequence[Sequence[Picture]], config: GranViTConfig, device: torch.device) -> Batch:
    """The batch in which each of `rows` is a sequence, with as many patches, tokens, answers, region tokens and crops
    as its pictures have. It lies on the host, but for the images, which are on `device`."""
    pictures = [picture for row in rows for picture in row]
    side = config.patch_size
    images = [torch.empty(h * side, w * side, 3, dtype=torch.uint8, device=device) for h, w in map(_grid, pictures)]
    samples = [Sample(str(i), image, None, (), "", "") for i, image in enumerate(images)]
    asked = [[_question(each, config) for each in picture.asked] for picture in pictures]
    parts = [_part(*pair, config) for pair in zip(pictures, images, strict=True)]
    numbers = iter(range(len(pictures)))
    plan = [[next(numbers) for _ in row] for row in rows]
    writer = SimpleNamespace(
        image_token_id=config.image_token_id,
        region_token_id=config.region_token_id,
        tokenizer=SimpleNamespace(pad_token_id=0),
    )
    packed = pack_parts(samples, asked, parts, writer, max(len(part.ids) for part in parts), plan)
    crops = [(i, patches) for i, picture in enumerate(pictures) for patches in picture.crops]
    owners = torch.tensor([i for i, _ in crops], dtype=torch.int64)
    frames = [(i, 0, 0, images[i].shape[1], images[i].shape[0]) for i, _ in crops]
    return Batch(
        samples,
        asked,
        packed,
        regions=torch.tensor([BOX] * len(crops), dtype=torch.float32).reshape(-1, 4),
        region_image=owners,
        crop_regions=torch.arange(len(crops)),
        crops=torch.tensor(frames, dtype=torch.float64).reshape(-1, 5),
        crop_grids=torch.tensor([_sides(patches) for _, patches in crops], dtype=torch.int32).reshape(-1, 2),
    )


def _grid(picture: Picture) -> tuple[int, int]:
    return _sides(picture.patches)


def _sides(patches: int) -> tuple[int, int]:
    """Of a grid of so many patches, as square as can be."""
    rows = next(rows for rows in range(isqrt(patches), 0, -1) if patches % rows == 0)
    return rows, patches // rows


def _question(asked: Asked, config: GranViTConfig) -> Question:
    boxes = (BOX,) * (asked.prompts // max(1, config.region_tokens))
    return Question(BBOX2CAPTION, "", "", boxes, region=0 if asked.region else None)


def _part(picture: Picture, image: torch.Tensor, config: GranViTConfig) -> Part:
    """Ids of an image and its questions, of which only markers mean anything."""
    tokens = picture.head + config.image_tokens(*image.shape[:2])
    ids, labels, owner = [np.zeros(tokens, np.int64)], [np.full(tokens, IGNORE)], [np.zeros(tokens, np.int64)]
    ids[0][picture.head :] = config.image_token_id
    for number, asked in enumerate(picture.asked, start=1):
        ids.append(np.zeros(asked.tokens, np.int64))
        ids[-1][: asked.prompts] = config.region_token_id
        labels.append(np.full(asked.tokens, IGNORE))
        labels[-1][asked.tokens - asked.answers :] = 0
        owner.append(np.full(asked.tokens, number))
    return Part(np.concatenate(ids), np.arange(sum(map(len, ids))), np.concatenate(labels), np.concatenate(owner))
