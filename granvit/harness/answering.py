"""Answers to many benchmark questions: in batches, each picture encoded once for the questions that stand together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from granvit.eval.evaluation import MAX_NEW_TOKENS
from granvit.eval.loading import load_model
from granvit.machine import default_device
from granvit.model import GranViT, GranViTProcessor, asking
from granvit.questions.prompts import CAPTION2BBOX

from .wording import Wording, cut, write_answer


@dataclass(frozen=True)
class Asked:
    """A question, the key of its picture (None: it has none), and what the benchmark says of its answer."""

    wording: Wording
    picture: Hashable | None
    until: Sequence[str] = ()
    max_new_tokens: int = MAX_NEW_TOKENS

    @property
    def batch(self) -> tuple[bool, str, int]:
        """Questions that differ in this are not answered together. A box ends where its written form does, whatever
        number of tokens the benchmark grants."""
        task = self.wording.question.task
        return self.picture is None, task, MAX_NEW_TOKENS if task == CAPTION2BBOX else self.max_new_tokens


class Pictures(Mapping[Hashable, torch.Tensor]):
    """Pictures by a digest of their pixels, read again whenever they are asked for: a benchmark's would fill memory."""

    def __init__(self) -> None:
        self._read: dict[Hashable, Callable[[], Image.Image]] = {}

    def add(self, picture: Image.Image, read: Callable[[], Image.Image]) -> Hashable:
        """The key of a picture that `read` gives again; equal pictures share one."""
        pixels = _pixels(picture)
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=16)
        digest.update(repr(pixels.shape).encode())
        key = digest.digest()
        self._read.setdefault(key, read)
        return key

    def __getitem__(self, key: Hashable) -> torch.Tensor:
        return torch.from_numpy(_pixels(self._read[key]()))

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def load(pretrained: str, device: str | None, precision: str | None) -> tuple[GranViT, GranViTProcessor]:
    """`load_model`. device: None: "cuda" where there is one, else "cpu"."""
    return load_model(str(pretrained), device or default_device(), precision)


def answer(
    model: GranViT,
    processor: GranViTProcessor,
    asked: Sequence[Asked],
    pictures: Mapping[Hashable, torch.Tensor],
    batch_size: int,
    progress: Callable[[int], Any] = lambda number: None,
) -> list[str]:
    """The answers, in the order of the questions and in the form that each one's benchmark reads, greedily decoded.
    progress: called after each batch with the number of its answers."""
    place = {key: number for number, key in enumerate(dict.fromkeys(question.picture for question in asked))}
    order = sorted(range(len(asked)), key=lambda i: (asked[i].batch, place[asked[i].picture]))
    answers = [""] * len(asked)
    for batch in dict.fromkeys(asked[i].batch for i in order):
        members = [i for i in order if asked[i].batch == batch]
        without_picture, _, length = batch
        before = 0

        def tell(now: int, total: int) -> None:
            nonlocal before
            progress(now - before)
            before = now

        texts = asking.answer(
            model,
            processor,
            [asked[i].wording.question for i in members],
            [asked[i].picture for i in members],
            None if without_picture else pictures,
            batch_size,
            length,
            tell,
        )
        for i, text in zip(members, texts, strict=True):
            answers[i] = write_answer(cut(text, asked[i].until), asked[i].wording.form, processor)
    return answers


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]: as the benchmark shows it, which has turned it upright already if need be."""
    return np.array(image.convert("RGB"))
