import math
from dataclasses import replace

import pytest
import torch

from granvit.data.batches import collate
from granvit.data.crops import Crops
from granvit.data.loader import GranDataset
from granvit.questions.packing import pack_questions
from granvit.questions.schema import Region, Sample
from granvit.toy.warmup import layout_embeds
from granvit.train.build import build
from granvit.train.distill import Teacher, distillation_loss
from granvit.train.optimizer import freeze
from granvit.train.presets import Distill
from granvit.train.stages import Stage
from granvit.train.step import Share, region_features, stage_loss, warmup_loss
from granvit_kernels import PackedLayout
from tests.conftest import TASKS


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
    return collate(samples, asked, processor, config.data.capacity, config.crops)


def test_caption_loss_is_the_model_s_own(parts):
    config, data, model, processor = parts
    batch = first_batch(config, data, processor, config.pretrain)
    losses = stage_loss(model, None, batch, config.pretrain, config.distill)
    torch.testing.assert_close(losses["loss_caption"], model(batch.packed).loss, rtol=1e-5, atol=1e-6)
    assert losses["loss"] is losses["loss_caption"] and "loss_distill" not in losses


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
def test_conversations_without_a_picture(tiny, samples, bos, monkeypatch):
    """Packed behind pictures or alone, they give the LLM's own loss, with bos before them and without."""
    model, processor = tiny(box_style="tokens")
    if not bos:
        monkeypatch.setattr(processor, "image_part", lambda count: [processor.image_token_id] * count)
    chats = ((("how many?", "3 of them"), ("sure?", "yes")), (("which one is red?", "the star"),))
    nothing = torch.zeros(0, 0, 3, dtype=torch.uint8)
    texts = [Sample(f"t{i}", nothing, None, (), "", "", chats[: i + 1]) for i in range(2)]
    pictured = [samples[1], samples[2]]
    ids = (TASKS[1], "chat")
    mixed = [texts[0], samples[1], texts[1], samples[2]]
    batch = collate(mixed, [processor.questions(sample, ids) for sample in mixed], processor, 400)
    assert [sample.id for sample in batch.samples[2:]] == ["t0", "t1"] and len(batch.packed.images) == 2
    asked = [processor.questions(sample, ids) for sample in mixed]
    assert pack_questions(mixed, asked, processor, 400).box_image_index.unique().tolist() == [0, 1]
    stage = Stage("sft", train=("projector", "llm"), tasks=("chat",))
    losses = stage_loss(model, None, batch, stage, Distill())
    without = collate(pictured, [processor.questions(sample, ids) for sample in pictured], processor, 400)
    expected = [stage_loss(model, None, without, stage, Distill())["answers"]]
    for sample in texts:
        for turns in processor.turn_ids(processor.questions(sample, ["chat"])):
            ids, scored = processor.image_part(0), [False] * len(processor.image_part(0))
            for prompt, answer in turns:
                ids, scored = ids + prompt + answer, scored + [False] * len(prompt) + [True] * len(answer)
            hidden = model.llm.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0]
            each = torch.nn.functional.cross_entropy(model.logits(hidden)[:-1], torch.tensor(ids[1:]), reduction="none")
            expected.append(each[torch.tensor(scored[1:])].detach())
    torch.testing.assert_close(losses["answers"], torch.cat(expected), rtol=1e-4, atol=1e-5)

    batch = collate(texts, [processor.questions(sample, ["chat"]) for sample in texts], processor, 400)
    losses = stage_loss(model, None, batch, stage, Distill())
    torch.testing.assert_close(losses["answers"], torch.cat(expected[1:]), rtol=1e-4, atol=1e-5)
    losses["loss"].backward()
    gradients = [parameter.grad for parameter in model.projector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_distillation_compares_crops_with_regions_of_the_whole_image(parts):
    """Against the plain way: the teacher sees each crop on its own, and RoIAlign is written out."""
    config, data, model, processor = parts
    batch = first_batch(config, data, processor, config.pretrain)
    teacher = Teacher(model.encoder, 0.9)
    distill = replace(config.distill, target="mse", region_grid=(3, 2))
    losses = stage_loss(model, teacher, batch, config.pretrain, distill)
    expected = []
    features, layout = model.encode(batch.packed.images)
    starts, grids = layout.cu_seqlens.tolist(), layout.grids.tolist()
    planes = [features[start : start + h * w].view(h, w, -1) for start, (h, w) in zip(starts, grids, strict=False)]
    boxes, images = batch.regions[batch.crop_regions].tolist(), batch.region_image[batch.crop_regions].tolist()
    assert 0 < len(boxes) < len(batch.regions) and len({*map(tuple, batch.crop_grids.tolist())}) > 1
    for box, image, grid in zip(boxes, images, batch.crop_grids.tolist(), strict=True):
        height, width = batch.packed.images[image].shape[:2]
        edges = [box[0] * width, box[1] * height, min(box[2] * width, width), min(box[3] * height, height)]
        crop = torch.tensor([[0, *edges]], dtype=torch.float64)
        target, _ = model.encode([batch.packed.images[image]], crops=crop, grids=[tuple(grid)])
        theirs = aligned(target.view(*grid, -1), (0, 0, 1, 1), distill.region_grid)
        expected.append(distillation_loss(aligned(planes[image], box, distill.region_grid), theirs, "mse").mean())
    torch.testing.assert_close(losses["loss_distill"], torch.stack(expected).mean(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(losses["loss"], losses["loss_caption"] + losses["loss_distill"])


@pytest.mark.parametrize("target", ["standardized", "layer_norm", "cosine", "mse"])
def test_a_step_s_loss_is_the_sum_of_its_parts(parts, target):
    """Of whichever parts, one of them without a region; and so are the gradients, and what statistics take in."""
    config, data, model, processor = parts
    samples = [data[i] for i in range(6)]
    samples[3] = without_regions(samples[3])
    asked = [processor.questions(sample, config.pretrain.tasks)[:5] for sample in samples]
    teacher, distill = Teacher(model.encoder, 0.9), replace(config.distill, target=target)

    def losses(batch, share=None):
        return stage_loss(model, teacher, batch, config.pretrain, distill, share)

    def cut(*parts):
        return [collate(samples[p], asked[p], processor, config.data.capacity, config.crops) for p in parts]

    (whole,) = cut(slice(6))
    teacher.statistics.update(losses(whole)["moments"])
    share = Share.whole(whole)
    expected = losses(whole)
    weight = model.encoder.post_layernorm.weight
    (gradient,) = torch.autograd.grad(expected["loss_distill"], weight)
    pieces = [losses(batch, share) for batch in cut(slice(2), slice(2, 3), slice(3, 4), slice(4, 6))]
    for name in ("loss", "loss_caption", "loss_distill", "moments"):
        total = sum(piece[name] for piece in pieces)
        tolerance = 1e-4 if name == "moments" else 1e-6
        torch.testing.assert_close(total, expected[name], rtol=tolerance, atol=tolerance)
    summed = sum(torch.autograd.grad(piece["loss_distill"], weight)[0] for piece in pieces)
    torch.testing.assert_close(summed, gradient, rtol=1e-4, atol=1e-6)


def aligned(plane: torch.Tensor, box: tuple[float, ...], bins: tuple[int, int]) -> torch.Tensor:
    """RoIAlign [h * w, C] of a relative box in a feature map [H, W, C], sample by sample."""
    (high, wide), (x1, y1, x2, y2) = plane.shape[:2], box
    x1, y1, x2, y2 = x1 * wide, y1 * high, x2 * wide, y2 * high
    counts = [max(1, math.ceil(side / number)) for side, number in zip((y2 - y1, x2 - x1), bins, strict=True)]
    cells = []
    for row in range(bins[0]):
        for column in range(bins[1]):
            samples = []
            for i in range(counts[0]):
                for j in range(counts[1]):
                    y = y1 + (y2 - y1) * (row + (i + 0.5) / counts[0]) / bins[0] - 0.5
                    x = x1 + (x2 - x1) * (column + (j + 0.5) / counts[1]) / bins[1] - 0.5
                    y, x = min(max(y, 0), high - 1), min(max(x, 0), wide - 1)
                    y0, x0 = int(y), int(x)
                    y_next, x_next = min(y0 + 1, high - 1), min(x0 + 1, wide - 1)
                    a, b = y - y0, x - x0
                    samples.append(
                        (1 - a) * ((1 - b) * plane[y0, x0] + b * plane[y0, x_next])
                        + a * ((1 - b) * plane[y_next, x0] + b * plane[y_next, x_next])
                    )
            cells.append(torch.stack(samples).mean(0))
    return torch.stack(cells)


def test_region_features_are_torchvision_s(parts):
    """Of boxes of all sizes, down to none, and of a long line's crop."""
    ops = pytest.importorskip("torchvision.ops")
    grids, bins = [(2, 128), (9, 7), (1, 1)], (4, 3)
    layout = PackedLayout.from_grids(grids)
    torch.manual_seed(0)
    features = torch.randn(layout.num_tokens, 8)
    boxes = torch.tensor([[0, 0, 1, 1], [0.1, 0.2, 0.7, 0.9], [0.3, 0.3, 0.301, 0.9]] * 3)
    image = torch.arange(3).repeat_interleave(3)
    ours = region_features(features, layout, boxes, image, bins).view(9, *bins, 8)
    for number, (part, (h, w)) in enumerate(zip(features.split([256, 63, 1]), grids, strict=True)):
        rois = [layout.to_grid(boxes, image)[image == number]]
        plane = part.view(1, h, w, 8).permute(0, 3, 1, 2)
        theirs = ops.roi_align(plane, rois, bins, 1.0, 0, aligned=True).permute(0, 2, 3, 1)
        torch.testing.assert_close(ours[image == number], theirs, rtol=1e-4, atol=1e-4)


def test_boxes_without_a_pixel_are_distilled_too(parts):
    """One too thin for a width in float32, one of a pixel at the corner, one of 400 x 4 pixels, and the whole image."""
    config, data, model, processor = parts
    boxes = [(0, 0.2, 1e-9, 0.9), (1 - 1e-7, 1 - 1e-7, 1, 1), (0.1, 0.5, 0.9, 0.508), (0, 0, 1, 1)]
    regions = tuple(Region(box, "a thing", "natural") for box in boxes)
    image = torch.randint(0, 256, (500, 500, 3), dtype=torch.uint8)
    sample = Sample("thin", image, None, regions, "", "")
    asked = processor.questions(sample, ["bbox2caption"])
    batch = collate([sample], [asked], processor, 512, Crops(tokens=64))
    assert len(batch.crops) == 4 and [1, 64] in batch.crop_grids.tolist()
    distill = replace(config.distill, target="mse")
    losses = stage_loss(model, Teacher(model.encoder, 0.9), batch, config.pretrain, distill)
    losses["loss"].backward()
    assert losses["loss_distill"] > 0 and all(p.grad.isfinite().all() for p in model.encoder.parameters())
    layout = PackedLayout.from_grids([model.config.grid(500, 500)])
    features = torch.randn(layout.num_tokens, 4)
    seen = region_features(features, layout, torch.tensor(boxes), torch.zeros(4, dtype=torch.int64), (2, 2))
    assert (seen.abs().sum(1) > 0).all()


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
