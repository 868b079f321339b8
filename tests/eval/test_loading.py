"""Which paths are models, and what is said of the others."""

import json

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
    (tmp_path / "seed-1" / "export").mkdir(parents=True)
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


def test_damaged_and_missing_weights_are_errors(saved, tmp_path):
    source = saved[0] / "export"
    for file in source.rglob("*"):
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="can't be loaded"):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="can't be loaded"):
        load_model(tmp_path)

    tensors = load(whole)
    del tensors[next(name for name in tensors if name.startswith("projector"))]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="can't be loaded.*projector"):
        load_model(tmp_path)
