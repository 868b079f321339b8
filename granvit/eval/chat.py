"""How much of the assistant's part of conversations a model foresees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch

from granvit.data.lengths import image_length
from granvit.data.loader import GranDataset, spread
from granvit.eval.evaluation import other_images
from granvit.questions.packing import pack_questions
from granvit.questions.prompts import CHAT
from granvit_kernels import plan_packing


@torch.no_grad()
def score_chat(
    model: Any,
    processor: Any,
    dataset: GranDataset,
    capacity: int,
    blind: Literal["other_image"] | None = None,
    limit: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    total: Callable[..., list[float]] = lambda *numbers: list(numbers),
) -> dict[str, float]:
    """{"chat_token_accuracy"}: the share of the answers' tokens (eos too) that the model thinks likeliest, each given
    the conversation before it, over at most `limit` rows of `dataset`.

    {} where no row has a conversation of at most `capacity` tokens with its image. blind: "other_image" shows another
    image of the dataset with every conversation that has one (`other_images`); {} where there is no other. rank,
    ranks, total: processes that share the conversations; total sums numbers over them. The model is put back into
    training mode if it was.
    """
    rows = spread(len(dataset), limit)
    conversing = {row: sample for row in rows if (sample := dataset[row]) is not None and sample.conversations}
    pictured = {row: sample for row, sample in conversing.items() if sample.image.numel()}
    if blind == "other_image" and len(pictured) < 2:
        return {}
    shown = dict(conversing)
    if blind == "other_image":
        others = other_images({row: sample.source for row, sample in pictured.items()})
        shown |= {row: pictured[other] for row, other in others.items()}
    pairs = [
        (replace(sample, image=shown[row].image), question)
        for row, sample in conversing.items()
        for question in processor.questions(sample, [CHAT])
    ][rank::ranks]
    lengths = [
        image_length(sample, processor)
        + sum(len(prompt) + len(answer) for prompt, answer in turns)
        for (sample, _), turns in zip(pairs, processor.turn_ids([question for _, question in pairs]), strict=True)
    ]
    fitting = [i for i, length in enumerate(lengths) if length <= capacity]
    training = model.training
    model.eval()
    right = number = 0
    for members in plan_packing([lengths[i] for i in fitting], capacity):
        samples, questions = zip(*(pairs[fitting[i]] for i in members), strict=True)
        batch = pack_questions(samples, [[question] for question in questions], processor, capacity).to(model.device)
        right += int((model.forward_packed(batch).logits.argmax(-1) == batch.targets).sum())
        number += len(batch.targets)
    model.train(training)
    right, number = total(right, number)
    return {"chat_token_accuracy": right / number} if number else {}
