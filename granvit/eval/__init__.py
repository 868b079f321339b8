"""Evaluation: metrics, floors, and the report that shows both.

The names below are imported with the first of them: models are found (granvit.eval.loading) where no dataset is read.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .baselines import floors
    from .evaluation import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate", "floors"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".baselines" if name == "floors" else ".evaluation", __name__), name)
