"""What a GranViT is asked in plain Python: pictures and boxes in, texts and boxes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from granvit.questions.prompts import CAPTION2BBOX, Question
from granvit_kernels import PackedLayout

from .images import is_single, read_images
from .processing import GranViTProcessor, as_lists, nesting

MAX_NEW_TOKENS = 64


class Asking:
    """The part of GranViT that answers questions by itself, with the processor that belongs to it."""

    _processor: GranViTProcessor | None = None
    _source: tuple[str, dict[str, Any]] | None = None  # what from_pretrained was given: name or folder, hub arguments

    @property
    def processor(self) -> GranViTProcessor:
        """The processor that writes this model's prompts and reads its answers.

        `from_parts` made it; of a model of `from_pretrained` it is read from the same place when first needed. Another
        can be set. ValueError where there is none, and where it is another model's (`check_config`).
        """
        if self._processor is None:
            if self._source is None:
                raise ValueError(
                    "this model has no processor, because it came neither of from_pretrained nor of from_parts; set "
                    "model.processor = GranViTProcessor.from_config(model.config, tokenizer)"
                )
            name, hub = self._source
            try:
                self.processor = GranViTProcessor.from_pretrained(name, **hub)
            except (OSError, ValueError, TypeError) as error:
                raise ValueError(
                    f"{name} holds no processor of this model (processor.save_pretrained writes one): {error}"
                ) from error
        return self._processor

    @processor.setter
    def processor(self, value: GranViTProcessor) -> None:
        value.check_config(self.config)
        self._processor = value

    def caption(self, images: Any, boxes: Any, batch_size: int = 64) -> list[str] | list[list[str]]:
        """What is in each box, in the model's words.

        Args:
            images: a picture (PIL, uint8 array or tensor [H, W, 3], or a path), or a list of them.
            boxes: the picture's boxes [R, 4], a list, array or tensor: x1, y1, x2, y2 as shares of its width and
                height, in [0, 1], origin top left. For a list of pictures, a list of boxes for each.
            batch_size: boxes at a time.
        Returns:
            A string a box; for a list of pictures, such a list for each.
        Raises:
            ValueError: a picture that can't be read; a box in pixels, outside its picture or of no area.

        >>> model.caption("photo.jpg", [(0.1, 0.2, 0.6, 0.9), (0.5, 0.0, 1.0, 0.4)])
        ['a striped red ball', 'a window']
        """
        single, pictures, boxes = is_single(images), read_images(images), as_lists(boxes)
        if single and nesting(boxes) == 1:  # a box by itself
            boxes = [boxes]
        asked = [[self.processor.ask_what(box) for box in row] for row in _rows("boxes", single, pictures, boxes)]
        answers = self._answers(pictures, asked, batch_size)
        return answers[0] if single else answers

    def find(self, images: Any, sentences: Any, batch_size: int = 64) -> Any:
        """Where what each sentence describes is.

        Args:
            images: a picture (PIL, uint8 array or tensor [H, W, 3], or a path), or a list of them.
            sentences: a sentence or a list of them; for a list of pictures, a list of sentences for each.
            batch_size: sentences at a time.
        Returns:
            The box of each sentence, (x1, y1, x2, y2) as shares of the picture's width and height, or None where the
            model's answer holds no box; nested as the sentences are.
        Raises:
            ValueError: a picture that can't be read, an empty sentence, a sentence that is no string.

        >>> model.find("photo.jpg", ["a striped red ball", "a window"])
        [(0.123, 0.204, 0.598, 0.911), None]
        """
        if isinstance(sentences, str):
            return self.find(images, [sentences], batch_size)[0]
        single, pictures = is_single(images), read_images(images)
        rows = _rows("sentences", single, pictures, sentences)
        asked = [[self.processor.ask_where(sentence) for sentence in row] for row in rows]
        boxes = [self.processor.parse_boxes(texts) for texts in self._answers(pictures, asked, batch_size)]
        return boxes[0] if single else boxes

    def _answers(
        self, pictures: list[torch.Tensor], asked: list[list[Question]], batch_size: int
    ) -> list[list[str]]:
        rows = [i for i, questions in enumerate(asked) for _ in questions]
        flat = [question for questions in asked for question in questions]
        texts = iter(answer(self, self.processor, flat, rows, dict(enumerate(pictures)), batch_size))
        return [[next(texts) for _ in questions] for questions in asked]


@torch.no_grad()
def answer(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    rows: Sequence[int],
    images: Mapping[int, torch.Tensor] | None,
    batch_size: int = 64,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The model's answer to each question, greedily decoded. rows: for each question the key of its image in `images`
    (uint8 [H, W, 3]); images=None: the question's text alone. An image is read and encoded once, when it is first asked
    about, and its features are kept until it is last. Questions whose answers are of about one length should stand
    together: a batch takes as long as its longest, and holds questions of one task. A caption2bbox question's own
    answer, where it has one, says how long boxes are. progress: called after each batch with the number of answers that
    there are, and of how many.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, accepted is 1 or more")
    encoded = None if images is None else _Encoded(model, images, rows)
    answers: list[str] = []
    while (first := len(answers)) < len(questions):
        batch = questions[first : first + batch_size]
        batch = batch[: next((i for i, question in enumerate(batch) if question.task != batch[0].task), None)]
        sizes, index, features = (None,) * 3 if encoded is None else encoded.take(rows[first : first + len(batch)])
        inputs = processor(questions=batch, image_sizes=sizes, image_index=index).to(model.device)
        if batch[0].task == CAPTION2BBOX and model.config.parallel_boxes:
            out = model.generate_boxes(**inputs, features=features)
        else:
            length = max_new_tokens
            if all(question.task == CAPTION2BBOX and question.answer for question in batch):
                length = 4 + max(map(len, processor.answer_ids([question.answer for question in batch])))
            out = model.generate(**inputs, features=features, max_new_tokens=length, do_sample=False)
        answers += processor.decode_answers(out)
        if progress:
            progress(len(answers), len(questions))
    return answers


class _Encoded:
    """Images that questions are asked of, each encoded when it is first asked about and forgotten when it was last.

    rows: the key in `images` of every question that there will be.
    """

    def __init__(self, model: Any, images: Mapping[Any, torch.Tensor], rows: Sequence[Any]) -> None:
        self._model, self._images, self._left = model, images, Counter(rows)
        self._kept: dict[Any, tuple[tuple[int, int], torch.Tensor]] = {}  # size in pixels, features [h, w, C]

    def take(self, rows: Sequence[Any]) -> tuple[list[tuple[int, int]], list[int], tuple[torch.Tensor, PackedLayout]]:
        """What the next questions are about: the sizes (height, width) of the distinct images among `rows`, each row's
        place among them, and their features [T, C] with their layout."""
        distinct = list(dict.fromkeys(rows))
        if new := [row for row in distinct if row not in self._kept]:
            images = [self._images[row] for row in new]
            features, layout = self._model.encode(images)
            sizes = [tuple(image.shape[:2]) for image in images]
            self._kept |= zip(new, zip(sizes, layout.split(features), strict=True), strict=True)
        sizes, grids = zip(*(self._kept[row] for row in distinct), strict=True)
        self._left.subtract(rows)
        for row in distinct:
            if not self._left[row]:
                del self._kept[row]
        layout = PackedLayout.from_grids([grid.shape[:2] for grid in grids], device=grids[0].device)
        return list(sizes), [distinct.index(row) for row in rows], (torch.cat([g.flatten(0, 1) for g in grids]), layout)


def _rows(name: str, single: bool, pictures: list[torch.Tensor], values: Any) -> list[list[Any]]:
    """What is asked of each picture, a list for each. single: `values` is the only picture's list."""
    rows = [values] if single else values
    if not isinstance(rows, list | tuple) or not all(isinstance(row, list | tuple) for row in rows):
        raise ValueError(f"{name}: got {values!r:.60}, accepted is a list{'' if single else ' for each of the images'}")
    if len(rows) != len(pictures):
        raise ValueError(f"{name}: got {len(rows)} lists for {len(pictures)} images")
    return rows
