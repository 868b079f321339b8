"""`granvit.questions.prompts` under the name that users' code knows."""

from granvit.questions.prompts import Question, describe_box, find_box, format_box, parse_box, questions

__all__ = ["Question", "describe_box", "find_box", "format_box", "parse_box", "questions"]
