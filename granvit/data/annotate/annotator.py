"""The protocols of recogniser, detector and captioner, and the annotator that calls them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from datasets import Features, Value
from PIL.Image import Image

from granvit.data.schema import FEATURES, parse_region
from granvit.questions.pictures import MAX_PIXELS, decode_image
from granvit.questions.schema import DataFault

BATCH = 16
"""Pictures, or crops of them, that a model is given at once, at most; fewer of large ones."""
MIN_SIDE = 16
"""An object of fewer pixels on a side shows a captioner nothing."""

COLUMNS = Features(
    {
        **{name: FEATURES[name] for name in ("width", "height", "caption", "regions")},
        "faults": Value("string"),
        "dropped": Value("string"),
    }
)
"""What an `Annotator` makes, for `datasets.map(features=Features({**dataset.features, **COLUMNS}))`, which else guesses
types from a first batch that may have no caption."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """An object. box: xyxy in pixels, x2 and y2 exclusive. score: in [0, 1]."""

    box: Box
    label: str
    score: float


@dataclass(frozen=True)
class Line:
    """A line of text. box: xyxy in pixels, x2 and y2 exclusive. score: in [0, 1]."""

    box: Box
    text: str
    score: float


class Detector(Protocol):
    """Finds objects."""

    def __call__(self, images: list[Image]) -> list[list[Detection]]:
        """The objects of each of several RGB pictures of any sizes."""


class Ocr(Protocol):
    """Reads text."""

    def __call__(self, images: list[Image]) -> list[list[Line]]:
        """The lines of each of several RGB pictures of any sizes, in reading order."""


class Captioner(Protocol):
    """Describes pictures, of single objects or of whole scenes."""

    def __call__(self, images: list[Image]) -> list[str]:
        """A sentence for each of several RGB pictures of any sizes."""


class NoModel(ValueError):
    """A model that can't be loaded ends a run; whatever else it raises is one picture's fault."""


@dataclass
class _Annotated:
    """What became of one picture; `picture` is None where it can't be decoded."""

    picture: Image | None
    caption: str | None = None
    regions: list[dict[str, Any]] = field(default_factory=list)
    faults: list[DataFault] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def add(self, box: Box, caption: str, kind: str, score: float) -> None:
        """A region with a box in pixels, cut to the picture."""
        sides = self.picture.size * 2
        relative = [min(max(float(v) / side, 0.0), 1.0) for v, side in zip(box, sides, strict=True)]
        self.keep({"box": relative, "caption": " ".join(caption.split()), "kind": kind, "score": float(score)})

    def keep(self, region: Any) -> None:
        try:
            self.regions.append(parse_region(region).fields())
        except DataFault as fault:
            self.faults.append(fault)


@dataclass
class Annotator:
    """Annotates a batch of pictures: `annotator({"image": [...], ...}) -> {"width": [...], ...}`, see `COLUMNS`.

    ocr: its lines become regions of kind "ocr". detector: its objects become regions of kind "natural", with the
    captioner's sentence for each one's crop or, without a captioner, with the class's name. describer: makes captions
    of whole pictures that have none. ocr_score, detector_score: regions that score less are dropped.

    The batch has a column `image` (encoded bytes, {"bytes", "path"} or PIL images) and may have `caption` and
    `regions`, which are kept; new regions come after them. In `faults` stands, a line each, "kind: what is wrong" of
    the picture or of a region that was left out; in `dropped` the rule for each region that was. A picture that can't
    be decoded has width and height 0 and no new regions. One for which a model raises gets a fault of kind `model`: a
    single picture never ends a run. Raises ValueError where a model returns not one result a picture.
    """

    ocr: Ocr | None = None
    detector: Detector | None = None
    captioner: Captioner | None = None
    describer: Captioner | None = None
    ocr_score: float = 0.5
    detector_score: float = 0.5

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        count = len(batch["image"])
        captions = batch.get("caption", [None] * count)
        regions = batch.get("regions", [None] * count)
        rows = []
        for chunk in _chunks(zip(batch["image"], captions, regions, strict=True)):
            self._annotate([annotated for annotated in chunk if annotated.picture])
            for annotated in chunk:
                size = annotated.picture.size if annotated.picture else (0, 0)
                annotated.picture = None  # the next chunk needs its room
                faults = "\n".join(f"{fault.kind}: {' '.join(str(fault).split())}" for fault in annotated.faults)
                rows.append((*size, annotated.caption, annotated.regions, faults, "\n".join(annotated.dropped)))
        return {name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}

    def _annotate(self, batch: list[_Annotated]) -> None:
        pictures = [annotated.picture for annotated in batch]
        if self.ocr:
            for annotated, lines in _results(self.ocr, batch, pictures, _lines):
                for line in lines:
                    if line.score < self.ocr_score:
                        annotated.dropped.append("line under the least score")
                    else:
                        annotated.add(line.box, line.text, "ocr", line.score)
        if self.detector:
            objects = []
            for annotated, detections in _results(self.detector, batch, pictures, _detections):
                for detection in detections:
                    if detection.score < self.detector_score:
                        annotated.dropped.append("object under the least score")
                    elif _crop(annotated.picture, detection.box) is None:
                        annotated.dropped.append(f"object of less than {MIN_SIDE} pixels")
                    else:
                        objects.append((annotated, detection))
            for some in _batched(objects, BATCH):
                self._add_objects(some)
        if self.describer:
            bare = [annotated for annotated in batch if annotated.caption is None]
            for annotated, caption in _results(self.describer, bare, [annotated.picture for annotated in bare], _text):
                annotated.caption = " ".join(caption.split()) or None

    def _add_objects(self, objects: list[tuple[_Annotated, Detection]]) -> None:
        named = [((annotated, detection), detection.label) for annotated, detection in objects]
        if self.captioner:
            crops = [owner.picture.crop(_crop(owner.picture, detection.box)) for owner, detection in objects]
            named = _results(self.captioner, objects, crops, _text)
        for (annotated, detection), caption in named:
            if caption.strip():
                annotated.add(detection.box, caption, "natural", detection.score)
            else:
                annotated.dropped.append("object without a sentence")


