"""HTML pages about data: one file, all pictures inside. Whatever a dataset says is escaped, cut and shown as text."""

from __future__ import annotations

import base64
import io
import unicodedata
from functools import lru_cache
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

LONGEST = 300
"""Characters of other people's text that a page shows."""


def render(template: str, package: str = "granvit.data", **values: Any) -> str:
    """A template in a package's folder html/, filled in; every string in `values` is escaped, and cut by `shown`.

    It may extend granvit.data's base.html.
    """
    return _environment(package).get_template(template).render(**values)


def shown(text: Any) -> str:
    """Text for a page: its first LONGEST characters, without control characters."""
    text = str(text)
    text = text if len(text) <= LONGEST else text[:LONGEST] + " …"
    return "".join(" " if unicodedata.category(letter) in ("Cc", "Cs") else letter for letter in text)


def data_uri(picture: Image.Image, long_side: int, quality: int = 80) -> Markup:
    """An RGB picture as a data: URI, a JPEG of at most `long_side` pixels a side."""
    picture = picture.copy()
    picture.thumbnail((long_side, long_side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return encoded(buffer.getvalue(), "jpeg")


def encoded(content: bytes, kind: str) -> Markup:
    """A picture's file as a data: URI; Markup, since nothing in it wants escaping or cutting."""
    return Markup(f"data:image/{kind};base64,{base64.b64encode(content).decode()}")


@lru_cache
def _environment(package: str) -> jinja2.Environment:
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader(name, "html") for name in (package, "granvit.data")])
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    return jinja2.Environment(loader=loader, finalize=_cut, **options)


def _cut(value: Any) -> Any:
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value
