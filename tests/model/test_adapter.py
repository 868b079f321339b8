"""Vision models of transformers as encoders: what they compute by themselves, for images of any grids."""

import json
import warnings

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, LlamaConfig

from granvit.model import GranViT, adapter
from granvit.model.adapter import FAMILIES, AdaptedEncoder, adapted, unfold
from granvit.model.encoders import checkpoint_config, load_encoder, random_encoder
from granvit.model.preprocessor import read_pixels
from granvit.toy.tiny import TinyLLM, tiny_llm
from granvit_kernels import PackedLayout, pack_patches

GRIDS = [(6, 6), (3, 5), (6, 6), (1, 1), (2, 9), (3, 5), (9, 4)]
CASES = {
    "clip": ("clip_vision_model", {"attention_dropout": 0.2}),
    "dinov2": ("dinov2", {"mlp_ratio": 2, "drop_path_rate": 0.5, "hidden_dropout_prob": 0.2}),
    "dinov2 registers": ("dinov2_with_registers", {"mlp_ratio": 2, "num_register_tokens": 3}),
    "dinov3": ("dinov3_vit", {"num_register_tokens": 2, "pos_embed_jitter": 2.0}),
    "aimv2": ("aimv2_vision_model", {}),
    "aimv2 native": ("aimv2_vision_model", {"is_native": True}),
    "internvit": ("internvl_vision", {"use_qk_norm": True, "norm_type": "rms_norm", "projection_dropout": 0.2}),
    "internvit pooled by class": ("internvl_vision", {"use_mean_pooling": False}),
    "vit": ("vit", {"hidden_dropout_prob": 0.2}),
}


def configuration(case: str):
    kind, options = CASES[case]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24, "patch_size": 4}
    if "mlp_ratio" not in options:
        sizes["intermediate_size"] = 48
    return AutoConfig.for_model(kind, **sizes, **options)


def encoder_of(case: str) -> AdaptedEncoder:
    torch.manual_seed(0)
    encoder = random_encoder(configuration(case)).train()
    with torch.no_grad():  # transformers draws some as zeros: let every parameter count
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder


def by_itself(encoder: AdaptedEncoder, model, pixels, grid):
    """Patch features of one image [1, 3, H, W], by transformers alone."""
    options = {"interpolate_pos_encoding": True} if encoder.family.arguments else {}
    hidden = model(pixels, **options).last_hidden_state[0]
    leading = {"dinov2_with_registers": 4, "dinov3_vit": 3, "aimv2_vision_model": 0}
    return hidden[leading.get(encoder.config.model_type, 1) :]


