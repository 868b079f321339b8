"""GranViT in VLMEvalKit, which learns of a model by one line:

    supported_VLM["granvit"] = partial(GranViTForVLMEvalKit, pretrained="RUN")
"""

from __future__ import annotations

from functools import partial
from typing import Any

from PIL import Image
from vlmeval.vlm.base import BaseModel

from granvit.eval.evaluation import MAX_NEW_TOKENS
from granvit.questions.pictures import decode_image

from .answering import Asked, Pictures, answer, load
from .wording import read_prompt


class GranViTForVLMEvalKit(BaseModel):
    """A model of granvit's as VLMEvalKit asks it, a question at a time.

    Args:
        pretrained: a run's folder, or an export's.
        device: None: "cuda" where there is one, else "cpu".
        precision: "float32" or "bfloat16"; None: as the weights were saved.
        max_new_tokens: of an answer that is no box.
    Raises ValueError for what is no model.
    """

    INTERLEAVE = False
    allowed_types = ["text", "image"]

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        precision: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        super().__init__()
        self.model, self.processor = load(pretrained, device, precision)
        self.max_new_tokens = max_new_tokens

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to the message's texts about its picture. Boxes are relative to the picture, [x1, y1, x2, y2], as
        RefCOCO's rows are read.

        message: [{"type": "text" | "image", "value": a text | a file}, ...]. NotImplementedError for several pictures;
        ValueError for a prompt without text, and for a file that is no picture.
        """
        files = [part["value"] for part in message if part["type"] == "image"]
        if len(files) > 1:
            raise NotImplementedError(f"{dataset}: the prompt shows {len(files)} pictures; a GranViT sees one")
        prompt = "\n".join(part["value"] for part in message if part["type"] == "text")
        pictures, key = Pictures(), None
        if files:
            read = partial(_open, files[0])
            key = pictures.add(read(), read)
        asked = Asked(read_prompt(prompt, self.processor), key, max_new_tokens=self.max_new_tokens)
        return answer(self.model, self.processor, [asked], pictures, 1)[0]


def _open(file: str) -> Image.Image:
    return decode_image({"path": file})
