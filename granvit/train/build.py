"""The model and processor that a configuration names."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from granvit.data.loader import GranDataset
from granvit.eval.loading import find_encoder, load_model
from granvit.lora import add_adapters
from granvit.model import GranViT, GranViTProcessor, VisionEncoder
from granvit.model.processing import CONFIGURED
from granvit.toy.tiny import TinyLLM, TinyVision, tiny_encoder, tiny_llm
from granvit.train.presets import Model


def build(
    config: Model, data: GranDataset | None, frozen: torch.dtype = torch.float32
) -> tuple[GranViT, GranViTProcessor]:
    """A GranViT and its processor; what has no name in `config` is made from scratch, its tokenizer of `data`'s text.

    data: None will do where the configuration names an LLM. frozen: the dtype of an LLM under adapters; whatever learns
    is float32.
    Random weights come from torch's global generator: seed it before. Raises ValueError for a name that is no model.
    """
    if config.whole:
        model, processor = load_model(config.whole)
        model.float()
        if config.lora.rank:
            add_adapters(model.llm.to(frozen), config.lora)
        return model, processor
    encoder = find_encoder(config.encoder) if config.encoder else random_encoder(config)
    llm = config.llm or tiny_llm(
        training_text(data),
        TinyLLM(
            config.llm_width,
            config.llm_layers,
            config.llm_heads,
            mlp=3 * config.llm_width,
            vocab=config.vocabulary,
        ),
    )
    return GranViT.from_parts(
        encoder,
        llm,
        llm_kwargs={"dtype": frozen if config.lora.rank else torch.float32},
        lora=config.lora,
        chat_template=config.chat_template,
        **{name: getattr(config, name) for name in CONFIGURED},
    )


def random_encoder(config: Model) -> VisionEncoder:
    """The encoder of a configuration that names none: the first weights that `build` draws."""
    return tiny_encoder(
        TinyVision(
            config.encoder_width,
            config.encoder_layers,
            config.encoder_heads,
            mlp=4 * config.encoder_width,
            patch_size=config.patch_size,
        )
    )


def training_text(data: GranDataset) -> Iterator[str]:
    """Every caption of the training rows."""
    for index in range(len(data)):
        sample = data.annotations(index)
        if sample is not None:
            yield from (region.caption for region in sample.regions)
            if sample.caption:
                yield sample.caption
