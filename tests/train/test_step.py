from dataclasses import replace

import pytest
import torch

from granvit.data.batches import collate
from granvit.data.loader import GranDataset
from granvit.toy.warmup import layout_embeds
from granvit.train.build import build
from granvit.train.distill import Teacher, distillation_loss
from granvit.train.optimizer import freeze
from granvit.train.step import stage_loss, warmup_loss
from granvit_kernels import PackedLayout


@pytest.fixture()
def parts(small_config, sample_set):
    torch.manual_seed(0)
    data = GranDataset(sample_set, "train")
    model, processor = build(small_config.model, data)
    return small_config, data, model, processor


def first_batch(config, data, processor, stage, read=None):
    """Six images with up to five of their questions each."""
    samples = [(read or data.__getitem__)(i) for i in range(6)]
    asked = [processor.questions(sample, stage.tasks)[:5] for sample in samples]
    return collate(samples, asked, processor, config.data.capacity)


def test_caption_loss_is_the_model_s_own(parts):
    config, data, model, processor = parts
    batch = first_batch(config, data, processor, config.pretrain)
    losses = stage_loss(model, None, batch, config.pretrain, config.distill)
    torch.testing.assert_close(losses["loss_caption"], model(batch.packed).loss, rtol=1e-5, atol=1e-6)
    assert losses["loss"] is losses["loss_caption"] and "loss_distill" not in losses


def test_distillation_compares_crops_with_regions_of_the_whole_image(parts):
    """Against the plain way: the teacher sees each crop on its own, torch resizes and gathers."""
    config, data, model, processor = parts
    batch = first_batch(config, data, processor, config.pretrain)
    teacher = Teacher(model.encoder, 0.9)
    distill = replace(config.distill, target="mse", crop_grid=(2, 2))
    losses = stage_loss(model, teacher, batch, config.pretrain, distill)
    expected = []
    features, layout = model.encode(batch.packed.images)
    starts = layout.cu_seqlens.tolist()
    boxes, images = batch.regions[batch.crop_regions].tolist(), batch.region_image[batch.crop_regions].tolist()
    assert 0 < len(boxes) < len(batch.regions)
    for box, image in zip(boxes, images, strict=True):
        height, width = batch.packed.images[image].shape[:2]
        edges = [box[0] * width, box[1] * height, min(box[2] * width, width), min(box[3] * height, height)]
        crop = torch.tensor([[0, *edges]], dtype=torch.float64)
        target, _ = model.encode([batch.packed.images[image]], crops=crop, grids=[(2, 2)])
        h, w = layout.grids[image].tolist()
        plane = features[starts[image] : starts[image + 1]].view(h, w, -1)
        x1, y1, x2, y2 = box[0] * w, box[1] * h, box[2] * w, box[3] * h
        cells = []
        for row in range(2):
            for column in range(2):
                samples = []
                for i in range(2):
                    for j in range(2):
                        y = y1 + (y2 - y1) * (row + (i + 0.5) / 2) / 2 - 0.5
                        x = x1 + (x2 - x1) * (column + (j + 0.5) / 2) / 2 - 0.5
                        y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
                        y0, x0 = int(y), int(x)
                        y_next, x_next = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
                        a, b = y - y0, x - x0
                        samples.append(
                            (1 - a) * ((1 - b) * plane[y0, x0] + b * plane[y0, x_next])
                            + a * ((1 - b) * plane[y_next, x0] + b * plane[y_next, x_next])
                        )
                cells.append(torch.stack(samples).mean(0))
        expected.append(distillation_loss(torch.stack(cells), target, "mse"))
    torch.testing.assert_close(losses["loss_distill"], torch.stack(expected).mean(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(losses["loss"], losses["loss_caption"] + losses["loss_distill"])


def test_a_frozen_encoder_keeps_no_activations_and_gets_no_gradient(parts):
    config, data, model, processor = parts
    freeze(model.groups(), config.adapt.train)
    batch = first_batch(config, data, processor, config.adapt)
    losses = stage_loss(model, None, batch, config.adapt, config.distill)
    losses["loss"].backward()
    assert all(p.grad is None for p in model.groups()["encoder"])
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.groups()["llm"])


def test_pretraining_reaches_the_encoder_through_a_frozen_llm_and_leaves_the_teacher_alone(parts):
    config, data, model, processor = parts
    freeze(model.groups(), config.pretrain.train)
    teacher = Teacher(model.encoder, 0.9)
    batch = first_batch(config, data, processor, config.pretrain)
    stage_loss(model, teacher, batch, config.pretrain, config.distill)["loss"].backward()
    assert all(p.grad is None for p in model.groups()["llm"])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.groups()["encoder"])
    assert all(p.grad is None for p in teacher.encoder.parameters())


