"""Four ranks as two nodes train, evaluate and export a model that none of them ever holds whole."""

import json
from dataclasses import replace

import pytest
import ranks
import torch
from launching import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from granvit.model import GranViT
from granvit.train.presets import save_config
from granvit.train.run import train

MB = 2**20


@pytest.mark.slow
def test_a_run_in_pieces_is_that_of_one_process(small_config, chats, tmp_path):
    """Its lines, evaluations, report and export; the answers of ranks are of different lengths, and some have none."""
    few = {"steps": 2, "packs": 4, "warmup_steps": 0}
    data = replace(small_config.data, chat=str(chats), eval_images=9)
    stages = {name: replace(getattr(small_config, name), **few) for name in ("warmup", "pretrain", "adapt", "sft")}
    stages["sft"] = replace(stages["sft"], eval_every=1)
    config = replace(small_config, **stages, data=data, output=str(tmp_path / "one"), control=True, checkpoint_every=1)
    train(config)
    config = replace(config, output=str(tmp_path / "four"), parallel="hsdp")
    save_config(config, tmp_path / "config.yaml")
    run_ranks(ranks.train, 4, tmp_path)
    assert "parallel hsdp: hsdp." in (tmp_path / "output").read_text()
    for name in ("metrics.jsonl", "control/metrics.jsonl"):
        ours, expected = (lines_of(tmp_path / folder / name) for folder in ("four", "one"))
        assert len(ours) == len(expected) > 2
        for line, other in zip(ours, expected, strict=True):
            assert {k for k in line.keys() ^ other.keys() if not k.startswith("features_")} == set()
            for key in line.keys() & other.keys():
                if not key.startswith("features_") and key != "seconds":
                    assert line[key] == pytest.approx(other[key], abs=2e-4), (key, line, other)
    ours, expected = (GranViT.from_pretrained(tmp_path / folder / "export").state_dict() for folder in ("four", "one"))
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=3e-3, msg=name)


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_no_rank_builds_a_model_whole(small_config, llm_folder, tmp_path):
    """Anonymous memory, which no other process shares and no file is behind, while a model is built of files."""
    sizes = {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": False,
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(llm_folder("llama"))
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    llm = AutoModelForCausalLM.from_config(Qwen2Config(**sizes, **ids))
    llm.bfloat16().save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    whole = 4 * sum(parameter.numel() for parameter in llm.parameters())
    largest = 2 * 4 * llm.lm_head.weight.numel()  # what is in no block: both tables
    config = replace(small_config, model=replace(small_config.model, llm=str(tmp_path / "llm")))
    save_config(config, tmp_path / "config.yaml")
    run_ranks(ranks.keep_peaks, 4, tmp_path)
    slack = 25 * MB
    assert whole > 110 * MB
    for file in sorted(tmp_path.glob("peaks-*.json")):
        peaks = json.loads(file.read_text())
        assert peaks["fsdp"] < whole / 4 + largest + slack < whole, (peaks, whole)
        assert peaks["hsdp"] < whole / 2 + largest + slack < 1.1 * whole, (peaks, whole)
        assert peaks["a phase in pieces"] < whole / 4 + largest + slack, (peaks, whole)
        assert whole < peaks["ddp"] < whole + largest + slack < 2 * whole, (peaks, whole)
    assert len(list(tmp_path.glob("peaks-*.json"))) == 4
