"""GranViT: vision encoders that learn to see regions.

`import granvit` is cheap: it imports neither torch nor transformers, which take seconds. The names below come out of
granvit.model, which is imported with the first of them. It is imported right after transformers, too, where that is
imported before or after granvit: it registers the model with AutoConfig, AutoModel, AutoModelForImageTextToText and
AutoProcessor.
"""

import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import GranViT, GranViTConfig, GranViTProcessor, VisionEncoder
    from .toy.tiny import build_tiny

__all__ = ["GranViT", "GranViTConfig", "GranViTProcessor", "VisionEncoder", "build_tiny"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("granvit")
        except PackageNotFoundError:
            raise AttributeError("granvit is not installed, only its folder is here: it has no version") from None
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from granvit import model

    return getattr(model, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AfterTransformers(MetaPathFinder):
    """Finds transformers as Python does, and has granvit.model imported once transformers has been."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "transformers" or self not in sys.meta_path:
            return None
        # Only the finders behind it: one of a reloaded granvit stands before it, and would ask this one again.
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(name, path, target) for finder in behind)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _register()

            spec.loader.exec_module = exec_module
        return spec


def _register() -> None:
    """Import granvit.model, which registers the model. Whoever only wants transformers is not to fail by that."""
    try:
        import granvit.model  # noqa: F401
    except Exception as error:
        warnings.warn(f"Auto classes know no GranViT: granvit.model can't be imported: {error}", stacklevel=2)


if sys.modules.get("transformers") is not None:
    _register()
else:
    sys.meta_path.insert(0, _AfterTransformers())
