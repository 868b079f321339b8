"""How much of the assistant's part of conversations a model foresees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch

from granvit.data.lengths import image_length
from granvit.data.loader import GranDataset, spread
from granvit.eval.evaluation import SINGLE_PROCESS, eval_mode, other_images, picture, readable
from granvit.questions.packing import pack_questions
from granvit.questions.prompts import CHAT
from granvit.world import World
from granvit_kernels import plan_packing


@torch.no_grad()
def score_chat(
    model: Any,
    processor: Any,
    dataset: GranDataset,
    capacity: int,
    blind: Literal["other_image"] | None = None,
    limit: int | None = None,
    world: World = SINGLE_PROCESS,
) -> dict[str, float]:
    """{"chat_token_accuracy"}: the share of the answers' tokens (eos too) that the model thinks likeliest, each given
    the conversation before it, over at most `limit` rows of `dataset`.

    {} where no row has a conversation of at most `capacity` tokens with its image. blind: "other_image" shows another
    image of the dataset with every conversation that has one (`other_images`); {} where there is no other. world: the
    processes that share the conversations; all call this, and each opens the images of its own. The model is put back
    into training mode if it was. Raises what `readable` raises; what fails on one rank is raised on all.
    """
    rows = readable(dataset, spread(len(dataset), limit), world)
    texts = {row: sample for row in rows if (sample := dataset.annotations(row)).conversations}
    pictured = {row: sample.source for row, sample in texts.items() if sample.image.numel()}
    if blind == "other_image" and len(pictured) < 2:
        return {}
    shown = other_images(pictured) if blind == "other_image" else {}
    asked = [
        (shown.get(row, row), sample, question)
        for row, sample in texts.items()
        for question in processor.questions(sample, [CHAT])
    ][world.rank :: world.ranks]
    turns = processor.turn_ids([question for *_, question in asked])
    lengths = [
        image_length(texts[row], processor) + sum(len(prompt) + len(answer) for prompt, answer in turn)
        for (row, *_), turn in zip(asked, turns, strict=True)
    ]
    fitting = [i for i, length in enumerate(lengths) if length <= capacity]

    def score() -> tuple[int, int]:
        right = number = 0
        for members in plan_packing([lengths[i] for i in fitting], capacity):
            rows, samples, questions = zip(*(asked[fitting[i]] for i in members), strict=True)
            samples = [replace(sample, image=picture(dataset, row)) for row, sample in zip(rows, samples, strict=True)]
            packed = pack_questions(samples, [[question] for question in questions], processor, capacity)
            batch = packed.to(model.device)
            right += int((model.forward_packed(batch).logits.argmax(-1) == batch.targets).sum())
            number += len(batch.targets)
        return right, number

    with eval_mode(model):
        right, number = map(sum, zip(*world.each(score), strict=True))
    return {"chat_token_accuracy": right / number} if number else {}
