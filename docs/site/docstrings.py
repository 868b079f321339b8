"""An extension of griffe: docstrings as this repository writes them, in the Google style that mkdocstrings reads.

They name parameters at the beginnings of lines, with shapes behind the names, let Returns and Raises begin without a
blank line, and show examples as Python's prompt does.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"(Args|Returns|Raises|Attributes):$|(Returns|Raises) ")
ITEM = re.compile(r"(\w+(?:, \w+)*)(?: [^:.]*)?: ")  # names and perhaps shapes before a colon
POWER = re.compile(r"(?<=\w)\*\*(?=[\w-])")  # Markdown would take two of them for bold type


class HouseStyle(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            names = {parameter.name for parameter in obj.parameters} if obj.is_function or obj.is_class else set()
            obj.docstring.value = google(obj.docstring.value, names)


def google(text: str, parameters: set[str]) -> str:
    """The text with the parameters' lines in a section Args, a blank line before each section, and code in fences."""
    lines: list[str] = []
    items = example = False
    for line in POWER.sub(r"\\*\\*", text).splitlines():
        item = ITEM.match(line)
        if example and not line:
            lines.append("```")
            example = False
        if line.startswith(">>> ") and not example:
            lines += ["", "```pycon"]
            items, example = False, True
        elif SECTION.match(line):
            lines.append("")
            items = False
        elif not example and item and parameters.issuperset(item[1].split(", ")):
            if not items:
                lines += ["", "Args:"]
            items = True
            line = f"    {line}"
        elif not line:
            items = False
        elif items:
            line = f"        {line.strip()}"
        lines.append(line)
    return "\n".join([*lines, "```"] if example else lines)
