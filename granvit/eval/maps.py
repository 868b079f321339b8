"""Pictures of an encoder's patch features: their principal components in colours, and what is similar to a patch.

Any encoder will do (a run's, a model's, or a checkpoint without an LLM). Features are [h, w, C], a vector a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import PretrainedConfig

from granvit.eval.loading import check_device, find_encoder, find_model, load_model
from granvit.model.adapter import patch_side
from granvit.model.encoders import Encoder, load_encoder, random_encoder
from granvit.model.granvit import GranViT
from granvit.model.images import as_pixels
from granvit.model.preprocessor import family_pixels, read_budget, read_pixels
from granvit_kernels import fit_grid, pack_patches

LONG_SIDE = 640  # a smaller picture is enlarged to this before a map is laid over it
SPREAD = (2.0, 98.0)  # percentiles of a component that become its darkest and its brightest colour


@dataclass(frozen=True)
class PatchFeatures:
    """An encoder with the pixels that it takes: image_mean and the rest are fields of GranViTConfig.
    max_patches: an image is resized, its aspect ratio kept, to as many patches as this allows."""

    encoder: Encoder
    max_patches: int
    image_mean: Sequence[float] = (0.5, 0.5, 0.5)
    image_std: Sequence[float] = (0.5, 0.5, 0.5)
    image_resample: str = "bilinear"
    image_round: str | None = None

    @torch.no_grad()
    def __call__(self, image: Any) -> Tensor:
        """Features of an image's patches [h, w, C], float32 on the CPU. image: PIL, uint8 [H, W, 3] or a path.
        ValueError for one that can't be read."""
        pixels = as_pixels(image)
        weight, patch_size = next(self.encoder.parameters()), patch_side(self.encoder.config)
        grid = fit_grid(*pixels.shape[:2], patch_size, self.max_patches)
        patches, layout = pack_patches(
            [pixels.to(weight.device)], patch_size, self.image_mean, self.image_std, grids=torch.tensor([grid]),
            dtype=torch.float32, resample=self.image_resample, round=self.image_round,
        )  # fmt: skip
        features = self.encoder(patches.to(weight.dtype), layout.to(weight.device))
        return features.float().cpu().view(*grid, -1)

    def with_encoder(self, encoder: Encoder) -> PatchFeatures:
        """Those of another encoder, of the same pixels."""
        return replace(self, encoder=encoder.eval().to(next(self.encoder.parameters()).device))

    def with_random_weights(self) -> PatchFeatures:
        """Those of an encoder of the same configuration, with weights drawn with seed 0."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.with_encoder(random_encoder(self.encoder.config))


def features_of(model: GranViT) -> PatchFeatures:
    """The features of a whole model's encoder."""
    config = model.config
    pixels = {name: getattr(config, name) for name in ("image_mean", "image_std", "image_resample", "image_round")}
    return PatchFeatures(model.encoder, config.max_image_tokens, **pixels)


def load_features(path: str | Path, device: str = "cpu") -> PatchFeatures:
    """The features of the encoder that `path` means: a run's, a model's, or a checkpoint's (a folder or a hub name).

    An encoder's folder says in preprocessor_config.json what pixels it takes, and how many patches; without that they
    are its family's, and as many as it was built for. ValueError for what is no encoder, and for damaged files.
    """
    if holds_model(path):
        return features_of(load_model(path, device)[0])
    check_device(device)
    folder = find_encoder(path)
    try:
        encoder = load_encoder(folder).eval().to(device)
    except OSError as error:  # no such folder, and no such name on the hub
        raise ValueError(f"no model and no encoder at {path}: {error}") from error
    pixels = family_pixels(encoder.config.model_type) | read_pixels(folder)
    budget = read_budget(folder, patch_side(encoder.config)) or _built_for(encoder.config)
    return PatchFeatures(encoder, budget, **pixels)


def holds_model(path: str | Path) -> bool:
    """Whether `path` means a whole GranViT, which answers questions, and not an encoder by itself."""
    try:
        find_model(path)
    except ValueError:
        return False
    return True


