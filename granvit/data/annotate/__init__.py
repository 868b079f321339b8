"""From bare pictures to regions: text lines by a recogniser; objects by a detector, described by a captioner.

Each of the three is anything with its protocol's one method, over a batch of pictures. `Annotator` makes of them a
plain function over a batch of columns, as `datasets.map(batched=True)` takes it. `granvit annotate` runs it on one
machine or on a Ray cluster.
"""

from granvit.data.annotate.annotator import COLUMNS, Annotator, Captioner, Detection, Detector, Line, Ocr
from granvit.data.annotate.engines import RapidOcr, TransformersCaptioner, TransformersDetector

__all__ = [
    "COLUMNS", "Annotator", "Captioner", "Detection", "Detector", "Line", "Ocr",
    "RapidOcr", "TransformersCaptioner", "TransformersDetector",
]  # fmt: skip
