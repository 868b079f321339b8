"""GranViT in lmms-eval: lmms-eval --model granvit --model_args pretrained=RUN --tasks refcoco_bbox_rec_val"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from .answering import Asked, Pictures, answer, load
from .wording import DESCRIBE_REGION, Wording, read_prompt, region_question

ACCEPTED = ("pretrained", "device", "batch_size", "precision")


class GranViTForLmmsEval(lmms):
    """A model of granvit's as lmms-eval asks it.

    Args:
        pretrained: a run's folder, or an export's.
        device: None: "cuda" where there is one, of several processes each its own, else "cpu".
        batch_size: questions at a time; lmms-eval's --batch_size, which is 1 unless it is given.
        precision: "float32" or "bfloat16"; None: as the weights were saved.
    Raises ValueError for other arguments, naming them, and for what is no model.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        device: str | None = None,
        batch_size: int | str = 1,
        precision: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"model_args: got {', '.join(sorted(unknown))}, accepted are {', '.join(ACCEPTED)}")
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ValueError(f"batch_size: got {batch_size!r}, accepted is a whole number, 1 or more")
        self.accelerator = Accelerator()
        if device is None and self.accelerator.num_processes > 1:
            device = str(self.accelerator.device)
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size = int(batch_size)
        self.model, self.processor = load(pretrained, device, precision)
        self.device = self.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An answer a request. Pictures are read twice, once to tell which questions share one.

        Raises NotImplementedError for several pictures, videos or sounds in a prompt, and where a task wants answers
        drawn at random or by beams; ValueError for a prompt or a box that can't be asked, naming task and row.
        """
        pictures = Pictures()
        reading = tqdm(requests, desc="Reading pictures", disable=self.rank != 0)
        asked = [self._read(*request.args[:3], *request.args[-3:], pictures) for request in reading]
        with tqdm(total=len(asked), desc="Answering", disable=self.rank != 0) as bar:
            answers = answer(self.model, self.processor, asked, pictures, self.batch_size, bar.update)
        for request, text in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], text)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "granvit answers in words and computes no likelihoods of given answers; choose a task whose output_type is "
            "generate_until, or its variant of that kind"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            "a GranViT sees one picture a conversation, and rounds show others; choose a task whose output_type is "
            "generate_until"
        )

    def _read(
        self, prompt: str, options: dict[str, Any], doc_to_visual: Any, doc_id: int, task: str, split: str,
        pictures: Pictures,
    ) -> Asked:  # fmt: skip
        def row() -> dict[str, Any]:
            return self.task_dict[task][split][doc_id]

        try:
            _check_greedy(options)
            wording, picture, read = self._ask(prompt, row, doc_to_visual)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{task}, row {doc_id} of {split}: {error}") from error
        asked = {"until": options.get("until") or ()}
        if options.get("max_new_tokens"):
            asked["max_new_tokens"] = int(options["max_new_tokens"])
        return Asked(wording, None if picture is None else pictures.add(picture, read), **asked)

    def _ask(
        self, prompt: str, row: Callable[[], dict[str, Any]], doc_to_visual: Callable[[Any], list[Any]]
    ) -> tuple[Wording, Image.Image | None, Callable[[], Image.Image]]:
        """A row's question, its picture if it has one, and what reads it again."""
        doc = row()
        if prompt.strip() == DESCRIBE_REGION and "bbox" in doc and isinstance(doc.get("image"), Image.Image):
            # lmms-eval's own picture has a red frame drawn into it, which a GranViT has never been taught to see.
            wording = region_question(doc["bbox"], *doc["image"].size, self.processor)
            return wording, doc["image"], lambda: row()["image"]
        shown = doc_to_visual(doc) or []
        if len(shown) > 1 or not all(isinstance(picture, Image.Image) for picture in shown):
            kinds = ", ".join(sorted({type(visual).__name__ for visual in shown}))
            raise NotImplementedError(f"the prompt shows {len(shown)} of {kinds}; a GranViT sees one picture")
        wording = read_prompt(prompt, self.processor)
        return wording, shown[0] if shown else None, lambda: doc_to_visual(row())[0]


def _check_greedy(options: dict[str, Any]) -> None:
    drawn = options.get("do_sample", True) and (options.get("temperature") or 0) > 0
    if drawn or (options.get("num_beams") or 1) > 1:
        raise NotImplementedError(
            "granvit decodes greedily, and the task doesn't: run it with --gen_kwargs temperature=0,num_beams=1"
        )