def _built_for(config: PretrainedConfig) -> int:
    """The patches of the square images that an encoder's table of positions is for."""
    if count := getattr(config, "num_patches", None):
        return count
    sides = config.image_size if isinstance(config.image_size, list | tuple) else [config.image_size] * 2
    return max(1, sides[0] * sides[1] // patch_side(config) ** 2)


def check_point(point: tuple[float, float]) -> None:
    """ValueError for a point (x, y) that is not in the image, [0, 1] x [0, 1]."""
    if not all(isfinite(value) and 0 <= value <= 1 for value in point):
        pixels = ": pixels? Divide x by the image's width and y by its height" if max(point) > 2 else ""
        raise ValueError(
            f"point {list(point)} is outside the image{pixels}; it takes x y relative to the image, in [0, 1]"
        )


def patch_at(point: tuple[float, float], grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the patch of a grid (h, w) in which a point (x, y) lies. ValueError as of `check_point`."""
    check_point(point)
    (x, y), (rows, columns) = point, grid
    return min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)


def pca_colours(features: Tensor) -> np.ndarray:
    """The first three principal components of features [h, w, C] as red, green and blue: uint8 [h, w, 3].

    Features are centred over the image. A component points to where its largest weight is positive, so the same
    features always have the same colours. Each is scaled by itself: its percentiles 2 and 98 become 0 and 255, and
    what lies outside is cut off, so that a few odd patches don't take all of the contrast. A component that holds
    nothing but rounding is grey: all three where all features are equal.
    """
    rows, columns, width = features.shape
    x = features.reshape(-1, width).double()
    centred = x - x.mean(0)
    _, strength, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:3]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    scores = (centred @ (axes * largest.sign()).T).numpy()  # [N, at most 3]
    rounding = max(x.shape) * torch.finfo(torch.float32).eps * float(x.norm())
    colours = np.full((len(x), 3), 0.5)
    for component, values in enumerate(scores.T):
        low, high = np.percentile(values, SPREAD)
        if float(strength[component]) > rounding and high > low:
            colours[:, component] = ((values - low) / (high - low)).clip(0, 1)
    return np.rint(255 * colours).astype(np.uint8).reshape(rows, columns, 3)


def similarity(features: Tensor, point: tuple[float, float]) -> Tensor:
    """Cosine similarity of the patch at a point (x, y), relative to the image, to every patch: float32 [h, w] from
    features [h, w, C]. 1 at the patch itself, and 0 to features that are all 0. ValueError as of `check_point`."""
    rows, columns, _ = features.shape
    row, column = patch_at(point, (rows, columns))
    x = torch.nn.functional.normalize(features.double(), dim=-1)
    return (x @ x[row, column]).clamp(-1, 1).float()


def pca_picture(image: Image.Image, features: Tensor) -> Image.Image:
    """The image under the colours of its features [h, w, C] (see `pca_colours`)."""
    return _over(image, pca_colours(features), opacity=0.75)


def similarity_picture(image: Image.Image, features: Tensor, point: tuple[float, float]) -> Image.Image:
    """The image under its `similarity` to the patch at a point (x, y), which has a white frame. Colours (viridis) go
    from the image's least similar patch, violet, to 1, yellow."""
    from matplotlib import colormaps

    values = similarity(features, point).numpy()
    low = float(values.min())
    scaled = (values - low) / (1 - low) if low < 1 else np.ones_like(values)
    drawn = _over(image, colormaps["viridis"](scaled, bytes=True)[..., :3], opacity=0.7)
    (rows, columns), (row, column) = values.shape, patch_at(point, values.shape)
    height, width = drawn.height / rows, drawn.width / columns
    frame = [column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1]
    pen = ImageDraw.Draw(drawn)
    thick = max(2, round(max(drawn.size) / 200))
    pen.rectangle([frame[0] - 1, frame[1] - 1, frame[2] + 1, frame[3] + 1], outline="black", width=thick + 2)
    pen.rectangle(frame, outline="white", width=thick)
    return drawn


def _over(image: Image.Image, colours: np.ndarray, opacity: float) -> Image.Image:
    """A grid's colours uint8 [h, w, 3] over the image in grey, enlarged if it is small. A patch is one flat colour:
    smoother maps would show detail that the features don't have."""
    scale = max(1.0, LONG_SIDE / max(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    grey = image.convert("L").convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return Image.blend(grey, Image.fromarray(colours).resize(size, Image.Resampling.NEAREST), opacity)
