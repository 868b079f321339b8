"""The embedded sample set: photographs, generated scenes and pages of text. README.md lists the sources."""

from granvit.data.sample.attributes import ATTRIBUTES
from granvit.data.sample.build import GENERATOR_VERSION, build_sample, cached_sample
from granvit.data.sample.scenes import SceneConfig

__all__ = ["ATTRIBUTES", "GENERATOR_VERSION", "SceneConfig", "build_sample", "cached_sample"]
