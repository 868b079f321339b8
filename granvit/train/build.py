"""The model and processor that a configuration names."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from granvit.data.loader import GranDataset
from granvit.eval.loading import find_encoder, load_model
from granvit.lora import adapters, add_adapters
from granvit.model import GranViT, GranViTProcessor, VisionEncoder
from granvit.model.files import mapped
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
    model, processor = read(config, data, frozen)
    return settle(model, torch.device("cpu"), frozen), processor


def read(
    config: Model, data: GranDataset | None, frozen: torch.dtype = torch.float32
) -> tuple[GranViT, GranViTProcessor]:
    """As `build`, but weights that lie in files stay there, in the files' dtype (see `mapped`): `settle` them, or take
    them into pieces. Those of a GGUF file, and of others that transformers has to convert, are in memory whole."""
    with mapped():
        if config.whole:
            model, processor = load_model(config.whole)
            if config.lora.rank:
                add_adapters(model.llm, config.lora)
            return _meant_for(model, frozen), processor
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
        model, processor = GranViT.from_parts(
            encoder,
            llm,
            llm_kwargs={"dtype": "auto"},
            lora=config.lora,
            chat_template=config.chat_template,
            **{name: getattr(config, name) for name in CONFIGURED},
        )
        return _meant_for(model, frozen), processor


def _meant_for(model: GranViT, frozen: torch.dtype) -> GranViT:
    """With configurations that name the LLM's dtype in training, not the files'."""
    for config in (model.config, model.config.text_config, model.llm.config):
        config.dtype = frozen if adapters(model.llm) else torch.float32
    return model


@torch.no_grad()
def settle(model: GranViT, device: torch.device, frozen: torch.dtype) -> GranViT:
    """The model, in place, with its weights in memory of their own on `device`, one after the other."""
    kinds = dtypes(model, frozen)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, kinds[parameter], copy=True)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device, copy=True)
    return model


def dtypes(model: GranViT, frozen: torch.dtype) -> dict[nn.Parameter, torch.dtype]:
    """In what each parameter is trained: float32, and `frozen` what lies under adapters."""
    learns = set(adapters(model.llm))
    under = {parameter for parameter in model.llm.parameters() if parameter not in learns} if learns else set()
    return {parameter: frozen if parameter in under else torch.float32 for parameter in model.parameters()}


def hollow(model: GranViT, frozen: torch.dtype) -> GranViT:
    """A copy of the model whose parameters are on meta, in the dtypes of training."""
    kinds = dtypes(model, frozen)
    memo = {
        id(parameter): nn.Parameter(
            torch.empty_like(parameter, dtype=kinds[parameter], device="meta"), parameter.requires_grad
        )
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


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
