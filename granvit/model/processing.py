"""GranViTProcessor: images, questions and boxes in, what GranViT.generate takes out; answers back to
boxes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import AddedToken, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from granvit.questions.prompts import (
    IMAGE,
    REGION,
    Box,
    Question,
    box_fault,
    check_box,
    check_sentence,
    describe_box,
    find_box,
    form_fault,
    format_box,
    parse_box,
    questions,
)
from granvit.questions.turns import raw_turns, template_turns

from .config import GranViTConfig, token_grid
from .images import as_pixels, read_images

__all__ = ["GranViTProcessor", "ProcessedInputs", "as_pixels"]

# Fields that the trainer's configuration shares with the model's; and those that a processor does, besides the
# encoder's patch_size.
_FORMS = ("max_image_tokens", "pixel_shuffle", "region_tokens", "box_style", "box_format", "bins")
CONFIGURED = (*_FORMS, "parallel_boxes", "cell_positions")
SHARED = (*_FORMS, "end_of_turn_token_id")


class ProcessedInputs(BatchFeature):
    """What a GranViTProcessor returns: a dictionary whose `to` moves to a device."""

    def to(self, *args, **kwargs) -> ProcessedInputs:
        """As transformers' own, but boxes, the only numbers with a fraction, stay float32 whatever dtype is given:
        in half precision they would be up to four thousandths off. A model takes them in any dtype of its own."""
        boxes = self.data.get("boxes")
        super().to(*args, **kwargs)
        if boxes is not None:
            self.data["boxes"] = boxes.to(self.data["boxes"].device)
        return self


class GranViTProcessor(ProcessorMixin):
    """Writes prompts as token ids. It decodes and resizes nothing: images stay uint8 until the model packs
    them.

    Args:
        tokenizer: the LLM's, with GranViT's tokens added (`GranViTProcessor.from_config` adds them).
        patch_size, max_image_tokens, pixel_shuffle, region_tokens, box_style, box_format, bins, end_of_turn_token_id:
            as in GranViTConfig.
    Raises ValueError for a tokenizer that lacks GranViT's tokens, and where answers are to end by a chat template that
    can't be used (`template_turns`) or ends them with another token.
    """

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        patch_size: int = 16,
        max_image_tokens: int = 256,
        pixel_shuffle: int = 1,
        region_tokens: int = 1,
        box_style: str = "text",
        box_format: str = "text",
        bins: int = 1000,
        end_of_turn_token_id: int | None = None,
        **kwargs,
    ):
        self.patch_size = patch_size
        self.max_image_tokens = max_image_tokens
        self.pixel_shuffle = pixel_shuffle
        self.region_tokens = region_tokens
        self.box_style = box_style
        self.box_format = box_format
        self.bins = bins
        self.end_of_turn_token_id = end_of_turn_token_id
        super().__init__(tokenizer, **kwargs)
        self.turns = raw_turns(tokenizer) if end_of_turn_token_id is None else template_turns(tokenizer)
        if end_of_turn_token_id not in (None, self.turns.end):
            raise ValueError(
                f"end_of_turn_token_id: got {end_of_turn_token_id}, but the tokenizer's chat template ends an answer "
                f"with {self.turns.end}"
            )
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        self.region_token_id = tokenizer.convert_tokens_to_ids(REGION)
        if (
            None in (self.image_token_id, self.region_token_id)
            or self.image_token_id == tokenizer.unk_token_id
        ):
            raise ValueError(
                f"tokenizer: it lacks {IMAGE} or {REGION}; GranViTProcessor.from_config adds them"
            )
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        special = {*tokenizer.all_special_tokens, *added, IMAGE, REGION}
        self._special_in_answers, self._special_in_prompts = _any_of(special), _any_of(special - {REGION})

    @classmethod
    def from_config(cls, config: GranViTConfig, tokenizer: PreTrainedTokenizerBase) -> GranViTProcessor:
        """The processor of a configuration; adds GranViT's tokens to the LLM's tokenizer where they are
        missing.

        Raises ValueError if the tokens then don't have the ids that the configuration gives them.
        """
        locations = [f"<loc_{i}>" for i in range(config.location_tokens)]
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in locations])
        tokenizer.add_tokens(
            [AddedToken(token, normalized=False, special=True) for token in (IMAGE, REGION)], True
        )
        got = tokenizer.convert_tokens_to_ids([*locations, IMAGE, REGION])
        if got != list(range(config.text_vocab, config.region_token_id + 1)):
            raise ValueError(
                f"tokenizer: GranViT's {len(got)} tokens must have the ids from {config.text_vocab} on, but "
                f"{IMAGE} got {got[-2]} and {REGION} {got[-1]}; is this the LLM's own tokenizer?"
            )
        shared = {name: getattr(config, name) for name in SHARED}
        return cls(tokenizer, patch_size=config.patch_size, **shared)

    def check_config(self, config: GranViTConfig) -> None:
        """Raise ValueError, naming the field, if this is not the processor of a model of this configuration: it would
        write prompts that the model reads otherwise."""
        wanted = {name: getattr(config, name) for name in (*SHARED, "image_token_id", "region_token_id")}
        wanted["patch_size"] = config.patch_size
        has = {name: getattr(self, name) for name in wanted}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            wanted[name], has[name] = getattr(config, name), getattr(self.tokenizer, name)
        for name, value in wanted.items():
            if has[name] != value:
                raise ValueError(f"{name}: the processor has {has[name]!r}, the model's configuration {value!r}")

    def __call__(
        self,
        images: Any | Sequence[Any] | None = None,
        questions: str | Question | Sequence[str | Question] = (),
        boxes: torch.Tensor | Sequence[torch.Tensor | Sequence[Box]] | None = None,
        image_index: Sequence[int] | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        **unknown,
    ) -> ProcessedInputs:
        """Prompts for generate, one question a row, padded on the left.

        Args:
            images: the distinct images, or the only one: uint8 tensors or arrays [H, W, 3], PIL images, or paths.
                None: the rows hold no image (a blinded model), and generate gives zeros for region tokens.
            questions: a prompt or a Question a row, or the only one. A prompt's `<region>` markers stand for its
                boxes. A Question of several turns is asked its last one, after the others and their answers.
            boxes: for each row the boxes [R, 4] of its markers, relative xyxy, as lists or tensors; for an only
                question its boxes alone will do; None: what the Questions carry.
            image_index: for each row its image; None: row i asks of image i, or all rows of the only image.
            image_sizes: (height, width) in pixels, in place of images where their features are given to
                generate.
        Returns:
            ProcessedInputs: input_ids, attention_mask [B, L] int64; image_index [B]; boxes float32 [R, 4]; and
            images, a list of uint8 tensors [H, W, 3], where images were given.
        Raises:
            ValueError: an empty question, an image that can't be read, a box outside its image or of no area, markers
                and boxes that differ in number, an index that names no image, a question in another model's form.
            TypeError: arguments of other models' processors (text, return_tensors...).
        """
        if unknown:
            raise TypeError(
                f"GranViTProcessor got {', '.join(unknown)}; accepted are images, questions (the prompts), boxes, "
                "image_index and image_sizes. What it returns are torch tensors, padded"
            )
        boxes = None if boxes is None else as_lists(boxes)
        if isinstance(questions, str | Question):
            questions = [questions]
            boxes = [boxes] if boxes is not None and nesting(boxes) == 2 else boxes
        asked = [item if isinstance(item, Question) else Question("", item, "") for item in questions]
        prompts = ["\n".join(prompt for prompt, _ in q.turns) if q.later else q.prompt for q in asked]
        if boxes is None:
            boxes = [question.boxes for question in asked]
        if not isinstance(boxes, list) or not all(isinstance(row, list | tuple) for row in boxes):
            raise ValueError(f"boxes: got {str(boxes):.60}, accepted is a list of boxes (relative xyxy) a question")
        if len(boxes) != len(prompts):
            raise ValueError(f"boxes: got {len(boxes)} lists of boxes for {len(prompts)} questions")
        self._check_rows(prompts, boxes)
        for i, question in enumerate(asked):
            if fault := form_fault(question, self.box_style, self.box_format, self.bins):
                raise ValueError(f"questions[{i}]: {question.prompt!r:.200} {fault}; processor.ask_what(box) writes it")
        pixels = None if images is None else read_images(images)
        sizes = image_sizes if pixels is None else [tuple(image.shape[:2]) for image in pixels]
        if sizes is None:
            parts = [self.image_part(0)] * len(prompts)
            index = torch.full((len(prompts),), -1)
        else:
            index = self._image_index(image_index, len(prompts), len(sizes))
            parts = [self.image_part(self.image_tokens(*sizes[i])) for i in index.tolist()]
        rows = [
            part + [i for prompt, answer in turns[:-1] for i in prompt + answer] + turns[-1][0]
            for part, turns in zip(parts, self.turn_ids(asked), strict=True)
        ]
        input_ids, attention_mask = self._pad_left(rows)
        data = {"input_ids": input_ids, "attention_mask": attention_mask, "image_index": index}
        flat = [box for row in boxes for box in row]
        data["boxes"] = torch.tensor(flat, dtype=torch.float32).view(-1, 4)
        if pixels is not None:
            data["images"] = pixels
        return ProcessedInputs(data)

    def ask_what(self, box: Box, answer: str = "", region: int | None = None) -> Question:
        """The question what is in a box, in the form that the model was taught (box_style, box_format, bins).

        box: x1, y1, x2, y2 relative to the image, in [0, 1]; numbers, an array or a tensor. answer, region: see
        Question. ValueError for another box.
        """
        box = as_lists(box)
        if not _is_box(box):
            raise ValueError(f"box: got {box!r:.60}, accepted are four numbers, x1 y1 x2 y2 relative to the image")
        check_box(box)
        return describe_box(tuple(box), answer, region, self.box_style, self.box_format, self.bins)

    def ask_where(self, sentence: str, box: Box | None = None, region: int | None = None) -> Question:
        """The question where what a sentence describes is. box: the answer, where it is known, as of `ask_what`.

        ValueError for an empty sentence, and for what is no string.
        """
        check_sentence(sentence)
        answer = "" if box is None else format_box(as_lists(box), self.box_format, self.bins)
        return find_box(sentence.strip(), answer, region)

    def questions(self, sample, tasks: Sequence[str], shared: bool = False) -> list[Question]:
        """`granvit.questions.prompts.questions` with this processor's box style and format."""
        return questions(sample, tasks, self.box_style, self.box_format, self.bins, shared)

    def image_tokens(self, height: int, width: int) -> int:
        """How many `<image>` markers an image of height x width pixels takes; 0 x 0 is no image."""
        if height == width == 0:
            return 0
        rows, columns = token_grid(height, width, self.patch_size, self.max_image_tokens, self.pixel_shuffle)
        return rows * columns

    def image_part(self, count: int) -> list[int]:
        """Ids that open a sequence, and count `<image>` markers: bos, where the tokenizer has one, or all that the chat
        template writes before what a user says."""
        return [*self.turns.start, *[self.image_token_id] * count]

    def prompt_ids(self, prompts: Sequence[str], first: Sequence[bool] | None = None) -> list[list[int]]:
        """Ids of each prompt, from the image, or from the answer before, up to its answer: with what its turn is opened
        and closed by (`Turns`), and each `<region>` marker region_tokens times. Any other special token in it is plain
        text (see _spell_out). first: whether each opens a conversation; None: all do."""
        spelt = (_spell_out(prompt, self._special_in_prompts) for prompt in prompts)
        marked = [prompt.replace(REGION, REGION * self.region_tokens) for prompt in spelt]
        first = [True] * len(marked) if first is None else first
        return self._ids([self.turns.question(*question) for question in zip(marked, first, strict=True)])

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Ids of each answer, closed by eos or the chat template's end of turn, which stands nowhere else: a special
        token in it is plain text."""
        spelt = (_spell_out(answer, self._special_in_answers) for answer in answers)
        return [[*ids, self.turns.end] for ids in self._ids([self.turns.answer(answer) for answer in spelt])]

    def turn_ids(self, questions: Sequence[Question]) -> list[list[tuple[list[int], list[int]]]]:
        """For each question the ids of each of its turns: (prompt, answer)."""
        turns = [turn for question in questions for turn in question.turns]
        first = [number == 0 for question in questions for number in range(len(question.turns))]
        prompts = self.prompt_ids([prompt for prompt, _ in turns], first)
        ids = iter(zip(prompts, self.answer_ids([answer for _, answer in turns]), strict=True))
        return [list(islice(ids, len(question.turns))) for question in questions]

    def decode_answers(self, ids: torch.Tensor) -> list[str]:
        """What generate returned [B, L], as text: without the token that ended it, location tokens kept."""
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def parse_boxes(self, texts: Sequence[str]) -> list[Box | None]:
        """The first box of each answer, relative xyxy; None where it has none."""
        return [parse_box(text, self.box_format, self.bins) for text in texts]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def _pad_left(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, rows), default=0)
        ids = np.full((len(rows), width), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = row
            mask[i, width - len(row) :] = 1
        return torch.from_numpy(ids), torch.from_numpy(mask)

    @staticmethod
    def _image_index(given: Sequence[int] | None, rows: int, images: int) -> torch.Tensor:
        if given is None:
            if images not in (1, rows):
                raise ValueError(f"image_index: needed where {rows} questions are asked of {images} images")
            given = range(rows) if images == rows else [0] * rows
        index = torch.as_tensor(list(given), dtype=torch.int64)
        if len(index) != rows or (rows and not 0 <= int(index.min()) <= int(index.max()) < images):
            raise ValueError(
                f"image_index: got {index.tolist()}, accepted are {rows} indices of {images} images"
            )
        return index

    @staticmethod
    def _check_rows(prompts: list[str], boxes: Sequence[Sequence[Box]]) -> None:
        for i, (prompt, row) in enumerate(zip(prompts, boxes, strict=True)):
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"questions[{i}]: got {prompt!r}, accepted is a text that is not empty")
            if IMAGE in prompt:
                raise ValueError(f"questions[{i}]: {IMAGE} stands in the prompt; give the image by images")
            for j, box in enumerate(row):
                if not _is_box(box):
                    raise ValueError(f"boxes[{i}][{j}]: got {box!r}, accepted is relative xyxy, four numbers")
                fault = box_fault(box)
                if fault:
                    raise ValueError(f"boxes[{i}][{j}]: {tuple(box)} {fault}; accepted is relative xyxy")
            if prompt.count(REGION) != len(row):
                raise ValueError(
                    f"questions[{i}]: {prompt.count(REGION)} {REGION} markers, but {len(row)} boxes"
                )


def _is_box(box: Any) -> bool:
    return isinstance(box, list | tuple) and all(isinstance(v, int | float) for v in box)


def _any_of(tokens: set[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True))))


def _spell_out(text: str, special: re.Pattern) -> str:
    """The text with the brackets of every special token taken off ("<eos>" -> "eos"): captions are data, and no text
    from outside may end an answer or start a turn. Until none is left, for taking brackets off can leave another."""
    while special.search(text):
        text = special.sub(lambda match: match[0][1:-1], text)
    return text


def as_lists(boxes: Any) -> Any:
    """Nested lists of numbers, out of any nesting of sequences, arrays and tensors."""
    if hasattr(boxes, "tolist"):
        return boxes.tolist()
    return [as_lists(item) for item in boxes] if isinstance(boxes, Sequence) and not isinstance(boxes, str) else boxes


def nesting(boxes: Any) -> int:
    """How many lists are nested, an empty one counted as a row of no boxes."""
    return 1 + max(map(nesting, boxes), default=1) if isinstance(boxes, list) else 0
