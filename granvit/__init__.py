"""GranViT: vision encoders that learn to see regions. Importing it registers the model with transformers."""

from .model import GranViT, GranViTConfig, GranViTProcessor, VisionEncoder, build_tiny

__all__ = ["GranViT", "GranViTConfig", "GranViTProcessor", "VisionEncoder", "build_tiny"]
