"""python -m granvit.predict MODEL --image FILE (--box x1 y1 x2 y2 | --find SENTENCE)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from granvit.data.files import output_fault
from granvit.questions.pictures import decode_image
from granvit.questions.prompts import Box, Question, check_box, check_sentence

# --help needs neither torch nor transformers, which take seconds to import: functions import them.
if TYPE_CHECKING:
    from granvit.model import GranViT, GranViTProcessor

LONG_SIDE = 640  # a smaller picture is enlarged to this before a box is drawn on it


def answer(model: GranViT, processor: GranViTProcessor, image: Image.Image, question: Question) -> str:
    """The model's answer to one question about an image, greedily decoded."""
    from granvit.model import asking
    from granvit.model.images import as_pixels

    return asking.answer(model, processor, [question], [0], {0: as_pixels(image)})[0]


def caption_box(model: GranViT, processor: GranViTProcessor, image: Image.Image, box: Box) -> str:
    """What is in a box (relative xyxy). ValueError for one that reaches outside the image or has no area."""
    return answer(model, processor, image, processor.ask_what(box))


def find(
    model: GranViT, processor: GranViTProcessor, image: Image.Image, sentence: str
) -> tuple[Box | None, str]:
    """The box (relative xyxy) that a sentence describes, None where the answer holds none; and the answer.

    ValueError for an empty sentence.
    """
    text = answer(model, processor, image, processor.ask_where(sentence))
    return processor.parse_boxes([text])[0], text


def draw(image: Image.Image, box: Box) -> Image.Image:
    """The image with a relative xyxy box in red on it, enlarged if it is small."""
    scale = max(1.0, LONG_SIDE / max(image.size))
    drawn = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    corners = [v * (side - 1) for v, side in zip(box, drawn.size * 2, strict=True)]
    width = max(2, round(max(drawn.size) / 200))
    ImageDraw.Draw(drawn).rectangle(corners, outline=(220, 38, 38), width=width)
    return drawn


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m granvit.predict",
        description="Caption a box of a picture, or find what a sentence describes.",
    )
    parser.add_argument("model", metavar="MODEL", help="a run's folder, or a folder of save_pretrained's")
    parser.add_argument("--image", required=True, metavar="FILE", help="a picture")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument(
        "--box",
        nargs=4,
        type=float,
        metavar=("X1", "Y1", "X2", "Y2"),
        help="caption this box (relative, in [0, 1])",
    )
    task.add_argument("--find", metavar="SENTENCE", help="find the box that this sentence describes")
    parser.add_argument(
        "--output", default="found.png", metavar="PNG", help="where --find draws the box (found.png)"
    )
    parser.add_argument("--device")
    options = parser.parse_args(arguments)

    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.find is not None and (fault := output_fault(options.output)):
        parser.error(f"--output {options.output}: {fault}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        check_box(options.box) if options.box else check_sentence(options.find)
        path = Path(options.image)
        if not path.is_file():
            raise ValueError(f"no picture at {path}")
        image = decode_image(path.read_bytes())
        from transformers.utils import logging

        from granvit.eval.loading import load_model

        logging.disable_progress_bar()  # "Loading weights"
        model, processor = load_model(options.model, options.device)
        if options.box:
            print(caption_box(model, processor, image, tuple(options.box)))
            return 0
        box, text = find(model, processor, image, options.find)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if box is None:
        print(f"the model's answer holds no box: {text!r}", file=sys.stderr)
        return 1
    draw(image, box).save(options.output, "PNG")
    print(f"[{', '.join(f'{v:.3f}' for v in box)}]  drawn in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
