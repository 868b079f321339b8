import re

import pytest
from transformers import AutoConfig, LlamaConfig, Siglip2VisionConfig

from granvit.model import GranViTConfig
from granvit_kernels import fit_grid


def test_it_survives_saving(tmp_path):
    config = GranViTConfig(
        vision_config=Siglip2VisionConfig(hidden_size=64, num_attention_heads=2),
        text_config=LlamaConfig(hidden_size=96, vocab_size=500),
        text_vocab=321,
        box_format="bins",
        bins=20,
        box_style="both",
        region_tokens=2,
        pixel_shuffle=2,
        cell_positions=False,
        eos_token_id=5,
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, GranViTConfig) and isinstance(again.vision_config, Siglip2VisionConfig)
    for name in (
        "text_vocab",
        "bins",
        "box_format",
        "box_style",
        "region_tokens",
        "pixel_shuffle",
        "cell_positions",
        "eos_token_id",
    ):
        assert getattr(again, name) == getattr(config, name), name
    assert (again.text_config.hidden_size, again.vision_config.hidden_size) == (96, 64)
    assert again.region_heads == 2


def test_ids_follow_the_llms_own():
    config = GranViTConfig(text_vocab=100, box_format="bins", bins=20)
    assert (config.location_tokens, config.image_token_id, config.region_token_id) == (20, 120, 121)
    config = GranViTConfig(text_vocab=100, box_format="text", bins=20)
    assert (config.location_tokens, config.image_token_id, config.region_token_id) == (0, 100, 101)
    assert GranViTConfig(text_config=LlamaConfig(vocab_size=77)).text_vocab == 77


@pytest.mark.parametrize("height, width", [(480, 640), (33, 900), (16, 16)])
def test_grids_are_naflex(height, width):
    config = GranViTConfig(max_image_tokens=144)
    h, w = config.grid(height, width)
    assert (h, w) == fit_grid(height, width, 16, 144) and h * w <= 144
    assert config.image_tokens(height, width) == h * w
    shuffled = GranViTConfig(max_image_tokens=144, pixel_shuffle=2)
    assert shuffled.token_grid(height, width) == ((h + 1) // 2, (w + 1) // 2)
    assert shuffled.image_tokens(height, width) == ((h + 1) // 2) * ((w + 1) // 2)


@pytest.mark.parametrize(
    "field, value",
    [
        ("pixel_shuffle", 3),
        ("box_style", "arrow"),
        ("cell_positions", 1),
        ("box_format", "polar"),
        ("bins", 0),
        ("region_tokens", 1.5),
        ("max_image_tokens", -1),
        ("region_heads", 7),
        ("region_heads", 0),
        ("region_heads", "2"),
        ("pixel_shuffle", 1.0),
        ("bins", True),
        ("text_vocab", 0),
        ("text_vocab", "many"),
        ("text_config", 5),
        ("vision_config", "siglip2"),
        ("eos_token_id", "<eos>"),
        ("pad_token_id", -1),
        ("image_mean", 0.5),
        ("image_resample", "lanczos"),
        ("image_round", True),
        ("image_mean", [0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0.0]),
    ],
)
def test_faults_are_named(field, value):
    got = type(value).__name__ if field.endswith("_config") else repr(value)
    with pytest.raises(ValueError, match=re.escape(f"{field}: got {got}, accepted")):
        GranViTConfig(**{field: value})


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("text_config", {}, "text_config: no P.*Config can be made of its dict: "),
        ("text_config", {"model_type": "none such"}, "text_config: no P.*Config can be made"),
        ("vision_config", LlamaConfig(), "vision_config: got LlamaConfig, accepted is a Siglip2VisionConfig"),
        ("vision_config", {"hidden_size": 0}, "vision_config"),
        ("vision_config", {"num_attention_heads": 0}, "vision_config"),
        ("vision_config", {"patch_size": "16"}, "vision_config"),
    ],
)
def test_faults_of_its_parts_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        GranViTConfig(**{field: value})
