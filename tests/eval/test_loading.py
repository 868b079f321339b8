"""Which paths are models, and what is said of the others."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load, save_file

from granvit.eval.loading import find_model, load_model


def test_a_run_and_its_export_are_the_same_model(saved):
    run, model = saved
    assert find_model(run) == find_model(run / "export") == run / "export"
    loaded, processor = load_model(run)
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert processor.decode_answers(processor.answer_ids(["a red circle"])) == ["a red circle"]


def test_what_is_no_model_is_said(tmp_path):
    with pytest.raises(ValueError, match="no model at .*nowhere: it is not there; give a run's folder"):
        find_model(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="it is a file"):
        find_model(tmp_path / "file")
    with pytest.raises(ValueError, match="found file; give"):
        find_model(tmp_path)
    (tmp_path / "config.yaml").write_text("preset: smoke")
    with pytest.raises(ValueError, match="has no export/ yet: it is not finished"):
        find_model(tmp_path)
    (tmp_path / "seed-1" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="several seeds; choose one of .*seed-1"):
        find_model(tmp_path)


def test_another_kind_of_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2_vision_model"}))
    with pytest.raises(ValueError, match="a model of type 'siglip2_vision_model', not a GranViT"):
        find_model(tmp_path)
    for text in ("{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json is not readable"):
            find_model(tmp_path)


@pytest.fixture
def export(saved, tmp_path):
    """A copy of the export, to be damaged."""
    return shutil.copytree(saved[0] / "export", tmp_path / "export")


def change(file, *keys, value):
    content = json.loads(file.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("text_config",), 5, "text_config: got int, accepted"),
        (("text_config",), {}, "text_config"),
        (("text_config", "hidden_size"), 0, "text_config.hidden_size: got 0"),
        (("text_config", "num_attention_heads"), "two", ""),
        (("vision_config",), [], "vision_config: got"),
        (("vision_config", "hidden_size"), 0, "vision_config"),
        (("vision_config", "num_attention_heads"), 0, "vision_config"),
        (("region_heads",), 0, "region_heads: got 0, accepted"),
        (("region_heads",), [2], "region_heads: got"),
        (("text_vocab",), 10, "image_token_id: the processor has 295, the model's configuration 42"),
        (("bins",), 16, "bins: the processor has 32, the model's configuration 16"),
        (("image_std",), None, "image_std: got None, accepted are three positive numbers"),
    ],
)
def test_a_damaged_configuration_is_one_error(export, keys, value, message):
    change(export / "config.json", *keys, value=value)
    with pytest.raises(ValueError, match=f"export can't be loaded: .*{message}"):
        load_model(export)


@pytest.mark.parametrize("content", ['{"a": 1}', "[]", "{", ""])
def test_a_damaged_tokenizer_is_one_error(export, content):
    (export / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="export can't be loaded: "):
        load_model(export)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bins", 16),
        ("max_image_tokens", 99),
        ("box_format", "text"),
        ("box_style", "text"),
        ("region_tokens", 4),
        ("pixel_shuffle", 2),
        ("patch_size", 8),
    ],
)
def test_a_processor_of_another_model_is_refused(export, name, value):
    change(export / "processor_config.json", name, value=value)
    with pytest.raises(ValueError, match=f"{name}: the processor has {value!r}, the model's configuration"):
        load_model(export)


def test_a_missing_processor_is_said(export):
    (export / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="processor_config.json is missing"):
        load_model(export)


@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(saved, device):
    with pytest.raises(ValueError, match=f"device: got '{device}', accepted is 'cpu', or 'cuda' with a GPU: .+"):
        load_model(saved[0], device)


def test_damaged_and_missing_weights_are_errors(export):
    weights = export / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="can't be loaded"):
        load_model(export)
    weights.unlink()
    with pytest.raises(ValueError, match="can't be loaded"):
        load_model(export)

    tensors = load(whole)
    del tensors[next(name for name in tensors if name.startswith("projector"))]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="can't be loaded.*projector"):
        load_model(export)
