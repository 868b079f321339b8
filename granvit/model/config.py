"""GranViTConfig: everything that is needed to build a GranViT again, with the reason for each choice."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import isfinite

from transformers import AutoConfig, PretrainedConfig, Siglip2VisionConfig

from granvit_kernels import fit_grid

from .adapter import FAMILIES, patch_side

BOX_STYLES = ("text", "tokens", "both")
BOX_FORMATS = ("text", "bins")

# The rule is a bisection (25 us), asked again for each image of each step, and pictures come in few sizes.
cached_fit_grid = lru_cache(maxsize=4096)(fit_grid)


def token_grid(height: int, width: int, patch_size: int, max_tokens: int, pixel_shuffle: int) -> tuple[int, int]:
    """Rows and columns of an image's tokens in the LLM's sequence: fit_grid's, merged by the pixel shuffle."""
    rows, columns = cached_fit_grid(height, width, patch_size, max_tokens)
    return -(-rows // pixel_shuffle), -(-columns // pixel_shuffle)


class GranViTConfig(PretrainedConfig):
    """Configuration of a GranViT: a packed SigLIP2-type encoder, projectors, and any causal LM of
    transformers.

    Where the paper leaves something unknown, the field says what was chosen and why.

    Args:
        vision_config: a `Siglip2VisionConfig`, or the configuration of another encoder (see adapter.FAMILIES), or its
            dict. The encoder is the product: it keeps the configuration of the transformers model as which it is
            exported.
        text_config: the configuration of a causal LM (or its dict, with `model_type`).
        pixel_shuffle: 1, or 2 to merge 2 x 2 neighbouring image tokens into one before the projector (unknown
            in the paper). 1 by default: at a few hundred tokens an image, detail is worth more than the
            shorter sequence. A grid with an odd side is completed by repeating its last row or column.
        region_tokens: K, how many tokens stand for one `<region>` marker. One is enough for an object; text
            lines and groups gain from more.
        region_heads: heads of the region prompt's attention; None: as many as the encoder has. The encoder's
            width must be a multiple.
        box_style: how a question names its box: "text" (coordinates, the paper), "tokens" (region tokens read
            from the image's features) or "both".
        box_format: how coordinates are written: "text", "[0.123, 0.456, 0.789, 0.950]" (the paper, and what
            public evaluations read), or "bins", four location tokens (shorter, and learnt by a tiny LM).
        bins: location tokens an axis, shared by x and y, used with box_format="bins": 1000 resolves what
            three decimals do; a tiny model learns few (32) far faster.
        parallel_boxes: whether the four coordinates of an answer are told in one step: none sees those before it, and
            `find` reads them all off one forward pass. The location tokens of all bins are one and the same input then,
            so box_style must be "tokens" and box_format "bins". Not in the paper.
        cell_positions: whether the place of each image token's cell is added to it. Not in the paper: there the
            encoder has to tell places, which is what stage 1 is for. A tiny LLM learns to read boxes sooner with it.
        max_image_tokens: budget of encoder tokens an image (before the pixel shuffle); the grid is
            `fit_grid`'s, that is SigLIP2 NaFlex's rule: native aspect ratio, as large as the budget allows.
        image_mean, image_std: pixel normalisation, SigLIP2's by default.
        image_resample, image_round: how images are resized, as of `granvit_kernels.pack_patches`. An encoder that was
            trained on another processor's pixels may want them: SigLIP's are "bicubic" and "pil".
        text_vocab: how many rows of the LLM's tables are in use, i.e. its tokenizer's length before ours were
            added. Location token i has the id text_vocab + i; `<image>` and `<region>` follow. A table's
            padding rows above text_vocab are never used.
        bos_token_id, eos_token_id, pad_token_id: of the LLM's tokenizer; bos may be None.
        end_of_turn_token_id: questions are written as the chat template of the LLM's tokenizer does, which ends an
            answer with this token; None: as raw text between line breaks, with eos behind the answer.
    Raises ValueError naming the field, what it got and what it takes: a config.json comes from outside.
    """

    model_type = "granvit"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: PretrainedConfig | dict | None = None,
        text_config: PretrainedConfig | dict | None = None,
        pixel_shuffle: int = 1,
        region_tokens: int = 1,
        region_heads: int | None = None,
        box_style: str = "text",
        box_format: str = "text",
        bins: int = 1000,
        parallel_boxes: bool = False,
        cell_positions: bool = True,
        max_image_tokens: int = 256,
        image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        image_std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        image_resample: str = "bilinear",
        image_round: str | None = None,
        text_vocab: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        end_of_turn_token_id: int | None = None,
        **kwargs,
    ):
        if vision_config is None:
            vision_config = Siglip2VisionConfig(vision_use_head=False)
        if text_config is None:
            text_config = AutoConfig.for_model("llama")
        vision_config = _configuration("vision_config", vision_config, PretrainedConfig, _vision_config)
        text_config = _configuration("text_config", text_config, PretrainedConfig, AutoConfig.for_model)
        if not isinstance(vision_config, Siglip2VisionConfig) and vision_config.model_type not in FAMILIES:
            raise ValueError(
                f"vision_config: got {type(vision_config).__name__}, accepted is a Siglip2VisionConfig, or one of type "
                f"{', '.join(FAMILIES)}"
            )
        _one_of("pixel_shuffle", pixel_shuffle, (1, 2))
        _one_of("box_style", box_style, BOX_STYLES)
        _one_of("box_format", box_format, BOX_FORMATS)
        _one_of("cell_positions", cell_positions, (True, False))
        _one_of("parallel_boxes", parallel_boxes, (True, False))
        if parallel_boxes and (box_style, box_format) != ("tokens", "bins"):
            raise ValueError(
                f"parallel_boxes: got True with box_style {box_style!r} and box_format {box_format!r}, accepted are "
                "'tokens' and 'bins': no question may need to be told a coordinate"
            )
        _positive("region_tokens", region_tokens)
        _positive("bins", bins)
        _positive("max_image_tokens", max_image_tokens)
        for name in ("hidden_size", "num_attention_heads"):
            _positive(f"vision_config.{name}", getattr(vision_config, name))
        _positive("vision_config.patch_size", patch_side(vision_config))
        _positive("text_config.hidden_size", getattr(text_config, "hidden_size", None))
        heads = vision_config.num_attention_heads if region_heads is None else region_heads
        _positive("region_heads", heads)
        text_vocab = text_config.vocab_size if text_vocab is None else text_vocab
        _positive("text_vocab", text_vocab)
        ends = {"bos": bos_token_id, "eos": eos_token_id, "pad": pad_token_id, "end_of_turn": end_of_turn_token_id}
        for name, value in ends.items():
            if value is not None and (not _is_integer(value) or value < 0):
                raise ValueError(f"{name}_token_id: got {value!r}, accepted is an integer of at least 0, or None")
        _three("image_mean", image_mean)
        _three("image_std", image_std, positive=True)
        _one_of("image_resample", image_resample, ("bilinear", "bicubic"))
        _one_of("image_round", image_round, (None, "pil", "pil13"))
        if vision_config.hidden_size % heads:
            raise ValueError(
                f"region_heads: got {heads}, accepted is a divisor of the encoder's width "
                f"{vision_config.hidden_size}"
            )
        self.vision_config = vision_config
        self.text_config = text_config
        self.pixel_shuffle = pixel_shuffle
        self.region_tokens = region_tokens
        self.region_heads = heads
        self.box_style = box_style
        self.box_format = box_format
        self.bins = bins
        self.parallel_boxes = parallel_boxes
        self.cell_positions = cell_positions
        self.max_image_tokens = max_image_tokens
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.image_resample = image_resample
        self.image_round = image_round
        self.text_vocab = text_vocab
        kwargs.setdefault("tie_word_embeddings", text_config.tie_word_embeddings)
        super().__init__(**kwargs)
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.end_of_turn_token_id = end_of_turn_token_id

    @property
    def patch_size(self) -> int:
        """Side of the encoder's patches in pixels."""
        return patch_side(self.vision_config)

    @property
    def location_tokens(self) -> int:
        """Number of location tokens that exist: `bins`, or none when boxes are written as text."""
        return self.bins if self.box_format == "bins" else 0

    @property
    def image_token_id(self) -> int:
        """Id of the `<image>` marker, one for each image token; it has no row of its own, features stand in
        its place."""
        return self.text_vocab + self.location_tokens

    @property
    def region_token_id(self) -> int:
        """Id of the `<region>` marker, region_tokens in a row for each asked box."""
        return self.image_token_id + 1

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The encoder's grid (h, w) in patches for an image of height x width pixels."""
        return cached_fit_grid(height, width, self.patch_size, self.max_image_tokens)

    def image_tokens(self, height: int, width: int) -> int:
        """How many tokens an image of height x width pixels takes in the LLM's sequence."""
        rows, columns = self.token_grid(height, width)
        return rows * columns

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of those tokens: `grid`, merged by the pixel shuffle."""
        return token_grid(height, width, self.patch_size, self.max_image_tokens, self.pixel_shuffle)


def _configuration(name: str, given, kind: type, build: Callable[..., PretrainedConfig]) -> PretrainedConfig:
    """The configuration that is given, or built of the dict that is given."""
    if isinstance(given, kind):
        return given
    if not isinstance(given, dict):
        raise ValueError(f"{name}: got {type(given).__name__}, accepted is a {kind.__name__} or its dict")
    try:
        return build(**given)
    except Exception as error:  # on a damaged dict transformers raises whatever the damage leads to
        raise ValueError(f"{name}: no {kind.__name__} can be made of its dict: {error}") from error


def _vision_config(model_type: str = "siglip2_vision_model", **values) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **values)


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(name: str, value, accepted: tuple) -> None:
    if value not in accepted or type(value) not in map(type, accepted):
        raise ValueError(f"{name}: got {value!r}, accepted are {', '.join(map(repr, accepted))}")


def _positive(name: str, value: int) -> None:
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{name}: got {value!r}, accepted is an integer of at least 1")


def _three(name: str, values, positive: bool = False) -> None:
    kind = "positive" if positive else "finite"
    numbers = isinstance(values, list | tuple) and all(
        isinstance(v, int | float) and isfinite(v) and (v > 0 or not positive) for v in values
    )
    if not numbers or len(values) != 3:
        raise ValueError(f"{name}: got {values!r}, accepted are three {kind} numbers")
