"""A GranViT as a Lfm2VlForConditionalGeneration: a folder that plain transformers loads, without granvit.

Lfm2-VL is SigLIP2 on packed patches, a pixel shuffle of 2, a LayerNorm, a two-layer MLP, and any causal LM of
transformers. So is a GranViT whose boxes are text, whose image tokens are merged 2 x 2, and which adds no places to
them.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, Lfm2VlConfig, Lfm2VlForConditionalGeneration, Siglip2VisionConfig

from granvit.lora import adapters, merged
from granvit.questions.prompts import IMAGE
from granvit_kernels import pack_patches

from .config import GranViTConfig
from .granvit import GranViT
from .preprocessor import write_preprocessor
from .processing import GranViTProcessor

TOLERANCE = 1e-3
"""Largest difference of logits, as a share of the largest logit, with which a copy counts as one."""


NEEDS = {"box_style": "text", "box_format": "text", "pixel_shuffle": 2, "cell_positions": False}
"""What a GranViT's configuration must say."""


def why_no_lfm2_vl(config: GranViTConfig) -> str | None:
    """Why a model of this configuration has no form as a Lfm2-VL; None where nothing speaks against it."""
    for name, value in NEEDS.items():
        if getattr(config, name) != value:
            return f"{name}: the model's is {getattr(config, name)!r}; a Lfm2-VL needs {value!r}"
    if not isinstance(config.vision_config, Siglip2VisionConfig):
        return f"vision_config: the encoder is a {config.vision_config.model_type!r}; a Lfm2-VL needs a SigLIP2"
    return None


def save_lfm2_vl(model: GranViT, processor: GranViTProcessor, directory: str | Path) -> None:
    """Write the model, its processor and its chat template to `directory`.

    AutoModelForImageTextToText and AutoProcessor load it, and logits over the LLM's vocabulary are the model's, for the
    pictures that the folder's processor makes. That one differs from ours as Lfm2-VL's does: sides of an even number of
    patches (from half of the budget up to all of it), and pixels rounded to 8 bits after resizing.
    Raises ValueError, naming the field, for a model that has no such form, or whose LLM does more than transformers'
    copy of it would (a scaled or bounded logit).
    """
    copy = to_lfm2_vl(model)
    template = chat_template(processor)
    copy.save_pretrained(directory)
    tokenizer = deepcopy(processor.tokenizer)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    folder = Path(directory)
    # transformers 5.17 reads it of the tokenizer's, later ones of the processor's
    settings = {"use_image_special_tokens": False, "processor_class": "Lfm2VlProcessor"}
    for name in ("tokenizer_config.json", "processor_config.json"):
        _edit(folder / name, settings)
    config = model.config
    mean, std, resample = config.image_mean, config.image_std, config.image_resample
    write_preprocessor(folder, image_processor(config), mean, std, resample, "pil")  # it rounds whatever ours does


def to_lfm2_vl(model: GranViT) -> Lfm2VlForConditionalGeneration:
    """A copy on the CPU, in the LLM's dtype. Its table has the tokenizer's rows: the LLM's in use and the two markers'.

    Raises ValueError as `save_lfm2_vl` does.
    """
    config, text = model.config, model.config.text_config
    if reason := why_no_lfm2_vl(config):
        raise ValueError(reason)
    llm_state = merged(model.state_dict(), model.llm) if adapters(model.llm) else model.state_dict()
    prefix = f"llm.{model.llm.base_model_prefix}."
    rows = config.region_token_id + 1
    language = {name.removeprefix(prefix): t for name, t in llm_state.items() if name.startswith(prefix)}
    if "embed_tokens.weight" not in language or "llm.lm_head.weight" not in llm_state:
        raise ValueError(
            f"text_config: a {text.model_type} names its tables otherwise than a Lfm2-VL (embed_tokens, lm_head)"
        )
    text = deepcopy(text)
    text.vocab_size = rows
    encoder = model.encoder.to_transformers()
    made = Lfm2VlConfig(
        vision_config=encoder.config.to_dict(),
        text_config=text.to_dict(),
        image_token_id=config.image_token_id,
        projector_hidden_act="gelu_pytorch_tanh",
        projector_hidden_size=model.projector.fc1.out_features,
        downsample_factor=2,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    made.bos_token_id, made.eos_token_id = config.bos_token_id, config.eos_token_id
    copy = Lfm2VlForConditionalGeneration(made)
    projector, scale = model.projector, model.projector.scale
    state = {
        "lm_head.weight": _table(llm_state["llm.lm_head.weight"], config.text_vocab, rows),
        "model.multi_modal_projector.layer_norm.weight": projector.norm.weight,
        "model.multi_modal_projector.layer_norm.bias": projector.norm.bias,
        "model.multi_modal_projector.linear_1.weight": projector.fc1.weight,
        "model.multi_modal_projector.linear_1.bias": projector.fc1.bias,
        "model.multi_modal_projector.linear_2.weight": projector.fc2.weight * scale,
        "model.multi_modal_projector.linear_2.bias": projector.fc2.bias * scale,
    }
    language["embed_tokens.weight"] = _table(language["embed_tokens.weight"], config.text_vocab, rows)
    state |= {f"model.language_model.{name}": tensor for name, tensor in language.items()}
    state |= {f"model.vision_tower.{name}": tensor for name, tensor in encoder.state_dict().items()}
    copy.load_state_dict({name: tensor.detach().cpu() for name, tensor in state.items()})
    copy.to(model.llm.dtype).eval()
    own = model.generation_config
    copy.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        do_sample=False,
        max_new_tokens=own.max_new_tokens,
        suppress_tokens=[config.image_token_id, config.region_token_id],
    )
    _check_copy(model, copy)
    return copy


