"""What bench/evidence.py trains: the sizes, and what each variant changes. Its tables call them by these names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """How large everything is. flags: of `python -m granvit.train`; wide, fine: those that make the model four times as
    wide, and give the teacher's crops four times the patches. asked, probed: test images, and images of either split;
    part: quality is measured on every so-manieth training image."""

    flags: str
    wide: str
    fine: str
    asked: int = 200
    probed: int = 800
    part: int = 4


SIZES = {
    "small": Size(
        "smoke --threads 1 --warmup.steps 400 --pretrain.steps 600 --adapt.steps 800",
        "--model.encoder-width 512 --model.encoder-heads 8 --model.llm-width 512 --model.llm-heads 8 "
        "--warmup.learning-rate 1e-3 --pretrain.learning-rate 2e-3 --adapt.learning-rate 1e-3",
        "--distill.crop-tokens 64",
    ),
    "compact": Size(
        "compact --model.box-style tokens",
        "--model.encoder-width 1536 --model.encoder-heads 24 --pretrain.learning-rate 1e-4",
        "--distill.crop-tokens 256",
        asked=500,
        probed=4000,
    ),
}


@dataclass(frozen=True)
class Variant:
    """A change of one thing. flags: of `python -m granvit.train`; of_size: those that Size has of this name. part:
    train on every so-manieth image. wrong: the share of captions that are swapped for another image's; audited_by: the
    model trained on them ("itself"), or one trained on other images of which as many captions are wrong ("another");
    what it doubts is left out, and the model trained anew. longer: so many times the steps of stage 2. all_steps: those
    of stage 1 are taken in stage 2. equal_time: as many steps as take the whole method's time."""

    flags: str = ""
    of_size: str = ""
    part: int = 1
    wrong: float = 0.0
    audited_by: str = ""
    longer: int = 1
    all_steps: bool = False
    equal_time: bool = False


WHOLE = "the whole method"
RANDOM = "no stage 1: a random encoder"
LONG_RANDOM = "a random encoder, all steps in stage 2"
UNDISTILLED = "no self-distillation"
ONE_QUESTION = "one question a sample"
PART = "1/4 of the images"
WIDE = "four times as wide"
TOKENS = "boxes token by token"
ONE_STEP = "boxes in one step"
PARTS: dict[str, dict[str, Variant]] = {
    "ablation": {
        WHOLE: Variant(),
        RANDOM: Variant("--pretrain.steps 0"),
        LONG_RANDOM: Variant("--pretrain.steps 0", all_steps=True),
        UNDISTILLED: Variant("--pretrain.distill 0"),
        "boxes as location tokens": Variant("--model.box-style text"),
        "boxes as location and region tokens": Variant("--model.box-style both"),
        "encoder tuned in stage 2": Variant("--adapt.train encoder projector llm"),
        "alpha 0.9": Variant("--distill.alpha 0.9"),
        "alpha 0.999": Variant("--distill.alpha 0.999"),
        "lambda 0.3": Variant("--pretrain.distill 0.3"),
        "lambda 3": Variant("--pretrain.distill 3"),
        "target mse": Variant("--distill.target mse"),
        "target cosine": Variant("--distill.target cosine"),
        "target layer_norm": Variant("--distill.target layer_norm"),
        "crops as fine as the image": Variant("--distill.crop-tokens 1"),
        "crops of four times the patches": Variant(of_size="fine"),
        "no cell positions": Variant("--model.no-cell-positions"),
        ONE_QUESTION: Variant("--data.questions-per-image 1", equal_time=True),
    },
    "scaling": {
        "1/8 of the images": Variant(part=8),
        PART: Variant(part=4),
        "1/2 of the images": Variant(part=2),
        WIDE: Variant(of_size="wide"),
    },
    "boxes": {
        TOKENS: Variant(longer=2),
        ONE_STEP: Variant("--model.parallel-boxes", longer=2),
    },
    "quality": {
        "10 % wrong": Variant(wrong=0.1),
        "10 % wrong, audited": Variant(wrong=0.1, audited_by="another"),
        "30 % wrong": Variant(wrong=0.3),
        "30 % wrong, audited": Variant(wrong=0.3, audited_by="another"),
        "30 % wrong, audited by itself": Variant(wrong=0.3, audited_by="itself"),
    },
}
"""The row of the whole method stands beside those of scaling, as all images; that of 1/4 of the images beside those of
quality."""
SEEDS = {"ablation": 3, "scaling": 1, "boxes": 3, "quality": 1}
"""How many seeds each part is trained with, where nothing else is said: a night allows no more."""


def flags_of(size: Size, variant: Variant) -> str:
    return " ".join(filter(None, (variant.flags, variant.of_size and getattr(size, variant.of_size))))