def test_the_warm_up_sees_no_pixel(parts):
    config, data, model, processor = parts
    batch = first_batch(config, data, processor, config.warmup, data.annotations)
    other = replace(batch, packed=replace(batch.packed, images=[255 - image for image in batch.packed.images]))
    losses = [warmup_loss(model, processor, b, "1")["loss"] for b in (batch, other)]
    assert torch.equal(*losses)


def test_the_warm_up_s_layout_puts_captions_where_their_boxes_are(parts):
    """Without noise, cells that no box covers are empty, those of one box alone hold its caption, and so does the
    token of an asked region."""
    config, data, model, processor = parts
    batch = first_batch(config, data, processor, config.warmup, data.annotations)
    noiseless = [layout_embeds(model, processor, batch, str(seed)) for seed in range(200)]
    grids = [model.config.grid(*sample.image.shape[:2]) for sample in batch.samples]
    image, region = (torch.stack(drawn).mean(0) for drawn in zip(*noiseless, strict=True))
    image = image - model.cell_positions(PackedLayout.from_grids(grids))
    table = model.llm.get_input_embeddings().weight
    scale = table.square().mean().sqrt()

    def bag(caption: str) -> torch.Tensor:
        ids = processor.tokenizer([caption], add_special_tokens=False)["input_ids"][0]
        return torch.nn.functional.normalize(table[ids].sum(0), dim=0)

    start, full = 0, 0
    for sample, (rows, columns) in zip(batch.samples, grids, strict=True):
        cells = image[start : start + rows * columns].view(rows, columns, -1)
        start += rows * columns
        shares = []
        for x1, y1, x2, y2 in (region.box for region in sample.regions):
            y, x = torch.arange(rows), torch.arange(columns)
            high = (torch.clamp(y + 1, max=y2 * rows) - torch.clamp(y, min=y1 * rows)).clamp(min=0)
            wide = (torch.clamp(x + 1, max=x2 * columns) - torch.clamp(x, min=x1 * columns)).clamp(min=0)
            shares.append(high[:, None] * wide)
        shares = torch.stack(shares)
        assert (cells[shares.sum(0) == 0].square().mean(-1).sqrt() < 0.1 * scale).all()
        for index, one in enumerate(sample.regions):
            alone = (shares[index] > 0.3) & (shares.sum(0) == shares[index])
            full += int(alone.sum())
            assert (torch.nn.functional.cosine_similarity(cells[alone], bag(one.caption), dim=-1) > 0.9).all()
    assert start == len(image) and full > 0
    for box, owner, tokens in zip(batch.packed.boxes.tolist(), batch.packed.box_image_index.tolist(), region,
                                  strict=True):  # fmt: skip
        (caption,) = {one.caption for one in batch.samples[owner].regions if list(one.box) == pytest.approx(box)}
        assert (torch.nn.functional.cosine_similarity(tokens, bag(caption), dim=-1) > 0.98).all()


def without_regions(sample):
    return replace(sample, regions=(), caption="a picture")


def test_images_without_regions_are_trained_on(parts):
    config, data, model, processor = parts
    for stage, read in ((config.warmup, data.annotations), (config.pretrain, data.__getitem__)):
        batch = first_batch(config, data, processor, stage, lambda i, read=read: without_regions(read(i)))
        if stage is not config.warmup and stage.distill:
            losses = stage_loss(model, Teacher(model.encoder, 0.9), batch, stage, config.distill)
            assert losses["loss"] is losses["loss_caption"] and "loss_distill" not in losses
        else:
            losses = warmup_loss(model, processor, batch, "0")
        assert losses["loss"].isfinite()
