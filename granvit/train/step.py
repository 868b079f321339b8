"""The loss of one training step of the two stages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from granvit.data.batches import Batch
from granvit.model import GranViT
from granvit.train.distill import Teacher, distillation_loss
from granvit.train.presets import Distill
from granvit.train.stages import Stage
from granvit_kernels import PackedLayout, pack_patches, roi_gather


def stage_loss(
    model: GranViT, teacher: Teacher | None, batch: Batch, stage: Stage, distill: Distill
) -> dict[str, Tensor]:
    """{"loss", "loss_caption", "loss_distill"} of a batch, and "features" [T, C], the student's, without gradient.
    Without a teacher or a region there is no "loss_distill".

    L = L_caption + stage.distill * L_distill. L_caption is the mean cross entropy over the answers' tokens. Images and
    the teacher's crops are cut out, resized and packed in one launch of pack_patches; a frozen encoder keeps no
    activations.
    """
    images, config = batch.packed.images, model.config
    grids = [config.grid(*image.shape[:2]) for image in images]
    crops = [(i, 0.0, 0.0, float(image.shape[1]), float(image.shape[0])) for i, image in enumerate(images)]
    if teacher is not None:
        crops += _region_crops(batch, images)
    all_grids = grids + [distill.crop_grid] * (len(crops) - len(images))
    patches, _ = pack_patches(
        images,
        config.vision_config.patch_size,
        config.image_mean,
        config.image_std,
        crops=torch.tensor(crops, dtype=torch.float64),
        grids=torch.tensor(all_grids, dtype=torch.int32),
        dtype=next(model.encoder.parameters()).dtype,
    )
    layout = PackedLayout.from_grids(grids, device=patches.device)
    with torch.set_grad_enabled("encoder" in stage.train):
        features = model.encoder(patches[: layout.num_tokens], layout)
    image_embeds = model.image_embeds(features, layout)
    region_embeds = model.region_embeds(features, layout, batch.packed.boxes, batch.packed.box_image_index)
    logits, targets = model.answer_logits(batch.packed, image_embeds, region_embeds)
    losses = {"loss_caption": F.cross_entropy(logits.float(), targets), "features": features.detach()}
    losses["loss"] = losses["loss_caption"]
    if teacher is not None and len(batch.regions):
        crop_layout = PackedLayout.from_grids(all_grids[len(images) :], device=patches.device)
        with torch.no_grad():
            target = teacher.encoder(patches[layout.num_tokens :], crop_layout)
        boxes = layout.to_grid(batch.regions, batch.region_image)
        regions = roi_gather(features, layout, boxes, batch.region_image, output_size=distill.crop_grid)
        losses["loss_distill"] = distillation_loss(regions.reshape(target.shape), target, distill.target)
        losses["loss"] = losses["loss_caption"] + stage.distill * losses["loss_distill"]
    return losses


def _region_crops(batch: Batch, images: list[Tensor]) -> list[tuple[int, float, float, float, float]]:
    crops = []
    for sample, (i, image) in zip(batch.samples, enumerate(images), strict=True):
        height, width = image.shape[:2]
        for region in sample.regions:
            x1, y1, x2, y2 = region.box
            crops.append((i, x1 * width, y1 * height, min(x2 * width, width), min(y2 * height, height)))
    return crops
