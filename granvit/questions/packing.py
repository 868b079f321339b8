"""Question packing: each image once, then all of its questions, several images in one sequence.

    a row:          [bos] <image> ... <image> | \\n question \\n answer eos | \\n question \\n answer eos |
        next image
    image_index:    0 ...                     | 0 ...                     | 0 ...                     | 1 ...
    question_index: 0 ...                     | 1 ...                     | 2 ...                     | 0 ...
    position_ids:   0 ...                   n | n+1 ...                   | n+1 ...                   | 0 ...

Token i attends to token j where j <= i, both belong to one image, and j belongs to the image part or to i's
question. So each question sees its image and itself, as if it were asked alone, and the image's tokens are
there once. A conversation is one question whose further turns go on where its first one ends: all of its answers are
scored, and each turn sees those before it.

With an LLM's chat template (granvit.questions.turns) the image part is what the template writes before the first thing
that a user says, and the image; a question begins behind the image, and its answer ends with the end of a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from granvit_kernels import plan_packing

from .prompts import REGION, Question
from .segments import Segments, find_segments

if TYPE_CHECKING:
    from .schema import Sample

IGNORE = -100  # cross entropy's own default: no label here


class Writer(Protocol):
    """What packing asks of a GranViTProcessor: ids of what stands in a sequence."""

    image_token_id: int
    region_token_id: int
    tokenizer: Any

    def image_tokens(self, height: int, width: int) -> int:
        """Number of tokens that an image of this size takes."""

    def image_part(self, count: int) -> list[int]:
        """Ids of the image part of a sequence, for an image of `count` tokens."""

    def turn_ids(self, questions: Sequence[Question]) -> list[list[tuple[list[int], list[int]]]]:
        """For each question its turns, each the ids of the prompt and of the answer."""


@dataclass
class PackedBatch:
    """Images and their questions in B sequences of L tokens.

    images: list of uint8 [H, W, 3], of the samples that have one, in their order.
    input_ids, position_ids, labels: int64 [B, L]; labels are -100 off the answers (and their eos).
    image_index: int64 [B, L], the sample's number, -1 for padding. One without an image has an image part without image
        tokens, empty where the tokenizer has no bos.
    question_index: int64 [B, L], 0 in an image part, 1.. the image's questions, 0 for padding.
    boxes: float32 [R, 4], relative xyxy, and box_image_index: int64 [R], index into images: the asked boxes with region
        tokens.
    image_slots: int64 [N], where in the flattened [B * L] the image tokens stand, in images' order;
    region_slots: int64 [R * K], the same for region tokens, in boxes' order;
    answer_slots: int64 [A], the places whose next token is an answer's, so whose hidden states are scored,
        sample by sample and question by question; targets: int64 [A], those next tokens. (All are known on
        the host here: reading them off the ids would make a GPU wait.)
    segments: where image parts and questions lie, for attention without the mask that `attention` gives.
    regions: number of questions about a region.
    """

    images: list[torch.Tensor]
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    image_index: torch.Tensor
    question_index: torch.Tensor
    boxes: torch.Tensor
    box_image_index: torch.Tensor
    image_slots: torch.Tensor
    region_slots: torch.Tensor
    answer_slots: torch.Tensor
    targets: torch.Tensor
    segments: Segments
    regions: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch with its images and tensors on a device."""
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The batch in pinned memory, of which copies to a GPU can be waited for by nobody."""
        return self._each(lambda value: value.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> PackedBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: change(v) for name, v in values.items() if isinstance(v, torch.Tensor | Segments)}
        return replace(self, images=[change(image) for image in self.images], **changed)

    def attention(self) -> torch.Tensor:
        """bool [B, 1, L, L]: whether the row's token may attend to the column's. Padding attends to itself,
        so that no row of the softmax is empty."""
        image, question = self.image_index, self.question_index
        length = image.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=image.device).tril_()
        own_question = (question[:, None, :] == 0) | (question[:, :, None] == question[:, None, :])
        same_image = (image[:, :, None] == image[:, None, :]) & (image >= 0)[:, None, :]
        allowed = causal & own_question & same_image
        return (allowed | torch.eye(length, dtype=torch.bool, device=image.device))[:, None]


def pack_questions(
    samples: Sequence[Sample],
    questions: Sequence[Sequence[Question]],
    processor: Writer,
    capacity: int,
    plan: Sequence[Sequence[int]] | None = None,
) -> PackedBatch:
    """Pack samples and their questions into sequences of at most `capacity` tokens.

    An image and all of its questions stay together in one sequence; sequences are filled by plan_packing, or hold the
    samples that `plan` lists for each, which may be none.
    Attention is linear in the capacity (granvit.model.question_attention) but where the dense mask is taken.

    Args:
        samples: what the questions are about; only their images, [H, W, 3] uint8, and ids are used.
        questions: for each sample its questions, in order.
        processor: writes the ids; its configuration must be the model's.
        capacity: most tokens in a sequence.
    Raises:
        ValueError: lists of different lengths, a prompt whose markers and boxes differ in number, an empty
            answer, or an image that with its questions takes more than `capacity` tokens (named by its id).
    """
    if len(samples) != len(questions):
        raise ValueError(f"questions: got {len(questions)} lists for {len(samples)} samples")
    return pack_parts(samples, questions, write_parts(samples, questions, processor), processor, capacity, plan)


def pack_parts(
    samples: Sequence[Sample],
    questions: Sequence[Sequence[Question]],
    parts: Sequence[Part],
    processor: Writer,
    capacity: int,
    plan: Sequence[Sequence[int]] | None = None,
) -> PackedBatch:
    """What `pack_questions` does once the parts are written (`write_parts`), which takes most of its time."""
    lengths = [len(part.ids) for part in parts]
    for sample, length, asked in zip(samples, lengths, questions, strict=True):
        if length > capacity:
            raise ValueError(
                f"capacity: sample {sample.id!r} with its {len(asked)} questions takes {length} tokens, "
                f"but a sequence takes {capacity}; ask fewer questions of it or raise the capacity"
            )
    if plan is None:
        plan = plan_packing(lengths, capacity)
    # At least one token, of padding: a batch may have lost all of its images, and models take no empty sequences.
    rows, width = len(plan), max([min(len(plan), 1), *(sum(lengths[i] for i in row) for row in plan)])
    ids = np.full((rows, width), processor.tokenizer.pad_token_id, dtype=np.int64)
    positions, question_index = np.zeros_like(ids), np.zeros_like(ids)
    labels, image_index = np.full_like(ids, IGNORE), np.full_like(ids, -1)
    starts = np.zeros(len(parts), dtype=np.int64)
    for r, row in enumerate(plan):
        place = 0
        for i in row:
            part, here = parts[i], slice(place, place + lengths[i])
            ids[r, here], positions[r, here], labels[r, here] = part.ids, part.positions, part.labels
            question_index[r, here], image_index[r, here] = part.question_index, i
            starts[i] = r * width + place
            place += lengths[i]
    scored = _slots([part.labels != IGNORE for part in parts], starts)
    boxes = [box for asked in questions for question in asked for box in question.boxes]
    pictured = [sample.image.numel() > 0 for sample in samples]
    number = np.cumsum(pictured) - 1
    owners = [number[i] for i, asked in enumerate(questions) for question in asked for _ in question.boxes]
    tensors = {
        "input_ids": ids,
        "position_ids": positions,
        "labels": labels,
        "image_index": image_index,
        "question_index": question_index,
        "boxes": np.array(boxes, dtype=np.float32).reshape(-1, 4),
        "box_image_index": np.array(owners, dtype=np.int64),
        "image_slots": _slots([part.ids == processor.image_token_id for part in parts], starts),
        "region_slots": _slots([part.ids == processor.region_token_id for part in parts], starts),
        "answer_slots": scored - 1,
        "targets": labels.ravel()[scored],
    }
    return PackedBatch(
        images=[sample.image for sample, has in zip(samples, pictured, strict=True) if has],
        segments=find_segments(image_index, question_index),
        regions=sum(question.region is not None for asked in questions for question in asked),
        **{name: torch.from_numpy(value) for name, value in tensors.items()},
    )


@dataclass
class Part:
    """One image with its questions; all arrays int64 [length]."""

    ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    question_index: np.ndarray


def write_parts(
    samples: Sequence[Sample], questions: Sequence[Sequence[Question]], processor: Writer
) -> list[Part]:
    """The parts of a batch, tokenised. Raises ValueError as `pack_questions` does, but for capacity."""
    flat = [question for asked in questions for question in asked]
    for question in flat:
        for prompt, answer in question.turns:
            if not answer.strip():
                raise ValueError(f"questions: the answer to {prompt!r} is empty")
        markers = sum(prompt.count(REGION) for prompt, _ in question.turns)
        if markers != len(question.boxes):
            raise ValueError(
                f"questions: {question.prompt!r} has {markers} {REGION} markers, but {len(question.boxes)} boxes"
            )
    written = iter(processor.turn_ids(flat))
    parts = []
    for sample, asked in zip(samples, questions, strict=True):
        head = processor.image_part(processor.image_tokens(*sample.image.shape[:2]))
        ids, labels, lengths = list(head), [IGNORE] * len(head), []
        for turns in islice(written, len(asked)):
            for prompt, answer in turns:
                ids += prompt + answer
                labels += [IGNORE] * len(prompt) + answer
            lengths.append(sum(len(prompt) + len(answer) for prompt, answer in turns))
        numbers = np.repeat(np.arange(len(lengths) + 1), [len(head), *lengths])
        # Position of a token: its place, less the lengths of the questions between the image and its own.
        skipped = np.repeat(np.cumsum([0, 0, *lengths[:-1]])[: len(lengths) + 1], [len(head), *lengths])
        parts.append(Part(np.array(ids), np.arange(len(ids)) - skipped, np.array(labels), numbers))
    return parts


def _slots(marked: list[np.ndarray], starts: np.ndarray) -> np.ndarray:
    """Where the marked tokens of each part stand in the flattened batch, part by part."""
    slots = [np.flatnonzero(mask) + start for mask, start in zip(marked, starts, strict=True)]
    return np.concatenate(slots) if slots else np.zeros(0, dtype=np.int64)