def _table(table: Tensor, used: int, rows: int) -> Tensor:
    """The rows in use, and zeros for the markers."""
    return torch.cat((table[:used], table.new_zeros(rows - used, table.shape[1])))


@torch.no_grad()
def _check_copy(model: GranViT, copy: Lfm2VlForConditionalGeneration) -> None:
    """Raises ValueError where logits about a picture of noise differ."""
    config = model.config
    side = 2 * config.patch_size
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (side, 2 * side, 3), generator=generator, dtype=torch.uint8)
    words = torch.randint(0, config.text_vocab, (1, 8), generator=generator)
    ids = torch.cat((torch.full((1, 2), config.image_token_id), words), 1)
    training, model = model.training, model.eval()
    device = model.device
    patches, layout = pack_patches(
        [image], config.patch_size, config.image_mean, config.image_std, grids=torch.tensor([[2, 4]])
    )
    layout = layout.to(device)
    features = model.encoder(patches.to(device, model.dtype), layout)
    embeds = model.embed_ids(ids.to(device))
    embeds[0, :2] = model.image_embeds(features, layout).to(embeds.dtype)
    ours = model.llm(inputs_embeds=embeds).logits[..., : config.text_vocab].cpu().float()
    theirs = copy(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=patches.to(copy.dtype)[None],
        pixel_attention_mask=torch.ones(1, 8, dtype=torch.int32), spatial_shapes=torch.tensor([[2, 4]]),
    ).logits[..., : config.text_vocab].float()  # fmt: skip
    model.train(training)
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    bound = TOLERANCE if copy.dtype == torch.float32 else 0.05
    if not difference <= bound:
        raise ValueError(
            f"text_config: a {config.text_config.model_type} does more than a Lfm2-VL runs: logits differ by "
            f"{difference:.2g} of the largest"
        )


def image_processor(config: GranViTConfig) -> dict[str, Any]:
    """Which image processor, and its sizes: it gives a picture whole, in as many patches as the model learnt."""
    most = config.max_image_tokens // 4
    return {
        "image_processor_type": "Lfm2VlImageProcessor",
        "do_image_splitting": False,
        "min_tiles": 1,
        "max_tiles": 1,
        "use_thumbnail": False,
        "downsample_factor": 2,
        "encoder_patch_size": config.patch_size,
        "tile_size": config.patch_size,
        "min_image_tokens": max(1, most // 2),
        "max_image_tokens": most,
    }


def chat_template(processor: GranViTProcessor) -> str:
    """A Jinja template that writes conversations as the model learnt them. What a user says first follows the image.

    Raises ValueError where the text that opens a sequence doesn't give its tokens back.
    """
    turns, tokenizer = processor.turns, processor.tokenizer
    start = tokenizer.decode(list(turns.start), skip_special_tokens=False)
    if tokenizer(start, add_special_tokens=False)["input_ids"] != list(turns.start):
        raise ValueError("the tokenizer reads what opens a sequence otherwise than it writes it")
    end = tokenizer.convert_ids_to_tokens(turns.end)
    said = "text | trim" if turns.strip else "text"
    pieces = (start, turns.first, turns.later, turns.asked, turns.lead, turns.trail, end)
    # Jinja reads JSON's escapes, but not two of them for one character.
    start, first, later, asked, lead, trail, end = (json.dumps(piece, ensure_ascii=False) for piece in pieces)
    return (
        "{{- " + start + " -}}"
        "{%- for message in messages -%}"
        "{%- set parts = message.content -%}"
        "{%- if parts is string -%}{%- set parts = [{'type': 'text', 'text': parts}] -%}{%- endif -%}"
        "{%- set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}"
        "{%- if message.role == 'user' -%}"
        "{%- for part in parts if part.type == 'image' -%}{{- '" + IMAGE + "' -}}{%- endfor -%}"
        "{{- (" + first + " if loop.first else " + later + ") + (" + said + ") + " + asked + " -}}"
        "{%- elif message.role == 'assistant' -%}"
        "{{- " + lead + " + (" + said + ") + " + trail + " + " + end + " -}}"
        "{%- else -%}"
        "{{- raise_exception('accepted are messages of user and assistant, got ' + message.role) -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
    )


def _edit(path: Path, values: dict[str, Any]) -> None:
    """Set values of a JSON file, which need not exist."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(old | values, indent=2) + "\n", encoding="utf-8")
