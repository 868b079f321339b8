"""GranViT: vision encoders that learn to see regions.

The names below come out of granvit.model, which is imported with the first of them: transformers takes seconds to
import, and `python -m granvit.data --help` needs none of it. Importing granvit.model registers the model with
transformers' AutoConfig, AutoModel, AutoModelForImageTextToText and AutoProcessor.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import GranViT, GranViTConfig, GranViTProcessor, VisionEncoder
    from .toy.tiny import build_tiny

__all__ = ["GranViT", "GranViTConfig", "GranViTProcessor", "VisionEncoder", "build_tiny"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from granvit import model

    return getattr(model, name)
