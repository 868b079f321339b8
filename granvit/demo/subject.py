"""What the page is about: a model or an encoder, and the encoder that its maps are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from granvit.data.files import MAX_BYTES
from granvit.eval.loading import load_model
from granvit.eval.maps import PatchFeatures, features_of, holds_model, load_features, similarity
from granvit.model import GranViT, GranViTProcessor
from granvit.predict import caption_box, draw, find
from granvit.questions.pictures import decode_image
from granvit.questions.prompts import check_box
from granvit.train.build import random_encoder
from granvit.train.folder import config_of

LONG_SIDE = 640, 1280  # pixels of what the page shows: smaller pictures are enlarged, larger ones reduced


@dataclass(frozen=True)
class Picture:
    """A picture that was dropped. shown: what the page draws on. features: [h, w, C] of the encoder, or of the one
    before and of this one."""

    image: Image.Image
    shown: Image.Image
    features: tuple[Tensor, ...]


@dataclass(frozen=True)
class Subject:
    """title, comparison: a line each. model, processor: None for an encoder by itself. encoders: by their names on the
    page, the one before first, where there is one."""

    title: str
    comparison: str
    encoders: dict[str, PatchFeatures]
    model: GranViT | None = None
    processor: GranViTProcessor | None = None

    def open(self, path: str) -> Picture:
        """A file that somebody dropped. ValueError for what is no picture, or too large."""
        file = Path(path)
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"the file has more than the limit of {MAX_BYTES} bytes")
        image = decode_image(file.read_bytes())
        low, high = LONG_SIDE
        scale = min(max(1.0, low / max(image.size)), high / max(image.size))
        size = tuple(max(1, round(side * scale)) for side in image.size)
        shown = image.resize(size, Image.Resampling.BICUBIC)
        return Picture(image, shown, tuple(encode(image) for encode in self.encoders.values()))

    def caption(self, picture: Picture, box: Sequence[float]) -> str:
        """What is in a box (relative xyxy). ValueError for another box."""
        check_box(box)
        return caption_box(self.model, self.processor, picture.image, tuple(box))

    def find(self, picture: Picture, sentence: str) -> tuple[Image.Image, str]:
        """The picture with the box of a sentence, and a line about it. ValueError for an empty sentence."""
        box, text = find(self.model, self.processor, picture.image, sentence)
        if box is None:
            return picture.shown, f"The answer holds no box: {text}"
        return draw(picture.shown, box), "Box, relative to the picture: " + ", ".join(f"{v:.3f}" for v in box)

    def lowest(self, picture: Picture, point: tuple[float, float]) -> str:
        """A line about what the colours of the similarity maps mean."""
        lows = [f"{similarity(features, point).min():.2f}" for features in picture.features]
        named = [f"{low} {name}" for low, name in zip(lows, self.encoders, strict=True)] if len(lows) > 1 else lows
        lowest = ", ".join(named)
        return f"Cosine similarity to the patch in the white frame: 1 is yellow, the lowest ({lowest}) is violet."


def load_subject(path: str | Path, before: str | Path | None = None, device: str = "cpu") -> Subject:
    """A run, a model or an encoder, ready to be asked. before: a model or an encoder to compare its maps with; None: of
    a run, what its encoder was before it was trained. ValueError for what can't be loaded."""
    model = processor = None
    if holds_model(path):
        model, processor = load_model(path, device)
        after, title = features_of(model), f"The model {path}"
    else:
        after, title = load_features(path, device), f"The encoder {path}. It has no language model: maps alone"
    earlier, which = (load_features(before, device), str(before)) if before else _untrained(path, after, device)
    if earlier is None:
        return Subject(title, which, {"after": after}, model, processor)
    comparison = f"Before is {which}; after is {path}."
    return Subject(title, comparison, {"before": earlier, "after": after}, model, processor)


def _untrained(path: str | Path, after: PatchFeatures, device: str) -> tuple[PatchFeatures | None, str]:
    """The encoder of a run as it was before it was trained, and in words what it is, or why there is none."""
    try:
        config = config_of(Path(path))
    except ValueError:
        return None, "To compare it with another encoder, give --before."
    origin = config.model.encoder or config.model.whole
    if origin:
        try:
            return load_features(origin, device), f"{origin}, which the run began with"
        except ValueError as error:
            return None, f"The encoder that the run began with can't be loaded ({error}); --before takes another."
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        encoder = random_encoder(config.model)
    return after.with_encoder(encoder), f"the random encoder that the run began with (seed {config.seed})"
