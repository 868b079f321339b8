import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from granvit.model.llm import (
    LocationTokens,
    additive_mask,
    check_llm,
    check_llm_config,
    embedding_rms,
    load_llm,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
SIZES |= {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}


def random_llm(name: str, **options):
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "name, options",
    [
        ("Llama", {}),
        ("Qwen2", {"num_key_value_heads": 2}),
        ("Qwen3", GROUPED),
        ("Gemma", GROUPED),
        ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
        ("GPTNeoX", {}),
        ("Granite", {"embedding_multiplier": 3.0}),
    ],
)
def test_causal_llms_are_accepted(name, options):
    llm = random_llm(name, **options)
    check_llm_config(llm.config)
    check_llm(llm)
    assert llm.training, "the trial leaves the mode as it was"


@pytest.mark.parametrize(
    "name, options, cause",
    [
        ("Mistral", {"num_key_value_heads": 2}, "'mistral' has a sliding window of 4096"),
        (
            "Qwen2",
            {"use_sliding_window": True, "max_window_layers": 1},
            "'qwen2' has layers .* sliding_attention",
        ),
        ("Gemma2", GROUPED, "'gemma2' has layers .* sliding_attention"),
        (
            "Gemma2",
            {**GROUPED, "layer_types": ["full_attention"] * 2},
            "'gemma2' has final_logit_softcapping=30",
        ),
        ("Cohere", {}, "'cohere' has logit_scale=0.0625"),
        ("Granite", {"logits_scaling": 8.0}, "'granite' has logits_scaling=8.0"),
        ("Qwen3Next", GROUPED, "'qwen3_next' has layers .* linear_attention"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(name, options, cause):
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    with pytest.raises(ValueError, match=cause):
        check_llm_config(config)


def test_the_trial_finds_what_no_name_tells():
    with pytest.raises(ValueError, match="MambaForCausalLM is recurrent"):
        check_llm(AutoModelForCausalLM.from_config(transformers.MambaConfig(**SIZES)))
    with pytest.raises(ValueError, match="CohereForCausalLM gives other logits packed than alone"):
        check_llm(random_llm("Cohere"))
    with pytest.raises(ValueError, match="BloomForCausalLM can't run on embeddings with an explicit mask"):
        check_llm(AutoModelForCausalLM.from_config(transformers.BloomConfig(n_head=4, **SIZES)))


def test_location_tokens_begin_smooth_and_at_their_rms():
    locations = LocationTokens(64, 256)
    locations.reset_parameters(0.1, 0.03)
    for rows, rms in ((locations.input, 0.1), (locations.output, 0.03)):
        assert rows.square().mean().sqrt().item() == pytest.approx(rms, rel=1e-4)
        like = torch.nn.functional.cosine_similarity
        assert like(rows[:-1], rows[1:]).mean() > 0.6 > 0.3 > like(rows[:-4], rows[4:]).mean()


def test_location_rows_take_their_places():
    locations = LocationTokens(4, 8)
    ids = torch.tensor([[3, 10, 13, 14, 9]])
    embeds = torch.randn(1, 5, 8)
    got = locations.embed(embeds, ids, 10)
    assert torch.equal(got[0, [0, 3, 4]], embeds[0, [0, 3, 4]])
    assert torch.equal(got[0, 1:3], locations.input[[0, 3]])
    assert LocationTokens(0, 8).embed(embeds, ids, 10) is embeds


def test_additive_mask():
    mask = additive_mask(torch.tensor([[True, False]]), torch.bfloat16)
    assert mask.tolist() == [[0, torch.finfo(torch.bfloat16).min]]


def test_embedding_rms_is_of_the_rows_in_use():
    table = torch.nn.Embedding(10, 4)
    with torch.no_grad():
        table.weight.fill_(0.5)
        table.weight[8:] = 100
    assert embedding_rms(table, 8) == 0.5


def test_a_path_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="no config.json and 0 GGUF files"):
        load_llm(tmp_path)
    with pytest.raises(ValueError, match="there is no file"):
        load_llm(tmp_path / "x.gguf")
