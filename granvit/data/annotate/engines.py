"""The models that come with granvit: RapidOCR, and any detector or captioner that transformers loads.

Instances are descriptions that go to other processes; a process loads a model when it first calls it.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL.Image import Image

from granvit.data.annotate.annotator import Box, Detection, Line, NoModel
from granvit.machine import default_device

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RapidOcr:
    """PP-OCR's detection and recognition of lines, by the package rapidocr, whose wheel holds the models. On the CPU,
    one thread a process: pictures are what runs side by side. Reads Chinese, Japanese and languages of Latin letters.

    A line's box is the upright one around what PP-OCR finds, cut to the ink in it: PP-OCR leaves half a line's height
    around short lines, too much for IoU 0.5 with the letters' own box. Its classifier of upside-down lines is off: it
    turns upright lines of small print, too, which are rubbish then (bench/ocr.py).
    """

    def __call__(self, images: list[Image]) -> list[list[Line]]:
        read = _rapidocr()
        results = []
        for image in images:
            result, grey = read(image), np.asarray(image.convert("L"), dtype=np.int16)
            lines = [] if result.boxes is None else zip(result.boxes, result.txts, result.scores, strict=True)
            results.append(
                [
                    Line(_cut_to_ink(grey, (*corners.min(0), *corners.max(0))), text, float(score))
                    for corners, text, score in lines
                ]
            )
        return results


def _cut_to_ink(grey: np.ndarray, box: Any) -> Box:
    """The part of a box of text [H, W] that differs from its ground by a quarter of the most that any pixel does."""
    x1, y1 = (max(math.floor(side), 0) for side in box[:2])
    patch = grey[y1 : math.ceil(box[3]), x1 : math.ceil(box[2])]
    if not patch.size:
        return tuple(map(float, box))
    contrast = np.abs(patch - int(np.median(patch)))
    ink = contrast * 4 > max(contrast.max(), 1)
    (rows,), (columns,) = ink.any(1).nonzero(), ink.any(0).nonzero()
    if not len(rows):
        return tuple(map(float, box))
    return float(x1 + columns[0]), float(y1 + rows[0]), float(x1 + columns[-1] + 1), float(y1 + rows[-1] + 1)


@dataclass(frozen=True)
class TransformersDetector:
    """Any model that AutoModelForObjectDetection loads.

    model: a folder, or a name on the hub. score: objects of less are not told. device: None: the GPU, where there is
    one. Pictures go through the model in groups that its image processor gives one size: padding would move the boxes
    of models that take no mask.
    """

    model: str
    score: float = 0.5
    device: str | None = None

    def __call__(self, images: list[Image]) -> list[list[Detection]]:
        import torch

        processor, model = _detector(self.model, self.device)
        groups = defaultdict(list)
        for index, image in enumerate(images):
            inputs = processor(images=[image], return_tensors="pt")
            groups[inputs["pixel_values"].shape].append((index, inputs))
        results: list[list[Detection]] = [[] for _ in images]
        for group in groups.values():
            indices = [index for index, _ in group]
            inputs = {name: torch.cat([inputs_of_one[name] for _, inputs_of_one in group]) for name in group[0][1]}
            inputs = {name: _placed(value, model) for name, value in inputs.items()}
            with torch.inference_mode():
                outputs = model(**inputs)
            sizes = [(images[index].height, images[index].width) for index in indices]
            for index, result in zip(
                indices, processor.post_process_object_detection(outputs, self.score, sizes), strict=True
            ):
                rows = zip(result["boxes"].tolist(), result["labels"].tolist(), result["scores"].tolist(), strict=True)
                results[index] = [
                    Detection(tuple(box), model.config.id2label[label], score) for box, label, score in rows
                ]
        return results


@dataclass(frozen=True)
class TransformersCaptioner:
    """Any model that AutoModelForImageTextToText loads, with its processor. Deterministic: the likeliest token each.

    model: a folder, or a name on the hub. prompt: what a model with a chat template is asked; one without it (BLIP,
    GIT) describes without being asked. tokens: of a sentence, at most. device: None: the GPU, where there is one.
    """

    model: str
    prompt: str
    tokens: int
    device: str | None = None

    def __call__(self, images: list[Image]) -> list[str]:
        import torch

        processor, model = _captioner(self.model, self.device)
        texts = None
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": self.prompt}]
            chat = [{"role": "user", "content": content}]
            texts = [processor.apply_chat_template(chat, add_generation_prompt=True)] * len(images)
        inputs = processor(images=[[image] for image in images], text=texts, padding=True, return_tensors="pt")
        inputs = {name: _placed(value, model) for name, value in inputs.items()}
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=self.tokens, do_sample=False)
        if texts and not model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(tokens, skip_special_tokens=True)


@cache
def load(name: str) -> Any:
    """The instance of "package.module:Class", one a process. Raises ValueError where there is no such class."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # whatever a module of somebody's raises
        raise ValueError(f"{name!r} can't be loaded: {type(error).__name__}: {error}") from error


@cache
def _rapidocr() -> Any:
    try:
        import cv2
        from rapidocr import RapidOCR
    except ImportError as error:
        raise NoModel(f"reading text takes pip install 'granvit[ocr]': {error}") from None
    cv2.setNumThreads(1)
    threads = {f"EngineConfig.onnxruntime.{which}_op_num_threads": 1 for which in ("intra", "inter")}
    # text_score 0: what scores too little is the annotator's to drop and to count
    settings = {"Global.log_level": "error", "Global.use_cls": False, "Global.text_score": 0.0}
    return RapidOCR(params=settings | threads)


@cache
def _detector(name: str, device: str | None) -> tuple[Any, torch.nn.Module]:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    return _loaded(AutoImageProcessor, name), _ready(_loaded(AutoModelForObjectDetection, name), device)


@cache
def _captioner(name: str, device: str | None) -> tuple[Any, torch.nn.Module]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = _loaded(AutoProcessor, name)
    processor.tokenizer.padding_side = "left"  # of a batch, all sentences begin where the prompts end
    return processor, _ready(_loaded(AutoModelForImageTextToText, name), device)


def _loaded(kind: Any, name: str) -> Any:
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise NoModel(f"{name} can't be loaded by {kind.__name__}: {error}") from error


def _ready(model: torch.nn.Module, device: str | None) -> torch.nn.Module:
    import torch

    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # one process a core: more threads would only get into each other's way
    return model.eval().to(device or default_device())


def _placed(value: Any, model: torch.nn.Module) -> Any:
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)
