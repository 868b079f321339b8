"""The model. Importing it registers GranViT with transformers' Auto classes; granvit's own __init__ sees
to that wherever both are imported."""

from importlib import import_module
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .config import GranViTConfig
from .granvit import GranViT
from .processing import GranViTProcessor
from .vision import VisionEncoder

AutoConfig.register(GranViTConfig.model_type, GranViTConfig)
AutoModel.register(GranViTConfig, GranViT)
AutoModelForImageTextToText.register(GranViTConfig, GranViT)
AutoProcessor.register(GranViTConfig, GranViTProcessor)

__all__ = [
    "GranViT",
    "GranViTConfig",
    "GranViTProcessor",
    "TinyLLM",
    "TinyVision",
    "VisionEncoder",
    "build_tiny",
]


def __getattr__(name: str) -> Any:
    """Names of granvit.toy that were here once: code of users that imports them goes on."""
    if name not in ("TinyLLM", "TinyVision", "build_tiny"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("granvit.toy.tiny"), name)
