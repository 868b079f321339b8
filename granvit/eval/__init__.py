"""Evaluation: metrics, floors, and the report that shows both."""

from granvit.eval.baselines import floors
from granvit.eval.evaluation import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate", "floors"]
