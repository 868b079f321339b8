"""HTML pages about data and runs: one file, all pictures inside. Whatever a dataset or a model says is escaped, cut and
shown as text; the only script that runs is ours, which the page's Content-Security-Policy names by its hash."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

LONGEST = 300
"""Characters of other people's text that a page shows."""


def render(template: str, package: str = "granvit.data", scripts: Sequence[str] = (), **values: Any) -> str:
    """A template in a package's folder html/, filled in; every string in `values` is escaped, and cut by `shown`.

    It may extend granvit.data's base.html, whose script is page.js and then `scripts`, files in the package's html/.
    """
    places = [("granvit.data", "page.js"), *((package, name) for name in scripts)]
    script = "".join(files(place).joinpath("html", name).read_text(encoding="utf-8") for place, name in places)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {"script": Markup(script), "script_source": Markup(f"'sha256-{digest}'")}
    return _environment(package).get_template(template).render(**own, **values)


def as_data(value: Any) -> Markup:
    """JSON for a <script type="application/json">, which no text in it can end. ValueError for a NaN."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


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