@pytest.mark.parametrize("case", CASES)
def test_features_and_gradients_are_the_model_s_own(case):
    """Each image by itself through the plain model in eval mode, which draws nothing at random."""
    encoder = encoder_of(case)
    model = encoder.to_transformers().eval()
    assert type(model) is getattr(transformers, encoder.family.model)
    # AIMv2 of one resolution takes no other by itself
    grids = [(6, 6)] * 3 if case == "aimv2" else GRIDS
    layout = PackedLayout.from_grids(grids)
    images = [torch.randint(0, 256, (4 * h, 4 * w, 3), dtype=torch.uint8) for h, w in grids]
    patches, _ = pack_patches(images, 4, (0.5,) * 3, (0.5,) * 3, dtype=torch.float32)
    ours = encoder(patches, layout)
    pixels = [(image / 127.5 - 1).permute(2, 0, 1)[None] for image in images]
    expected = torch.cat([by_itself(encoder, model, *pair) for pair in zip(pixels, grids, strict=True)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    direction = torch.randn_like(ours)
    (ours * direction).sum().backward()
    (expected * direction).sum().backward()
    got = {name: parameter.grad for name, parameter in encoder.model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (got[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            largest = parameter.grad.abs().max().item()
            torch.testing.assert_close(got[name], parameter.grad, rtol=0, atol=1e-4 * largest + 1e-6, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_granvit_of_it_is_saved_loaded_and_exported(case, tmp_path):
    """As a folder of a checkpoint with its processor; as a GranViT; and its encoder, for plain transformers."""
    encoder_of(case).to_transformers().save_pretrained(tmp_path / "start")
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 3, "do_normalize": True}
    (tmp_path / "start" / "preprocessor_config.json").write_text(json.dumps(settings))
    llm = tiny_llm(["a red ball"], TinyLLM(width=32, layers=1, heads=2, mlp=32, vocab=300))
    model, _ = GranViT.from_parts(tmp_path / "start", llm, max_image_tokens=36)
    assert isinstance(model.encoder, AdaptedEncoder) and model.config.patch_size == 4
    assert (model.config.image_mean, model.config.image_round) == ([0.4, 0.5, 0.6], "pil")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    features, layout = model.encode([image, image.crop((0, 0, 60, 30))])
    assert layout.host_grids == ((6, 6), (4, 8)) and features.std() > 0.1

    model.save_pretrained(tmp_path / "whole")
    again = GranViT.from_pretrained(tmp_path / "whole")
    assert again.config.to_dict()["vision_config"] == model.config.to_dict()["vision_config"]
    assert torch.equal(again.encode([image, image.crop((0, 0, 60, 30))])[0], features)

    model.save_encoder(tmp_path / "encoder")
    plain = AutoModel.from_pretrained(tmp_path / "encoder")
    assert type(plain) is type(model.encoder.to_transformers())
    inputs = AutoImageProcessor.from_pretrained(tmp_path / "encoder")(image, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 24, 24)
    last = plain(**inputs).last_hidden_state[0, -36:]
    # its processor resizes with torchvision where that is installed, which is a step of 255 off here and there
    assert (last - features[:36]).abs().max() < 0.1 * features.std()
    assert read_pixels(tmp_path / "encoder") == read_pixels(tmp_path / "start")
    assert torch.equal(load_encoder(tmp_path / "encoder").model.state_dict()[(key := next(iter(plain.state_dict())))],
                       plain.state_dict()[key])  # fmt: skip


def test_aimv2_s_positions_at_other_grids():
    """Its own at its own grid, else bicubic; a constant table stays constant."""
    encoder = encoder_of("aimv2")
    [table] = encoder.tables
    table.grid = (6, 6)
    assert torch.equal(table(torch.arange(36)[None]), table.weight[None])
    table.grid = (3, 8)
    expected = torch.nn.functional.interpolate(
        table.weight.T.view(1, 32, 6, 6), (3, 8), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(table(torch.arange(36)[None])[0], expected[0].flatten(1).T)
    layout = PackedLayout.from_grids([(3, 8), (2, 2)])
    encoder(torch.randn(28, 48), layout).sum().backward()
    assert table.weight.grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "aimv2", "internvl"])
def test_whole_models_checkpoints(kind, tmp_path):
    texts = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    case = {"clip": "clip", "aimv2": "aimv2 native", "internvl": "internvit"}[kind]
    vision = adapted(configuration(case)).to_dict()
    if kind == "internvl":
        text = {"model_type": "llama", **texts, "vocab_size": 9}
        config = AutoConfig.for_model(kind, vision_config=vision, text_config=text)
        whole = transformers.InternVLForConditionalGeneration(config)
        part = whole.model.vision_tower
    else:
        config = AutoConfig.for_model(kind, vision_config=vision, text_config=texts | {"vocab_size": 9})
        whole = AutoModel.from_config(config)
        part = whole.vision_model
    whole.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert checkpoint_config(tmp_path).to_dict() == encoder.config.to_dict()
    for name, value in encoder.to_transformers().state_dict().items():  # transformers 5.0 has CLIP's a module deeper
        assert torch.equal(value, part.state_dict()[name.removeprefix("vision_model.")]), name


def test_unfold_is_the_inverse_of_packing():
    images = [torch.randint(0, 256, (12, 20, 3), dtype=torch.uint8) for _ in range(2)]
    patches, layout = pack_patches(images, 4, (0,) * 3, (1 / 255,) * 3, dtype=torch.float32)
    pixels = unfold(patches.view(2, 15, 48), (3, 5), 4)
    assert torch.equal(pixels.round().to(torch.uint8), torch.stack(images).permute(0, 3, 1, 2))


def test_no_images_have_gradients():
    encoder = encoder_of("dinov2")
    encoder(torch.zeros(0, 48), PackedLayout.from_grids([])).sum().backward()
    grads = [parameter.grad for name, parameter in encoder.named_parameters() if "mask_token" not in name]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_it_says_once_that_it_is_slower():
    adapter._say_slower.cache_clear()
    with pytest.warns(UserWarning, match="CLIP runs through an adapter.*slower"):
        encoder_of("clip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder_of("clip")


def test_what_is_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    accepted = "'llama', accepted are siglip2.*clip_vision_model.*dinov3_vit"
    for refuse in (load_encoder, checkpoint_config):
        with pytest.raises(ValueError, match=accepted):
            refuse(tmp_path)
    with pytest.raises(ValueError, match=r"patch_size: got \[4, 8\]"):
        adapted(AutoConfig.for_model("internvl_vision", patch_size=[4, 8]))
    with pytest.raises(ValueError, match="num_channels: got 1"):
        adapted(AutoConfig.for_model("dinov2", num_channels=1))
    model = encoder_of("dinov2").to_transformers()
    state = {key: value for key, value in model.state_dict().items() if "layer.1.mlp" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="lacks weights"):
        load_encoder(tmp_path)
    for damaged in ("[]", '{"model_type": ["dinov2"]}', '{"model_type": "dinov2", "patch_size": 0}'):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match="can't be loaded"):
            load_encoder(tmp_path)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"resample": 2}, {"image_mean": [0.5] * 3, "image_resample": "bilinear", "image_round": "pil"}),
        ({"do_normalize": False}, {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "image_resample": "bicubic"}),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3}, {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}),
        ({"image_round": None}, {"image_round": None}),
        (None, {}),
    ],
)
def test_pixels_of_a_preprocessor(settings, expected, tmp_path):
    if settings is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    pixels = read_pixels(tmp_path)
    assert expected.items() <= pixels.items() and (settings is None) == (pixels == {})


@pytest.mark.parametrize(
    "text, fault",
    [
        ('{"resample": 1}', "resample is 1, accepted"),
        ('{"resample": [3]}', "can't be made"),
        ('{"rescale_factor": 0}', "can't be made"),
        ('{"image_mean": 0.5}', "can't be made"),
        (f'{{"image_std": [1{"0" * 400}, 1, 1]}}', "can't be made"),
        ("[]", "can't be made"),
        ('{"image_mean"', "can't be read"),
    ],
)
def test_pixels_that_cannot_be_made(text, fault, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"preprocessor_config.json .*{fault}"):
        read_pixels(tmp_path)


def test_families_have_settings_of_their_own():
    assert {CASES[case][0] for case in CASES} == set(FAMILIES)
