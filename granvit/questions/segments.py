"""What packed attention is made of, found once on the host with each batch.

In the flattened [B * L] tokens of a batch every image part, every question and every piece of padding is a segment of
its own: a run of neighbours within which attention is causal. A question's tokens attend to their image's part too,
all of it. So attention is two block-sparse calls, over segments and from questions to image parts, instead of one over
L x L (granvit.model.question_attention).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

PADDING = 128
"""Most tokens in a segment of padding. Padding attends to itself, so that nothing need be gathered around it; short
segments keep that linear."""


@dataclass
class Segments:
    """Where the segments of T = B * L tokens lie; I images have both an image part and a question.

    cu_segments: int32 [S + 1], segment s owns the tokens cu_segments[s]:cu_segments[s + 1].
    question_tokens: int64 [Q], the question tokens of those I images, and image_tokens: int64 [P], the tokens of their
        image parts, image by image, each ascending; cu_questions, cu_images: int32 [I + 1], each image's share of them.
    max_segment, max_questions, max_image: the largest shares (0 where there are none).
    """

    cu_segments: Tensor
    cu_questions: Tensor
    cu_images: Tensor
    question_tokens: Tensor
    image_tokens: Tensor
    max_segment: int
    max_questions: int
    max_image: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Segments:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Segments:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(v) for name, v in values.items() if isinstance(v, Tensor)})


@dataclass
class Spans:
    """The same on the host, a row a segment, int64 [S]: start and length in tokens, image (-1: padding) and question
    (0: image part), and part, the number of the image part that its tokens attend to besides themselves, -1 if none."""

    start: np.ndarray
    length: np.ndarray
    image: np.ndarray
    question: np.ndarray
    part: np.ndarray


def find_spans(image_index: np.ndarray, question_index: np.ndarray) -> Spans:
    """Spans of a batch's image_index and question_index [B, L] (see PackedBatch)."""
    image, question = image_index.ravel(), question_index.ravel()
    place = np.arange(image.size) % max(1, image_index.shape[1])
    first = place == 0
    first |= (image < 0) & (place % PADDING == 0)
    first[1:] |= (np.diff(image) != 0) | (np.diff(question) != 0)
    start = np.flatnonzero(first)
    image, question = image[start], question[start]
    part_of = np.full(image.max(initial=-1) + 2, -1)
    heads = np.flatnonzero((image >= 0) & (question == 0))
    part_of[image[heads]] = heads
    part = np.where((image >= 0) & (question > 0), part_of[image], -1)
    return Spans(start, np.diff(start, append=first.size), image, question, part)


def find_segments(image_index: np.ndarray, question_index: np.ndarray) -> Segments:
    """Segments of a batch's image_index and question_index [B, L] (see PackedBatch), on the host."""
    spans = find_spans(image_index, question_index)
    asked = np.flatnonzero(spans.part >= 0)
    parts = np.unique(spans.part[asked])
    questions = np.bincount(spans.part[asked], spans.length[asked], len(spans.start))[parts].astype(np.int64)
    images = spans.length[parts]
    return Segments(
        cu_segments=_offsets(spans.length),
        cu_questions=_offsets(questions),
        cu_images=_offsets(images),
        question_tokens=torch.from_numpy(_tokens(spans, asked)),
        image_tokens=torch.from_numpy(_tokens(spans, parts)),
        max_segment=int(spans.length.max(initial=0)),
        max_questions=int(questions.max(initial=0)),
        max_image=int(images.max(initial=0)),
    )


def attended_pairs(image_tokens: int, question_lengths: Sequence[int]) -> int:
    """Pairs (i, j) of tokens for which i attends to j: one image part of `image_tokens` with its questions.

    What attention is good for; padding, other images and the half above the diagonal are not in it. With H query heads
    of D channels a layer's two products, q.k and p.v, take 4 * H * D FLOPs a pair forward, and the four of their
    gradients twice that backward: 12 * H * D * attended_pairs in all. (A flash backward computes q.k once more, which
    counts for utilisation of the hardware, not of the model.)
    """
    own = sum(length * (length + 1) // 2 for length in (image_tokens, *question_lengths))
    return own + image_tokens * sum(question_lengths)


def _tokens(spans: Spans, which: np.ndarray) -> np.ndarray:
    """The tokens int64 of the given spans, one after the other."""
    lengths = spans.length[which]
    begins = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(spans.start[which] - begins, lengths)


def _offsets(lengths: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))
