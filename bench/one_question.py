"""What others would train with today's libraries, to be timed beside ours: one question a sample, in padded batches.

Each sample is an image and one question: transformers' Siglip2VisionModel on padded patches, the same LLM on padded
ids, RoIAlign as products of matrices, an EMA teacher that sees crop after crop. Weights, losses, optimiser, crops and
precision are ours. Where there was a choice it is the faster one: batches are padded to their own longest sample and
not to a budget, only answers' hidden states meet the output table, padding does not meet the projector, a question's
crop is seen once, and patches are cut and ids written before the clock runs (ours cuts its patches while it runs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granvit.data.crops import Crops
from granvit.model import GranViT, GranViTProcessor
from granvit.model.region_prompt import box_features
from granvit.questions.prompts import Question
from granvit.questions.schema import Sample
from granvit.train.distill import Statistics, distillation_loss
from granvit.train.presets import Distill
from granvit.train.stages import Stage
from granvit_kernels import PackedLayout, pack_patches


@dataclass(frozen=True)
class Samples:
    """B samples, padded on the right to P patches and L tokens; n of them ask about a region and have a crop.

    pixel_values [B, P, patch_size**2 * 3], pixel_attention_mask [B, P] and spatial_shapes [B, 2] as transformers'
    processor gives them. input_ids, attention_mask [B, L]. images: where image tokens stand in the flattened ids, and
    of which places in the flattened patches; layout: of these. prompts: where region tokens stand; prompt_samples: the
    samples with such; geometry [R, 4] and coverage [R, P], their boxes and the log of how much of each cell these
    cover. answers: places in the flattened ids; targets: the tokens after. crops [n, Q, ...], padded; crop_grids
    [n, 2]; crop_samples [n]. boxes, whole: RoIAlign of each crop's box in its image, and of the whole crop.
    """

    pixel_values: Tensor
    pixel_attention_mask: Tensor
    spatial_shapes: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    images: Tensor
    patches: Tensor
    layout: PackedLayout
    prompts: Tensor
    prompt_samples: Tensor
    geometry: Tensor
    coverage: Tensor
    answers: Tensor
    targets: Tensor
    crops: Tensor
    crop_grids: Tensor
    crop_samples: Tensor
    boxes: RoIAlign
    whole: RoIAlign

    def to(self, device: str) -> Samples:
        return Samples(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class RoIAlign:
    """Mask R-CNN's RoIAlign (aligned, as many samples a bin as it has cells) of padded feature maps: its bins are means
    along both axes, so that two products with matrices that depend on the boxes alone give them."""

    def __init__(self, boxes: Sequence, grids: Sequence[tuple[int, int]], bins: tuple[int, int]) -> None:
        """boxes: relative xyxy, one in each map of these grids."""
        self.groups = []
        for grid in dict.fromkeys(grids):
            which = [i for i, other in enumerate(grids) if other == grid]
            theirs = torch.tensor([boxes[i] for i in which], dtype=torch.float32)
            down, across = (
                torch.stack([_bins(*(sides * size).tolist(), number, size) for sides in theirs[:, axis::2]])
                for axis, number, size in zip((1, 0), bins, grid, strict=True)
            )
            self.groups.append((grid, torch.tensor(which), down, across))

    def to(self, device: str) -> RoIAlign:
        moved = RoIAlign([], [], (1, 1))
        moved.groups = [(grid, *(tensor.to(device) for tensor in tensors)) for grid, *tensors in self.groups]
        return moved

    def __call__(self, features: Tensor) -> Tensor:
        """[n * h * w, C] of features [n, P, C]."""
        pieces, order = [], []
        for (rows, columns), which, down, across in self.groups:
            maps = features[which, : rows * columns].unflatten(1, (rows, columns)).float()
            pieces.append(torch.einsum("nkh,nhwc,nlw->nklc", down, maps, across))
            order.append(which)
        return torch.cat(pieces)[torch.cat(order).argsort()].flatten(0, 2)


def _bins(low: float, high: float, bins: int, size: int) -> Tensor:
    """How much each of `size` cells weighs in each bin of [low, high], [bins, size]."""
    samples = max(1, ceil((high - low) / bins))
    at = low + (torch.arange(bins * samples) + 0.5) * ((high - low) / (bins * samples)) - 0.5
    weights = (1 - (at.clamp(0, size - 1)[:, None] - torch.arange(size)).abs()).clamp(min=0)
    return weights.view(bins, samples, size).mean(1)


def prepare(
    pairs: Sequence[tuple[Sample, Question]],
    model: GranViT,
    processor: GranViTProcessor,
    distill: Distill,
    dtype: torch.dtype,
) -> Samples:
    """A padded batch of one question a sample. Regions' crops are those that questions ask about."""
    config = model.config
    grids = [config.grid(*sample.image.shape[:2]) for sample, _ in pairs]
    boxes = [None if q.region is None else sample.regions[q.region].box for sample, q in pairs]
    corners = []
    for (sample, _), box in zip(pairs, boxes, strict=True):
        if box is not None:
            (height, width), (x1, y1, x2, y2) = sample.image.shape[:2], box
            corners.append((0.0, x1 * width, y1 * height, min(x2 * width, width), min(y2 * height, height)))
    crop_samples = torch.tensor([i for i, box in enumerate(boxes) if box is not None], dtype=torch.int64)

    def cut(image: Tensor, crop: tuple | None, grid: tuple[int, int]) -> Tensor:
        crops = None if crop is None else torch.tensor([crop], dtype=torch.float64)
        return pack_patches(
            [image], config.vision_config.patch_size, config.image_mean, config.image_std,
            crops=crops, grids=torch.tensor([grid], dtype=torch.int32), dtype=dtype,
        )[0]  # fmt: skip

    patches = [cut(sample.image, None, grid) for (sample, _), grid in zip(pairs, grids, strict=True)]
    cropped = [pairs[i][0].image for i in crop_samples.tolist()]
    looks = Crops(distill.crop_tokens)
    crop_grids = [looks.grid(pairs[i][0], pairs[i][1].region, processor) for i in crop_samples.tolist()]
    crops = [cut(*crop) for crop in zip(cropped, corners, crop_grids, strict=True)]
    most = max((len(one) for one in crops), default=0)
    longest = max(len(one) for one in patches)
    pixel_values = torch.stack([F.pad(one, (0, 0, 0, longest - len(one))) for one in patches])
    seen = torch.tensor([[i < len(one) for i in range(longest)] for one in patches])

    rows, labels = [], []
    written = zip(
        (processor.image_tokens(*sample.image.shape[:2]) for sample, _ in pairs),
        processor.prompt_ids([q.prompt for _, q in pairs]),
        processor.answer_ids([q.answer for _, q in pairs]),
        strict=True,
    )
    for tokens, prompt, answer in written:
        before = processor.image_part(tokens) + prompt
        rows.append(before + answer)
        labels.append([False] * len(before) + [True] * len(answer))
    length, pad = max(map(len, rows)), processor.tokenizer.pad_token_id
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    scored = torch.tensor([row + [False] * (length - len(row)) for row in labels]).flatten().nonzero()[:, 0]

    def slots(token: int) -> Tensor:
        return (ids == token).flatten().nonzero()[:, 0]

    asked = [(i, q.boxes[0]) for i, (_, q) in enumerate(pairs) if q.boxes]
    shares = [_coverage(box, *grids[i]) for i, box in asked]
    shares = [F.pad(share, (0, longest - len(share))) for share in shares] or [torch.empty(longest)]
    return Samples(
        pixel_values=pixel_values,
        pixel_attention_mask=seen.long(),
        spatial_shapes=torch.tensor(grids),
        input_ids=ids,
        attention_mask=torch.tensor([[i < len(row) for i in range(length)] for row in rows]).long(),
        images=slots(processor.image_token_id),
        patches=seen.flatten().nonzero()[:, 0],
        layout=PackedLayout.from_grids(grids),
        prompts=slots(processor.region_token_id),
        prompt_samples=torch.tensor([i for i, _ in asked], dtype=torch.int64),
        geometry=torch.tensor([box for _, box in asked], dtype=torch.float32).reshape(-1, 4),
        coverage=torch.stack(shares)[: len(asked)].log().to(dtype),
        answers=scored - 1,
        targets=ids.flatten()[scored],
        crops=torch.stack([F.pad(one, (0, 0, 0, most - len(one))) for one in crops]) if crops else torch.empty(0),
        crop_grids=torch.tensor(crop_grids).reshape(-1, 2),
        crop_samples=crop_samples,
        boxes=RoIAlign(
            [boxes[i] for i in crop_samples.tolist()], [grids[i] for i in crop_samples.tolist()], distill.region_grid
        ),
        whole=RoIAlign([(0, 0, 1, 1)] * len(crops), crop_grids, distill.region_grid),
    )


