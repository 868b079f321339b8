"""The loss of one training step: of the stages, and of the warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.profiler import record_function

from granvit.data.collate import Batch
from granvit.model import GranViT
from granvit.toy.warmup import layout_embeds
from granvit.train.distill import Teacher, distillation_loss
from granvit.train.presets import Distill
from granvit.train.stages import Stage
from granvit_kernels import PackedLayout, pack_patches, roi_gather

LEAST = 1e-3  # of a patch


@dataclass(frozen=True)
class Share:
    """What a batch is a part of: all batches of a step, on all ranks.

    answers, regions: the step's tokens of answers and its distilled regions. weight: 0 for a batch that is gone through
    only because other ranks wait for this one.
    """

    answers: float
    regions: float
    weight: float = 1.0

    @classmethod
    def whole(cls, batch: Batch) -> Share:
        """Of a batch that is a whole step."""
        return cls(len(batch.packed.targets), len(batch.crops))


def stage_loss(
    model: GranViT, teacher: Teacher | None, batch: Batch, stage: Stage, distill: Distill, share: Share | None = None
) -> dict[str, Tensor]:
    """{"loss", "loss_caption", "loss_distill"} of a batch, and without gradient "features" [T, C], the student's,
    "answers" [A], the cross entropy of each answer token, and "moments", what the teacher's statistics take in of the
    batch. Without a teacher, or a crop in the step, there is neither "loss_distill" nor "moments".

    L = L_caption + stage.distill * L_distill. L_caption is the mean cross entropy over the answers' tokens. With a
    `share` the losses are this batch's part of the step's: the parts' sum is the loss of the whole. Images and
    the teacher's crops are cut out, resized and packed in one launch of pack_patches; a frozen encoder keeps no
    activations.
    """
    share = share or Share.whole(batch)
    images, config = batch.packed.images, model.config
    grids = [config.grid(*image.shape[:2]) for image in images]
    frames = [(i, 0, 0, image.shape[1], image.shape[0]) for i, image in enumerate(images)]
    crops = torch.tensor(frames, dtype=torch.float64).reshape(-1, 5)
    all_grids = torch.tensor(grids, dtype=torch.int32).reshape(-1, 2)
    if teacher is not None:
        crops, all_grids = torch.cat([crops, batch.crops]), torch.cat([all_grids, batch.crop_grids])
    with record_function("granvit.pack_patches"):
        patches, _ = pack_patches(
            images,
            config.patch_size,
            config.image_mean,
            config.image_std,
            crops=crops,
            grids=all_grids,
            dtype=next(model.encoder.parameters()).dtype,
            resample=config.image_resample,
            round=config.image_round,
        )
    layout = PackedLayout.from_grids(grids, device=patches.device)
    learns = torch.is_grad_enabled() and "encoder" in stage.train
    with record_function("granvit.encoder"), torch.set_grad_enabled(learns):
        features = model.encoder(patches[: layout.num_tokens], layout)
    image_embeds = model.image_embeds(features, layout)
    region_embeds = model.region_embeds(features, layout, batch.packed.boxes, batch.packed.box_image_index)
    losses = answer_losses(model, batch, image_embeds, region_embeds, share)
    losses["features"] = features.detach()
    if teacher is not None and share.regions:
        crop_layout = PackedLayout.from_grids(batch.crop_grids, device=patches.device)
        with record_function("granvit.teacher"), torch.no_grad():
            target = teacher.encoder(patches[layout.num_tokens :], crop_layout)
        with record_function("granvit.distillation"):
            image, boxes = batch.region_image[batch.crop_regions], batch.regions[batch.crop_regions]
            regions = region_features(features, layout, boxes, image, distill.region_grid)
            crop, corner = torch.arange(len(boxes), device=boxes.device), torch.zeros_like(boxes[:, :2])
            whole = torch.cat([corner, corner + 1], dim=1)
            target = region_features(target, crop_layout, whole, crop, distill.region_grid)
            distance = distillation_loss(regions, target, distill.target, teacher.statistics)
            losses["moments"] = share.weight * teacher.statistics.moments(regions, target)
        losses["loss_distill"] = distance.sum() * (share.weight / (share.regions * prod(distill.region_grid)))
        losses["loss"] = losses["loss_caption"] + stage.distill * losses["loss_distill"]
    return losses


def region_features(
    features: Tensor, layout: PackedLayout, boxes: Tensor, image: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Features [R * h * w, C] of relative boxes [R, 4] of images [R], each brought to `grid` (h, w) by RoIAlign. It
    takes as many samples as there are cells, so that all of a long line's patches count."""
    boxes = layout.to_grid(boxes, image)
    # So many samples are none in a box that is too thin to have a width in float32.
    boxes = torch.cat([boxes[:, :2], torch.maximum(boxes[:, 2:], boxes[:, :2] + LEAST)], dim=1)
    return roi_gather(features, layout, boxes, image, output_size=grid, sampling_ratio=0).flatten(0, 2)


def warmup_loss(model: GranViT, processor, batch: Batch, seed: str, share: Share | None = None) -> dict[str, Tensor]:
    """{"loss", "loss_caption", "answers"} of a batch for whose images the warm-up's layout stands: see `stage_loss`."""
    image, region = layout_embeds(model, processor, batch, seed)
    return answer_losses(model, batch, image, region, share or Share.whole(batch))


def answer_losses(
    model: GranViT, batch: Batch, image_embeds: Tensor, region_embeds: Tensor, share: Share
) -> dict[str, Tensor]:
    """{"loss", "loss_caption", "answers"}: this batch's part of the step's mean cross entropy over answers' tokens."""
    each = model.answer_losses(batch.packed, image_embeds, region_embeds)
    loss = each.sum() * (share.weight / max(1, share.answers))
    return {"loss": loss, "loss_caption": loss, "answers": each.detach()}