def _chunks(rows: Iterator[tuple[Any, Any, Any]]) -> Iterator[list[_Annotated]]:
    """Rows with their pictures decoded, BATCH at a time or fewer large ones: what memory has to hold."""
    chunk, pixels = [], 0
    for image, caption, regions in rows:
        annotated = _Annotated(None, caption)
        for region in regions if regions is not None else ():
            annotated.keep(region)
        try:
            annotated.picture = decode_image(image)
            pixels += math.prod(annotated.picture.size)
        except DataFault as fault:
            annotated.faults.append(fault)
        chunk.append(annotated)
        if len(chunk) == BATCH or pixels >= MAX_PIXELS:
            yield chunk
            chunk, pixels = [], 0
    if chunk:
        yield chunk


def _results(
    model: Callable[[list[Image]], list[Any]],
    owners: list[Any],
    pictures: list[Image],
    checked: Callable[[Any], Any],
) -> list[Any]:
    """(owner, its picture's result), but for pictures that the model can't take, or for which it returns what is not
    `checked`: what owns them gets a fault."""
    if not pictures:
        return []
    try:
        results = [checked(result) for result in model(pictures)]
    except NoModel:
        raise
    except Exception as error:  # whatever a model raises for one picture of a million
        if len(pictures) > 1:
            pairs = zip(owners, pictures, strict=True)
            return [result for owner, picture in pairs for result in _results(model, [owner], [picture], checked)]
        annotated = owners[0] if isinstance(owners[0], _Annotated) else owners[0][0]
        annotated.faults.append(DataFault("model", f"{type(model).__name__}: {type(error).__name__}: {error}"))
        return []
    if len(results) != len(pictures):
        raise ValueError(f"{type(model).__name__} returned {len(results)} results for {len(pictures)} images")
    return list(zip(owners, results, strict=True))


def _lines(lines: Any) -> list[Line]:
    return [Line(_box(line.box), _text(line.text), float(line.score)) for line in lines]


def _detections(detections: Any) -> list[Detection]:
    return [Detection(_box(detection.box), _text(detection.label), float(detection.score)) for detection in detections]


def _box(box: Any) -> Box:
    x1, y1, x2, y2 = map(float, box)
    return x1, y1, x2, y2


def _text(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"expected a string, got {text!r:.80}")
    return text


def _crop(picture: Image, box: Box) -> tuple[int, int, int, int] | None:
    """The box in whole pixels, cut to the picture; None where too little is left."""
    if not all(map(math.isfinite, box)):
        return None
    (x1, y1, x2, y2), (width, height) = box, picture.size
    left, top = max(math.floor(x1), 0), max(math.floor(y1), 0)
    right, bottom = min(math.ceil(x2), width), min(math.ceil(y2), height)
    return (left, top, right, bottom) if min(right - left, bottom - top) >= MIN_SIDE else None


def _batched(items: list[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some
