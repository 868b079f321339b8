"""How many operations a training step needs, out of lengths alone; a multiplication and an addition are two.

A matrix of W weights that T tokens meet takes 2 W T operations forward, as many again for the gradient of its weights
if they are trained, and as many for the gradient of its input if something before it is trained: so a trained
transformer takes 6 a weight and token, a frozen one that hands gradients on 4, one without gradients 2 (Kaplan et al.
2020, arXiv 2001.08361, section 2.1; Chowdhery et al. 2022, arXiv 2204.02311, appendix B). Attention takes 4 a P forward
(scores, and their sum of values) and twice that backward, a = layers * heads * head size, and P the (query, key) pairs
that the mask lets through: not the square, half of which a causal mask throws away.

These are the operations that are useful. What is computed again (activation checkpointing), what is computed for
nothing (padding, masked pairs) and what is no product of matrices (norms, softmax, optimiser, resizing, RoIAlign: reads
and writes) is not among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from math import ceil, floor

from torch import nn
from transformers.pytorch_utils import Conv1D

from granvit.data.crops import Crop
from granvit.lora import adapters
from granvit.model import GranViT, GranViTProcessor
from granvit.model.config import cached_fit_grid
from granvit.questions.prompts import Question
from granvit.questions.schema import Sample
from granvit.train.parallel.compiling import blocks

PARTS = ("encoder", "teacher", "projector", "llm", "output")


@dataclass(frozen=True)
class Sizes:
    """What the operations of a model depend on: weights of its matrices, a of its attention, parameters of its groups.

    encoder_prefix: class and register tokens that stand before an image's patches in the encoder.
    cells, geometry: what embeds the places of image tokens and of boxes. region_logits: the region prompt's, of every
    patch; region_values: of its queries' means; region: its projector. (Its queries are folded into W_key once a step,
    which is not counted.) output: the LLM's output table; locations: the rows of location tokens. adapters: the
    LLM's (LoRA), counted apart from its own weights, which never learn under them.
    """

    patch: int
    encoder: int
    encoder_attention: int
    projector: int
    cells: int
    geometry: int
    region_logits: int
    region_values: int
    region: int
    region_attention: int
    llm: int
    llm_attention: int
    output: int
    locations: int
    parameters: dict[str, int]
    adapters: int = 0
    encoder_prefix: int = 0

    @classmethod
    def of(cls, model: GranViT) -> Sizes:
        """Counted off the modules, so that an LLM of any architecture is right but for its attention's width. The
        model may be on the meta device."""
        prompt, llm, vision = model.region_prompt, model.llm, model.encoder.config
        text = llm.config
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        added = sum(parameter.numel() for parameter in adapters(llm))
        encoder = sum(map(_weights, blocks(model.encoder)))
        parameters = {name: sum(p.numel() for p in group) for name, group in model.groups().items()}
        return cls(
            patch=_weights(model.encoder) - encoder,
            encoder=encoder,
            encoder_prefix=getattr(model.encoder, "leading", 0),
            encoder_attention=vision.num_hidden_layers * vision.hidden_size,
            projector=_weights(model.projector),
            cells=0 if model.cell_positions is None else _weights(model.cell_positions),
            geometry=_weights(prompt.geometry),
            region_logits=prompt.queries.shape[:2].numel() * vision.hidden_size,
            region_values=_weights(prompt.value),
            region=_weights(prompt.projector),
            # One product a pair and not two, but of each head with all channels: means of features, not of values.
            region_attention=prompt.queries.shape[1] * vision.hidden_size // 2,
            llm=_weights(llm.get_decoder()) - added,
            llm_attention=text.num_hidden_layers * text.num_attention_heads * head,
            output=llm.get_output_embeddings().weight.numel(),
            locations=model.locations.output.numel(),
            parameters=parameters | {"llm": sum(p.numel() for p in llm.parameters()) - added},
            adapters=added,
        )


def _weights(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d | Conv1D))


@dataclass(frozen=True)
class Asked:
    """A question's tokens with its answer's, how many of them are scored, the region tokens among them and the cells of
    the image that each of those attends to, and whether it asks about a region."""

    tokens: int
    answers: int
    prompts: int = 0
    cells: int = 0
    region: bool = True


@dataclass(frozen=True)
class Picture:
    """An image: its patches in the encoder, its tokens in the LLM, of which `head` are no image tokens (bos, a system
    part), its questions, and the patches of each crop that a teacher sees of it."""

    patches: int
    tokens: int
    asked: tuple[Asked, ...]
    crops: tuple[int, ...] = ()
    head: int = 1

    @property
    def length(self) -> int:
        return self.tokens + sum(question.tokens for question in self.asked)


@dataclass(frozen=True)
class Counts:
    """What meets the matrices in one step or more. *_pairs: (query, key) pairs of attention."""

    images: int = 0
    questions: int = 0
    regions: int = 0
    patches: int = 0
    patch_pairs: int = 0
    image_tokens: int = 0
    crops: int = 0
    crop_patches: int = 0
    crop_pairs: int = 0
    prompts: int = 0
    prompt_pairs: int = 0
    tokens: int = 0
    pairs: int = 0
    answers: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def pictures_of(
    samples: Sequence[Sample],
    asked: Sequence[Sequence[Question]],
    processor: GranViTProcessor,
    crops: Sequence[Crop] = (),
) -> list[Picture]:
    """Samples with their questions, as `pack_questions` takes them; of their images only the sizes are looked at.
    crops: what a teacher sees of them."""
    flat = [question for questions in asked for question in questions]
    prompts = iter(processor.prompt_ids([question.prompt for question in flat]))
    answers = iter(processor.answer_ids([question.answer for question in flat]))
    seen: list[list[int]] = [[] for _ in samples]
    for crop in crops:
        seen[crop.image].append(crop.patches)
    pictures = []
    for sample, questions, patches in zip(samples, asked, seen, strict=True):
        height, width = sample.image.shape[:2]
        rows, columns = cached_fit_grid(height, width, processor.patch_size, processor.max_image_tokens)
        tokens, head = processor.image_tokens(height, width), len(processor.image_part(0))
        each = []
        for question in questions:
            answer = len(next(answers))
            each.append(
                Asked(
                    len(next(prompts)) + answer,
                    answer,
                    len(question.boxes) * processor.region_tokens,
                    sum(_cells(box, rows, columns) for box in question.boxes),
                    question.region is not None,
                )
            )
        pictures.append(Picture(rows * columns, tokens + head, tuple(each), tuple(patches), head))
    return pictures


def _cells(box: Sequence[float], rows: int, columns: int) -> int:
    x1, y1, x2, y2 = box
    return (ceil(x2 * columns) - floor(x1 * columns)) * (ceil(y2 * rows) - floor(y1 * rows))


def count(pictures: Iterable[Picture]) -> Counts:
    """Of images with their questions packed behind them, and nothing for padding. A question sees its image and
    itself."""
    total = Counts()
    for picture in pictures:
        total += Counts(
            images=1,
            questions=len(picture.asked),
            regions=sum(asked.region for asked in picture.asked),
            patches=picture.patches,
            patch_pairs=picture.patches**2,
            image_tokens=picture.tokens - picture.head,
            crops=len(picture.crops),
            crop_patches=sum(picture.crops),
            crop_pairs=sum(patches**2 for patches in picture.crops),
            prompts=sum(asked.prompts for asked in picture.asked),
            prompt_pairs=sum(asked.prompts * asked.cells for asked in picture.asked),
            tokens=picture.length,
            pairs=_causal(picture.tokens) + sum(a.tokens * picture.tokens + _causal(a.tokens) for a in picture.asked),
            answers=sum(asked.answers for asked in picture.asked),
        )
    return total


def _causal(length: int) -> int:
    return length * (length + 1) // 2


def one_question_each(pictures: Iterable[Picture]) -> list[Picture]:
    """The other recipe's samples: each question with its image again. Each crop is still seen once, by the question
    that asks about its region (by the first, where none does)."""
    samples = []
    for picture in pictures:
        asked_about = sum(asked.region for asked in picture.asked)
        seen, rest = iter(picture.crops[:asked_about]), picture.crops[asked_about:]
        for number, asked in enumerate(picture.asked):
            crops = tuple(islice(seen, int(asked.region))) + (rest if number == 0 else ())
            samples.append(replace(picture, asked=(asked,), crops=crops))
    return samples


def padded(batch: Sequence[Picture]) -> Counts:
    """One question a sample in one batch, every sample as long as the longest, in the encoder and in the LLM."""
    useful, samples = count(batch), len(batch)
    patches = max(picture.patches for picture in batch)
    length = max(picture.length for picture in batch)
    return replace(
        useful,
        patches=samples * patches,
        patch_pairs=samples * patches**2,
        image_tokens=samples * max(picture.tokens - picture.head for picture in batch),
        tokens=samples * length,
        pairs=samples * _causal(length),
    )


def packed(rows: Sequence[Sequence[Picture]]) -> Counts:
    """Images packed into sequences, each as long as the longest; what fills the others up attends to itself."""
    useful = count(picture for row in rows for picture in row)
    filled = len(rows) * max(sum(picture.length for picture in row) for row in rows)
    return replace(useful, tokens=filled, pairs=useful.pairs + filled - useful.tokens)


@dataclass(frozen=True)
class Operations:
    """Of the parts of a step; `total` of all."""

    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def share(self, part: str) -> float:
        return self.parts[part] / self.total


def operations(sizes: Sizes, counts: Counts, train: Iterable[str]) -> Operations:
    """Of a step in which the groups `train` ("encoder", "projector", "llm") learn, by PARTS. The region prompt and
    location rows belong to the projector's group, and the region prompt is counted there."""
    trains = set(train)
    encoder, projector, llm = (name in trains for name in ("encoder", "projector", "llm"))
    into_llm = encoder or projector or llm  # the embedding table comes before the LLM's layers
    whole_llm = llm and not sizes.adapters

    def matrices(weights: int, tokens: int, trained: bool, carries: bool) -> int:
        return 2 * weights * tokens * (1 + trained + carries)

    def attention(a: int, pairs: int, gradient: bool) -> int:
        return 4 * a * pairs * (3 if gradient else 1)

    def encoded(images: int, patches: int, pairs: int, learns: bool) -> int:
        more = sizes.encoder_prefix
        return (
            matrices(sizes.patch, patches, learns, False)
            + matrices(sizes.encoder, patches + more * images, learns, learns)
            + attention(sizes.encoder_attention, pairs + more * (2 * patches + more * images), learns)
        )

    ours = encoder or projector  # gradients inside the projectors
    return Operations(
        {
            "encoder": encoded(counts.images, counts.patches, counts.patch_pairs, encoder),
            "teacher": encoded(counts.crops, counts.crop_patches, counts.crop_pairs, False),
            "projector": matrices(sizes.projector, counts.image_tokens, projector, ours)
            + matrices(sizes.cells, counts.image_tokens, projector, False)
            + matrices(sizes.geometry, counts.prompts, projector, False)
            + (matrices(sizes.region_logits, counts.patches, projector, encoder) if counts.prompts else 0)
            + matrices(sizes.region_values, counts.prompts, projector, ours)
            + matrices(sizes.region, counts.prompts, projector, ours)
            + attention(sizes.region_attention, counts.prompt_pairs, ours),
            "llm": matrices(sizes.llm, counts.tokens, whole_llm, into_llm)
            + matrices(sizes.adapters, counts.tokens, llm, into_llm)
            + attention(sizes.llm_attention, counts.pairs, into_llm),
            "output": matrices(sizes.output, counts.answers, whole_llm, into_llm)
            + matrices(sizes.locations, counts.answers, projector, into_llm),
        }
    )
