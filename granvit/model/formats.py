"""The folders that a model is written to."""

from __future__ import annotations

from pathlib import Path

from .granvit import GranViT
from .lfm2_vl import save_lfm2_vl
from .processing import GranViTProcessor


def save(model: GranViT, processor: GranViTProcessor, folder: str | Path, form: str = "granvit") -> None:
    """Write a model to `folder`. form: "granvit", all of it, its encoder in encoder/; "encoder", no more than that;
    "lfm2-vl", see `save_lfm2_vl`. Raises ValueError where the model has no such form."""
    if form == "lfm2-vl":
        save_lfm2_vl(model, processor, folder)
    elif form == "encoder":
        model.save_encoder(folder)
    else:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        model.save_encoder(Path(folder) / "encoder")