def _coverage(box: Sequence[float], rows: int, columns: int) -> Tensor:
    """Share of each cell that the box covers, [rows * columns]."""
    x1, y1, x2, y2 = (torch.tensor(box, dtype=torch.float32) * torch.tensor([columns, rows] * 2)).tolist()
    x, y = torch.arange(columns), torch.arange(rows)
    across = (torch.clamp(x + 1.0, max=x2) - torch.clamp(x + 0.0, min=x1)).clamp(min=0)
    down = (torch.clamp(y + 1.0, max=y2) - torch.clamp(y + 0.0, min=y1)).clamp(min=0)
    return (down[:, None] * across).flatten()


class OneQuestion(nn.Module):
    """The same model, in transformers' parts: a copy of `model`'s weights."""

    def __init__(
        self,
        model: GranViT,
        stage: Stage,
        distill: Distill,
        crops_at_once: bool = False,
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__()
        self.model, self.stage, self.distill, self.crops_at_once = deepcopy(model), stage, distill, crops_at_once
        self.statistics = statistics
        if model.config.region_tokens != 1:
            raise ValueError("the peer is written for one region token")
        self.encoder = model.encoder.to_transformers().to(model.dtype)
        del self.model.encoder
        self.teacher = deepcopy(self.encoder).eval().requires_grad_(False) if stage.distill else None

    def groups(self) -> dict[str, list[nn.Parameter]]:
        ours = (self.model.projector, self.model.cell_positions, self.model.region_prompt, self.model.locations)
        return {
            "encoder": list(self.encoder.parameters()),
            "projector": [parameter for module in ours for parameter in module.parameters()],
            "llm": list(self.model.llm.parameters()),
        }

    def losses(self, batch: Samples) -> dict[str, Tensor]:
        """{"loss_caption", "loss_distill"}, without the second where there is no teacher."""
        with torch.set_grad_enabled("encoder" in self.stage.train):
            seen = batch.pixel_values, batch.pixel_attention_mask, batch.spatial_shapes
            features = self._features(self.encoder, *seen)
        model, packed = self.model, features.flatten(0, 1)[batch.patches]
        image = model.image_embeds(packed, batch.layout)
        given = torch.cat((image, self._prompts(features, batch)))
        embeds = model.embed_ids(batch.input_ids)
        embeds = embeds.flatten(0, 1).index_copy(0, torch.cat((batch.images, batch.prompts)), given.to(embeds.dtype))
        hidden = model.llm.get_decoder()(
            inputs_embeds=embeds.view(*batch.input_ids.shape, -1), attention_mask=batch.attention_mask, use_cache=False
        )[0]
        logits = model.logits(hidden.flatten(0, 1)[batch.answers])
        losses = {"loss_caption": F.cross_entropy(logits.float(), batch.targets)}
        if self.teacher is not None and len(batch.crop_samples):
            with torch.no_grad():
                target = self._teach(batch)
            regions = batch.boxes(features[batch.crop_samples])
            losses["loss_distill"] = distillation_loss(regions, target, self.distill.target, self.statistics).mean()
        return losses

    @staticmethod
    def _features(encoder: nn.Module, pixels: Tensor, mask: Tensor, shapes: Tensor) -> Tensor:
        return encoder(pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state

    def _teach(self, batch: Samples) -> Tensor:
        """[n * h * w, C]: each crop by itself, or all at once, padded."""
        shapes, most = batch.crop_grids, batch.crops.shape[1]
        lengths = shapes.prod(1)
        mask = (torch.arange(most, device=lengths.device) < lengths[:, None]).long()
        if self.crops_at_once:
            return batch.whole(self._features(self.teacher, batch.crops, mask, shapes))
        parts = []
        for i, length in enumerate(lengths.tolist()):
            own = slice(i, i + 1), slice(length)
            features = self._features(self.teacher, batch.crops[own], mask[own], shapes[i : i + 1])
            parts.append(F.pad(features, (0, 0, 0, most - length)))
        return batch.whole(torch.cat(parts))

    def _prompts(self, features: Tensor, batch: Samples) -> Tensor:
        """Region tokens [R, D]: the region prompt's queries attend to the whole image under a mask."""
        prompt = self.model.region_prompt
        if not len(batch.prompt_samples):
            return features.new_zeros(0, self.model.config.text_config.hidden_size)
        seen = features[batch.prompt_samples]
        heads, size = prompt.queries.shape[1:]
        key, value = (f(seen).unflatten(2, (heads, size)).transpose(1, 2) for f in (prompt.key, prompt.value))
        query = prompt.queries.transpose(0, 1).expand(len(seen), -1, -1, -1)
        pooled = F.scaled_dot_product_attention(query, key, value, batch.coverage[:, None, None, :])
        where = prompt.geometry(box_features(batch.geometry).to(features.dtype))
        return prompt.projector(pooled.transpose(1, 2).flatten(2)[:, 0] + where)


def trainer(
    groups: dict[str, list[nn.Parameter]],
    stage: Stage,
    losses: Callable[[], Iterator[Tensor]],
    student: nn.Module,
    teacher: nn.Module | None,
    alpha: float,
) -> Callable[[], float]:
    """A step of training, the same for both sides: backward through each loss that `losses` gives, clipping, AdamW, the
    teacher's moving average. It returns the sum of the losses."""
    for name, group in groups.items():
        for parameter in group:
            parameter.requires_grad_(name in stage.train)
    trained = [parameter for name in stage.train for parameter in groups[name]]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=stage.betas, weight_decay=stage.weight_decay, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=trained[0].device)
        for loss in losses():
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(trained, stage.clip)
        optimizer.step()
        if teacher is not None:
            with torch.no_grad():
                theirs = list(teacher.parameters())
                torch._foreach_mul_(theirs, alpha)
                torch._foreach_add_(theirs, list(student.parameters()), alpha=1 - alpha)
        return float(total)

    return step
