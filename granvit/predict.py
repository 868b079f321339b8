"""granvit predict MODEL --image FILE, and one of --box x1 y1 x2 y2, --find SENTENCE, --features PNG and
--similar x y."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from granvit.data.files import output_fault
from granvit.errors import Failed
from granvit.machine import default_device
from granvit.questions.pictures import decode_image
from granvit.questions.prompts import Box, Question, check_box, check_sentence
from granvit.questions.schema import DataFault
from granvit.status import DONE, run

# --help needs neither torch nor transformers, which take seconds to import: functions import them.
if TYPE_CHECKING:
    from granvit.model import GranViT, GranViTProcessor

NAME = "granvit predict"

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


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Caption a box of a picture, find what a sentence describes, or draw what the encoder sees.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a run's folder, or a folder of save_pretrained's; for --features and --similar an encoder's will do",
    )
    parser.add_argument("--image", required=True, metavar="FILE", help="a picture")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument(
        "--box",
        nargs=4,
        type=float,
        metavar=("X1", "Y1", "X2", "Y2"),
        help="caption this box (relative, in [0, 1]; or in --pixels)",
    )
    task.add_argument("--find", metavar="SENTENCE", help="find the box that this sentence describes")
    task.add_argument(
        "--features", metavar="PNG", help="draw the principal components of the encoder's features in colours"
    )
    task.add_argument(
        "--similar",
        nargs=2,
        type=float,
        metavar=("X", "Y"),
        help="draw how similar each patch is to the one at this point (relative, in [0, 1]; or in --pixels)",
    )
    parser.add_argument(
        "--output",
        metavar="PNG",
        help="where --find draws the box (found.png) and --similar the map (similar.png)",
    )
    parser.add_argument(
        "--pixels", action="store_true", help="boxes and points are in pixels of the upright picture, the found box too"
    )
    parser.add_argument("--device")
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args(arguments)
    options.device = options.device or default_device()
    drawn = options.features or options.output or ("similar.png" if options.similar else "found.png")
    if not options.box and (fault := output_fault(drawn)):
        parser.error(f"--{'features' if options.features else 'output'} {drawn}: {fault}")
    options.output = drawn
    return options


def read_picture(path: Path) -> Image.Image:
    """ValueError naming a file that is none."""
    if not path.is_file():
        raise ValueError(f"{path} is {'a folder, not a picture' if path.is_dir() else 'not there'}")
    try:
        return decode_image(path.read_bytes())
    except DataFault as fault:
        raise ValueError(f"{path}: {fault}") from None


def check(options: argparse.Namespace, size: tuple[int, int]) -> None:
    """Bring a box or a point in pixels of a picture of this size (width, height) to its sides. ValueError for a box, a
    sentence or a point that can't be asked about, before a model is loaded."""
    if options.find is not None:
        check_sentence(options.find)
    given = options.box or options.similar
    if not given:
        return
    sides = size * 2 if options.box else size
    values = [value / side for value, side in zip(given, sides, strict=True)] if options.pixels else given
    try:
        if options.box:
            check_box(values)
        else:
            from granvit.eval.maps import check_point

            check_point(values)
    except ValueError as error:
        if options.pixels:
            what = f"box {given} (x1 < x2, y1 < y2)" if options.box else f"point {given}"
            raise ValueError(f"{what} is not in the image, {size[0]} pixels wide and {size[1]} high") from None
        if max(given) > 1:
            raise ValueError(f"{error}. For pixels give --pixels too") from None
        raise
    if options.box:
        options.box = values
    else:
        options.similar = values


def draw_map(options: argparse.Namespace, image: Image.Image) -> str:
    """Draw --features or --similar, and return a line about it."""
    from granvit.eval import maps

    features = maps.load_features(options.model, options.device)(image)
    rows, columns, width = features.shape
    patches = f"{rows} x {columns} patches"
    if options.features:
        maps.pca_picture(image, features).save(options.output, "PNG")
        return f"{width} features of {patches}, drawn in {options.output}"
    maps.similarity_picture(image, features, options.similar).save(options.output, "PNG")
    low = maps.similarity(features, options.similar).min()
    return f"cosine similarity of {patches}, from {low:.2f} (violet) to 1 (yellow), drawn in {options.output}"


def predict(options: argparse.Namespace) -> int:
    image = read_picture(Path(options.image))
    check(options, image.size)
    from transformers.utils import logging

    from granvit.eval.loading import load_model

    logging.disable_progress_bar()  # "Loading weights"
    if options.features or options.similar:
        print(draw_map(options, image))
        return DONE
    model, processor = load_model(options.model, options.device)
    if options.box:
        print(caption_box(model, processor, image, tuple(options.box)))
        return DONE
    box, text = find(model, processor, image, options.find)
    if box is None:
        raise Failed(f"the model's answer holds no box: {text!r}")
    draw(image, box).save(options.output, "PNG")
    shown = (
        [f"{value * side:.0f}" for value, side in zip(box, image.size * 2, strict=True)]
        if options.pixels
        else [f"{value:.3f}" for value in box]
    )
    print(f"[{', '.join(shown)}]  drawn in {options.output}")
    return DONE


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return run(NAME, lambda: predict(options))


if __name__ == "__main__":
    sys.exit(main())
