"""python bench/maps.py RUN: what a run's encoder makes of a drawn test scene, before and after training, as
docs/figures/features.png (principal components) and docs/figures/similar.png (to a patch of the largest thing)."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from granvit.data.sample.scenes import SceneConfig, draw_scene
from granvit.demo.subject import load_subject
from granvit.eval.maps import pca_picture, similarity_picture

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
SCENE = 4  # the random numbers that the scene is drawn with


def main(run: str) -> None:
    subject = load_subject(run)
    scene = draw_scene(SceneConfig(), "test", False, np.random.default_rng(SCENE))
    owners = scene.owner[scene.owner >= 0]
    rows, columns = (scene.owner == np.bincount(owners).argmax()).nonzero()
    centre = (columns.mean() / scene.image.width, rows.mean() / scene.image.height)
    features = [encode(scene.image) for encode in subject.encoders.values()]
    _save("features.png", scene.image, [pca_picture(scene.image, each) for each in features])
    _save("similar.png", scene.image, [similarity_picture(scene.image, each, centre) for each in features])


def _save(name: str, image: Image.Image, maps: list[Image.Image]) -> None:
    width, height = maps[0].size
    row = Image.new("RGB", ((width + 8) * (1 + len(maps)) - 8, height), "white")
    for column, picture in enumerate([image.resize((width, height), Image.Resampling.BICUBIC), *maps]):
        row.paste(picture, (column * (width + 8), 0))
    small = row.resize((row.width // 2, row.height // 2), Image.Resampling.LANCZOS)
    small.quantize(256).save(FIGURES / name, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
