"""A GranViT that trains on two CPU cores: everything from scratch, with a tokenizer of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Siglip2VisionConfig,
)

from granvit.model.granvit import GranViT
from granvit.model.processing import GranViTProcessor
from granvit.model.vision import VisionEncoder
from granvit.questions.prompts import DESCRIBE_BOX, DESCRIBE_IMAGE, FIND_BOX

# The fixed sentences of our questions, each one token in the tiny tokenizer: they say no more than which task
# it is, and as words they would make up half of the LM's work.
SENTENCES = (f"\n{DESCRIBE_IMAGE}\n", f"\n{DESCRIBE_BOX[0]}", f"{DESCRIBE_BOX[1]}\n", f"\n{FIND_BOX}")


@dataclass(frozen=True)
class TinyVision:
    """Sizes of the tiny encoder: 0.8 M parameters. table: side of the position table."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 512
    patch_size: int = 16
    table: int = 8


@dataclass(frozen=True)
class TinyLLM:
    """Sizes of the tiny Llama-type LM with tied tables: 0.6 M parameters. vocab: the tokenizer's, location
    tokens not counted.

    Weights are drawn with a standard deviation of width**-.5. Llama's .02 suits a width of 2500: at 128 it leaves
    attention flat for hundreds of steps. rope_theta is large, so that equal words a sequence apart still look alike.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    mlp: int = 384
    vocab: int = 1024
    max_positions: int = 4096
    rope_theta: float = 1e6


def tiny_encoder(sizes: TinyVision = TinyVision()) -> VisionEncoder:
    """An encoder with random weights."""
    return VisionEncoder(
        Siglip2VisionConfig(
            hidden_size=sizes.width,
            intermediate_size=sizes.mlp,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            patch_size=sizes.patch_size,
            num_patches=sizes.table**2,
            vision_use_head=False,
        )
    )


def tiny_llm(
    texts: Iterable[str], sizes: TinyLLM = TinyLLM()
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A Llama-type LM with random weights, and the byte-level BPE trained on `texts` that it reads."""
    tokenizer = train_tokenizer(texts, sizes.vocab)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.max_positions,
        tie_word_embeddings=True,
        initializer_range=sizes.width**-0.5,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,  # or Llama would zero that row
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), tokenizer


def build_tiny(
    texts: Iterable[str],
    vision: TinyVision = TinyVision(),
    llm: TinyLLM = TinyLLM(),
    bins: int = 32,
    box_format: str = "bins",
    box_style: str = "both",
    max_image_tokens: int = 36,
    **config,
) -> tuple[GranViT, GranViTProcessor]:
    """A tiny GranViT with random weights, and its processor with a byte-level BPE trained on `texts`.

    texts: what the model will read and write; nothing else about the data reaches the model. Draw weights the
    same way by torch.manual_seed before. config: further fields of GranViTConfig (pixel_shuffle,
    region_tokens...).
    """
    config |= {"bins": bins, "box_format": box_format, "box_style": box_style}
    return GranViT.from_parts(
        tiny_encoder(vision), tiny_llm(texts, llm), max_image_tokens=max_image_tokens, **config
    )


def train_tokenizer(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab` tokens (at least the 256 bytes and ours), single digits kept apart
    so that coordinates are read digit by digit, and the questions' fixed sentences one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(SENTENCES),
        min_frequency=2,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
    fast.add_tokens([AddedToken(sentence, normalized=False) for sentence in SENTENCES])
    return fast
