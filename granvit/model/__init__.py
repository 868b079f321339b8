"""The model. Importing it registers GranViT with transformers' AutoConfig, AutoModel and AutoProcessor."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .config import GranViTConfig
from .granvit import GranViT
from .processing import GranViTProcessor
from .tiny import TinyLLM, TinyVision, build_tiny
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
