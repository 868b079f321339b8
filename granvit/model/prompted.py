"""A GranViT as transformers' users know a model: a processor's output in, logits, a loss or generated tokens out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from granvit.questions.packing import IGNORE, PackedBatch
from granvit_kernels import PackedLayout

from .linear_cross_entropy import widened
from .projector import shuffle_pixels

# transformers 5.24 calls a model's cache `cache`, earlier ones `past_key_values`.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class Prompted:
    """The part of GranViT that is called with prompts: forward and generate."""

    accepts_loss_kwargs = True  # tells transformers' Trainer of num_items_in_batch

    def forward(
        self,
        input_ids: torch.Tensor | PackedBatch | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        images: Sequence[torch.Tensor] | None = None,
        image_index: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        features: tuple[torch.Tensor, PackedLayout] | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        past_key_values=None,
        cache=None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        skip_logits: bool = False,
        batch: PackedBatch | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of a processor's output: `model(**processor(image, question)).logits[:, -1]` is what generate chooses
        the first token of the answer by.

        Args:
            input_ids: int64 [B, L], prompts with the markers `<image>` and `<region>` in them, or, as `batch`, a
                PackedBatch (`forward_packed`).
            attention_mask: [B, L], 0 at padding, past tokens first where there is a cache; None: no padding.
            images, image_index, boxes, features: what stands at the markers, as of `generate`.
            inputs_embeds: [B, L, D] in place of input_ids and of what stands in them.
            position_ids: int64 [B, L]; None: each row counts its tokens from 0, padding left out.
            labels: int64 [B, L], the token that should stand at each place (transformers' causal LMs shift them by one
                too), -100 where none is scored: at padding, markers and questions. The loss is the mean cross entropy
                in nats a token, or the sum over num_items_in_batch where that is given; 0, with gradients of 0, where
                no token is scored.
            past_key_values, cache: keys and values of the tokens before these, by transformers' older name or newer.
            logits_to_keep: of the last so many places alone, or of these places; 0: of all.
            output_hidden_states, output_attentions: also the LLM's hidden states [B, L, D] before the first layer and
                after each, and its attention, which wants attn_implementation="eager".
            return_dict: False: a tuple of what is not None.
            skip_logits: return the loss of labels without logits, which then never exist whole (as Liger's models do).
        Returns:
            CausalLMOutputWithPast: loss, in float32 or, of float64, in float64; logits [B, L, V], where V counts the
            text's rows and the location tokens (None with skip_logits); the cache where use_cache does not forbid it;
            hidden_states, attentions.
        Raises:
            ValueError: markers with nothing to stand there; a row's picture, or boxes, that no marker asks for; ids,
                labels, boxes and indices out of range; arguments that exclude each other.
            TypeError: any other argument.
        """
        if batch is None and isinstance(input_ids, PackedBatch):
            input_ids, batch = None, input_ids
        if batch is not None:
            return self.forward_packed(batch)
        if skip_logits and labels is None:
            raise ValueError("skip_logits: needs labels, whose loss is then all that there is")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: give one of the two")
        if input_ids is not None:
            embeds = self._prompt_embeds(input_ids, image_index, boxes, images, features)
        else:
            given = {"images": images, "boxes": boxes, "features": features}
            if names := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"{', '.join(names)}: need input_ids, whose markers say where they stand")
            embeds = inputs_embeds
        if past_key_values is not None and cache is not None:
            raise ValueError("past_key_values, cache: two names of one thing; give one")
        cache = past_key_values if cache is None else cache
        attention_mask, position_ids = _mask_and_positions(embeds, attention_mask, position_ids, cache)
        more = {"output_hidden_states": True} if output_hidden_states else {}
        if output_attentions:
            if self.llm.config._attn_implementation != "eager":
                raise ValueError("output_attentions: needs from_pretrained(..., attn_implementation='eager')")
            more["output_attentions"] = True
        output = self.llm.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: cache},
            **more,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = output.last_hidden_state[:, keep]
        logits = None if skip_logits else self.logits(hidden)
        loss = None if labels is None else self._loss(hidden, logits, labels, embeds, num_items_in_batch)
        made = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
            **{CACHE: output.get(CACHE)},
        )
        return made if (self.config.return_dict if return_dict is None else return_dict) else made.to_tuple()

    def forward_packed(self, batch: PackedBatch) -> CausalLMOutputWithPast:
        """Encode a packed batch's images and score its answers: loss, the mean cross entropy over the answers' tokens,
        and logits [A, V]."""
        features, layout = self.encode(batch.images)
        regions = self.region_embeds(features, layout, batch.boxes, batch.box_image_index)
        logits, targets = self.answer_logits(batch, self.image_embeds(features, layout), regions)
        # Of no answers, which is what a rank's batch has whose pictures are all faulty, the mean would be NaN.
        loss = F.cross_entropy(widened(logits), targets) if len(targets) else widened(logits).sum()
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        images: Sequence[torch.Tensor] | None = None,
        features: tuple[torch.Tensor, PackedLayout] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Answers to B prompts, greedy unless kwargs say otherwise.

        Args:
            input_ids, attention_mask: int64 [B, L], padded on the left; these and the next three arguments are what
                a GranViTProcessor returns.
            image_index: int64 [B], the image that each row asks about; None: row i asks about image i, or all about the
                only one.
            boxes: float32 [R, 4], relative xyxy in [0, 1], of the rows' `<region>` markers in their order.
            images: uint8 [H, W, 3] each. Each is encoded once, however many rows ask about it.
            features: (features, layout) of the images from `encode`, in place of images.
            kwargs: GenerationMixin's (max_new_tokens, 64 by default; num_beams, do_sample...).
        Returns:
            int64 [B, N], the N new tokens alone, padded behind the answer's end; `processor.decode_answers` makes text
            of them. With return_dict_in_generate, transformers' output object.
            With neither images nor features the model is blind: the prompts must hold no image tokens (a processor
            called without images writes none), and region tokens are zeros.
        Raises:
            ValueError: as `forward`; and for arguments that GenerationMixin does not know.

        >>> inputs = processor(image, processor.ask_what((0.1, 0.2, 0.6, 0.9))).to(model.device)
        >>> processor.decode_answers(model.generate(**inputs, max_new_tokens=16))
        ['a striped red ball']
        """
        if unknown := {"labels", "num_items_in_batch", "skip_logits", "batch", "inputs_embeds"} & kwargs.keys():
            raise TypeError(f"generate takes no {', '.join(sorted(unknown))}")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # Ranks that share a model in pieces are kept in step by who calls this: transformers' own way to do it knows
        # nothing of encoders.
        kwargs.setdefault("synced_gpus", False)
        embeds = self._prompt_embeds(input_ids, image_index, boxes, images, features)
        return super().generate(inputs_embeds=embeds, attention_mask=attention_mask.to(embeds.device), **kwargs)

    @torch.no_grad()
    def generate_boxes(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs) -> torch.Tensor:
        """Boxes that B prompts ask for, of a model with config.parallel_boxes, in one forward pass: what `generate`
        gives step by step, where location tokens alone may be chosen.

        Args:
            input_ids, attention_mask, inputs: what a GranViTProcessor returns, or `features` for images, as of
                `generate`.
        Returns:
            int64 [B, 4], the location tokens of x1, y1, x2, y2.
        Raises:
            ValueError: for another model, and as `forward`.
        """
        config, rows = self.config, len(input_ids)
        if not config.parallel_boxes:
            raise ValueError("generate_boxes: this model tells a box token by token (config.parallel_boxes is False)")
        told = input_ids.new_full((rows, 3), config.text_vocab)  # any bin: they are one input
        shown = torch.cat((attention_mask, attention_mask.new_ones(rows, 3)), dim=1)
        output = self(torch.cat((input_ids, told), dim=1), shown, **inputs, use_cache=False, logits_to_keep=4)
        return config.text_vocab + output.logits[..., config.text_vocab :].argmax(-1)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, inputs_embeds=None, **kwargs) -> dict:
        """As transformers' own, with tokens that were generated as embeddings: there are no markers among them, which
        forward would make a GPU wait for to find out."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        ids = inputs.pop("input_ids", None)
        if ids is not None:
            inputs["inputs_embeds"] = self.embed_ids(ids)
        return inputs

    def _loss(
        self, hidden: torch.Tensor, logits: torch.Tensor | None, labels: torch.Tensor, embeds: torch.Tensor,
        items: torch.Tensor | int | None,
    ) -> torch.Tensor:  # fmt: skip
        rows = self.config.text_vocab + len(self.locations.output)
        if labels.shape != embeds.shape[:2] or hidden.shape[:2] != embeds.shape[:2]:
            raise ValueError(
                f"labels: got {list(labels.shape)} for {list(embeds.shape[:2])} tokens and logits of "
                f"{list(hidden.shape[:2])} of them; all are needed (logits_to_keep=0), and a label for each"
            )
        wrong = labels[((labels < 0) | (labels >= rows)) & (labels != IGNORE)]
        if len(wrong):
            marker = {self.config.image_token_id: " (<image>)", self.config.region_token_id: " (<region>)"}
            label = int(wrong[0])
            raise ValueError(
                f"labels: got {label}{marker.get(label, '')}, accepted are 0 to {rows - 1}, and {IGNORE} where none is "
                "scored, as at markers"
            )
        after = labels[:, 1:].to(hidden.device)
        scored = after != IGNORE
        number = scored.sum() if items is None else torch.as_tensor(items, device=hidden.device)
        if logits is None:
            each = self.token_losses(hidden[:, :-1][scored], after[scored])
        else:
            each = F.cross_entropy(widened(logits[:, :-1][scored]), after[scored], reduction="none")
        return each.sum() / number.clamp_min(1)  # the mean of no losses would be NaN

    def _prompt_embeds(self, input_ids, image_index, boxes, images, features) -> torch.Tensor:
        """Embeddings [B, L, D] of prompts, with image and region tokens in the place of their markers."""
        device, config, tokens = self.locations.input.device, self.config, self.config.region_tokens
        ids = input_ids.cpu()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) <= config.region_token_id:
            raise ValueError(
                f"input_ids: got {int(ids.min())} to {int(ids.max())}, accepted are 0 to {config.region_token_id}"
            )
        embeds = self.embed_ids(input_ids.to(device))
        image_slots = (ids.flatten() == config.image_token_id).nonzero()[:, 0]
        region_slots = (ids.flatten() == config.region_token_id).nonzero()[:, 0]
        boxes = torch.zeros(0, 4) if boxes is None else _checked_boxes(boxes)
        if len(region_slots) != len(boxes) * tokens:
            raise ValueError(
                f"boxes: got {len(boxes)}, but the prompts hold {len(region_slots)} "
                f"region tokens, {tokens} for a box"
            )
        if images is not None and features is not None:
            raise ValueError("images, features: give one of the two")
        if images is None and features is None:
            if len(image_slots):
                raise ValueError(f"images: none given, but the prompts hold {len(image_slots)} image tokens")
            if not len(region_slots):
                return embeds
            image_part = embeds.new_zeros(0, embeds.shape[-1])
            region_part = embeds.new_zeros(len(region_slots), embeds.shape[-1])
        else:
            hidden, layout = self.encode(images) if features is None else features
            index = _checked_index(image_index, len(input_ids), len(layout))
            asked = (ids == config.image_token_id).sum(1).tolist()
            image_part = self._image_rows(hidden, layout, index, asked)
            owners = index[region_slots[::tokens] // input_ids.shape[1]]
            region_part = self.region_embeds(hidden, layout, boxes, owners).flatten(0, 1)
        slots = torch.cat((image_slots, region_slots)).to(device)
        given = torch.cat((image_part, region_part)).to(embeds.dtype)
        return embeds.flatten(0, 1).index_copy(0, slots, given).view(embeds.shape)

    def _image_rows(
        self, features: torch.Tensor, layout: PackedLayout, index: torch.Tensor, asked: Sequence[int]
    ) -> torch.Tensor:
        """Image tokens [N, D] of each row's image, row after row. asked: how many each row has a place for."""
        merged, merged_layout = shuffle_pixels(features, layout, self.config.pixel_shuffle)
        embeds = self.placed(self.projector(merged), merged_layout)
        images = [image.flatten(0, 1) for image in merged_layout.split(embeds)]
        for row, (image, count) in enumerate(zip(index.tolist(), asked, strict=True)):
            if len(images[image]) != count:
                raise ValueError(
                    f"images: they give {len(images[image])} tokens of image {image} for row {row}, but its prompt "
                    f"holds {count} image tokens"
                )
        return torch.cat([embeds[:0], *(images[i] for i in index.tolist())])


def _mask_and_positions(embeds, attention_mask, position_ids, cache) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What is handed to the decoder. A mask always where there is no cache: without one, transformers looks for packed
    sequences. Positions count the tokens that the mask shows."""
    rows, length = embeds.shape[:2]
    if attention_mask is None:
        if cache is None:
            attention_mask = torch.ones(rows, length, dtype=torch.long, device=embeds.device)
        return attention_mask, position_ids
    if isinstance(attention_mask, torch.Tensor):
        attention_mask = attention_mask.to(embeds.device)
        if attention_mask.dim() == 2 and cache is None and attention_mask.shape != (rows, length):
            raise ValueError(f"attention_mask: got {list(attention_mask.shape)}, accepted is {[rows, length]}")
        if attention_mask.dim() == 2 and position_ids is None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, -length:]
    return attention_mask, position_ids


def _checked_boxes(boxes: torch.Tensor) -> torch.Tensor:
    """Boxes [R, 4] as they are. ValueError for another shape, half precision, and what is not in [0, 1]."""
    if boxes.dim() != 2 or boxes.shape[1] != 4 or boxes.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"boxes: got {boxes.dtype} {list(boxes.shape)}, accepted is float32 [R, 4]; half precision would round them"
        )
    outside = ~((boxes >= 0) & (boxes <= 1)).all(1)
    if outside.any():
        place = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"boxes[{place}]: got {boxes[place].tolist()}, accepted is xyxy relative to the image, in [0, 1]; of "
            "pixels, divide x by its width and y by its height"
        )
    return boxes


def _checked_index(image_index, rows: int, images: int) -> torch.Tensor:
    """int64 [B] on the CPU, each row's image; by default the only one, or each its own. There may be images that no row
    asks about."""
    if image_index is None:
        image_index = torch.zeros(rows) if images == 1 else torch.arange(rows)
    index = torch.as_tensor(image_index).long().cpu()
    if index.shape != (rows,) or (rows and not 0 <= int(index.min()) <= int(index.max()) < images):
        raise ValueError(f"image_index: got {index.tolist()}, accepted are {rows} indices of {images} images")
    return index
