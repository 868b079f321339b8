"""Evaluation: metrics, floors, and the report that shows both."""

from granvit.eval.baselines import floors

__all__ = ["floors"]
