import pytest
import torch
from transformers import (
    LlamaConfig,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from granvit.model import VisionEncoder
from granvit.model.encoders import checkpoint_config
from granvit.model.packed_attention import packed_attention
from granvit_kernels import PackedLayout, pack_patches

GRIDS = [(16, 16), (16, 16), (5, 9), (1, 1), (23, 4), (5, 9)]


def config(**options) -> Siglip2VisionConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    return Siglip2VisionConfig(**sizes, patch_size=4, num_patches=64, **options)


def random_model(**options) -> Siglip2VisionModel:
    torch.manual_seed(0)
    model = Siglip2VisionModel(config(**options)).eval()
    with torch.no_grad():  # transformers draws biases as zeros: let every parameter count
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def parameters(model: Siglip2VisionModel) -> dict[str, torch.Tensor]:
    """By the names that do without the module that transformers 5.0 puts around the transformer."""
    return {key.removeprefix("vision_model."): value for key, value in model.state_dict().items()}


def theirs(model: Siglip2VisionModel, patches: torch.Tensor, grids) -> torch.Tensor:
    """transformers' features of packed patches: padded, masked, and packed again."""
    lengths = [h * w for h, w in grids]
    pixels = torch.zeros(len(grids), max(lengths), patches.shape[1])
    mask = torch.zeros(pixels.shape[:2], dtype=torch.int64)
    for i, part in enumerate(patches.split(lengths)):
        pixels[i, : len(part)], mask[i, : len(part)] = part, 1
    hidden = model(pixels, mask, torch.tensor(grids)).last_hidden_state
    return torch.cat([row[:length] for row, length in zip(hidden, lengths, strict=True)])


@torch.no_grad()
@pytest.mark.parametrize("grids", [GRIDS, [(8, 8)], [(7, 3)] * 5], ids=["mixed", "table's own", "equal"])
def test_features_equal_transformers(grids):
    model = random_model()
    encoder = VisionEncoder.from_transformers(model)
    layout = PackedLayout.from_grids(grids)
    patches = torch.randn(layout.num_tokens, 4 * 4 * 3)
    torch.testing.assert_close(encoder(patches, layout), theirs(model, patches, grids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", [True, False])
def test_every_parameter_goes_both_ways(head, tmp_path):
    model = random_model(vision_use_head=head)
    model.save_pretrained(tmp_path / "theirs")
    encoder = VisionEncoder.from_siglip2(tmp_path / "theirs")
    source = {key: value for key, value in parameters(model).items() if "head." not in key}
    assert {key: value.shape for key, value in encoder.state_dict().items()} == {
        key: value.shape for key, value in source.items()
    }
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, source[key]), key

    encoder.save_siglip2(tmp_path / "ours")
    back, info = Siglip2VisionModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert back.config.vision_use_head is False
    for key, value in parameters(back).items():
        assert torch.equal(value, source[key]), key


@torch.no_grad()
def test_loads_a_whole_siglip2(tmp_path):
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = Siglip2Model(
        Siglip2Config(vision_config=config().to_dict(), text_config=text | {"vocab_size": 9})
    )
    whole.save_pretrained(tmp_path)
    encoder = VisionEncoder.from_siglip2(tmp_path)
    layout = PackedLayout.from_grids([(3, 5)])
    patches = torch.randn(15, 48)
    expected = theirs(whole.eval().vision_model, patches, [(3, 5)])
    torch.testing.assert_close(encoder(patches, layout), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
def test_one_resolution_s_siglip_at_its_own_and_other_grids(whole, tmp_path):
    """Features and gradients at its own resolution are transformers'; at others its table is SigLIP2's interpolated."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = SiglipVisionConfig(**sizes, image_size=34, patch_size=4)  # 8 x 8 patches; the last pixels have none
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    texts = SiglipConfig(vision_config=vision.to_dict(), text_config=text | {"vocab_size": 9})
    model = (SiglipModel(texts) if whole else SiglipVisionModel(vision)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    encoder = VisionEncoder.from_siglip2(tmp_path)
    assert checkpoint_config(tmp_path).to_dict() == encoder.config.to_dict()
    source = getattr(model, "vision_model", model)
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    patches, layout = pack_patches(list(images), 4, (0.5,) * 3, (0.5,) * 3, dtype=torch.float32)
    ours = encoder(patches, layout)
    expected = source((images / 127.5 - 1).permute(0, 3, 1, 2)).last_hidden_state
    torch.testing.assert_close(ours, expected.flatten(0, 1), rtol=0, atol=1e-5)
    ours.square().sum().backward()
    expected.square().sum().backward()
    convolution = dict(source.named_parameters())["embeddings.patch_embedding.weight"].grad
    ours = encoder.embeddings.patch_embedding.weight.grad.view(64, 4, 4, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, convolution, rtol=1e-4, atol=1e-4 * convolution.abs().max().item())

    again = encoder.to_transformers()
    patches, layout = torch.randn(15, 48), PackedLayout.from_grids([(3, 5)])
    torch.testing.assert_close(encoder(patches, layout), theirs(again, patches, [(3, 5)]), rtol=0, atol=1e-5)


def test_other_checkpoints_are_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama'.*SigLIP2"):
        VisionEncoder.from_siglip2(tmp_path)


def test_incomplete_checkpoint_is_refused(tmp_path):
    model = random_model()
    state = {key: value for key, value in model.state_dict().items() if "layers.1.mlp" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="lacks weights"):
        VisionEncoder.from_siglip2(tmp_path)


def test_images_do_not_meet():
    encoder = VisionEncoder(config())
    layout = PackedLayout.from_grids(GRIDS)
    patches = torch.randn(layout.num_tokens, 48)
    before = encoder(patches, layout)
    patches[layout.image_ids() == 2] += 1
    after = encoder(patches, layout)
    changed = (before != after).any(1)
    assert torch.equal(changed, layout.image_ids() == 2)


def test_attention_in_runs_equals_attention_by_image():
    layout = PackedLayout.from_grids([(2, 3), (3, 2), (1, 4), (2, 3)])
    q, k, v = torch.randn(3, layout.num_tokens, 2, 8, dtype=torch.float64)
    mask = layout.image_ids()[:, None] == layout.image_ids()
    scores = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(packed_attention(q, k, v, layout), expected)


def test_no_images():
    layout = PackedLayout.from_grids([])
    assert VisionEncoder(config())(torch.zeros(0, 48), layout).shape == (0, 64)


def test_half_precision_runs_on_the_cpu():
    encoder = VisionEncoder(config()).bfloat16()
    layout = PackedLayout.from_grids([(3, 3), (2, 5)])
    patches = torch.randn(layout.num_tokens, 48)
    exact = encoder.float()(patches, layout)
    rounded = encoder.bfloat16()(patches, layout)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.05


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda_equals_cpu(dtype):
    encoder = VisionEncoder(config())
    layout = PackedLayout.from_grids(GRIDS)
    patches = torch.randn(layout.num_tokens, 48)
    expected = encoder(patches, layout)
    got = encoder.to("cuda", dtype)(patches.cuda(), layout.to("cuda")).float().cpu()
    assert (got - expected).abs().max() < (1e-3 if dtype == torch.float32 else 0.1)
