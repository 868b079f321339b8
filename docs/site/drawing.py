"""A hook of mkdocs: formulas and diagrams without any other server.

Formulas become MathML, which browsers draw themselves. Diagrams are drawn by mermaid, which `make docs` puts into
build/; where it could not, the theme loads it from a public server.
"""

from __future__ import annotations

import html as escapes
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

MERMAID = Path(__file__).resolve().parents[2] / "build" / "mermaid.min.js"
PLACE = "assets/mermaid.min.js"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    if MERMAID.is_file():
        files.append(File.generated(config, PLACE, abs_src_path=str(MERMAID)))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def drawn(formula: re.Match[str]) -> str:
        tag, bracket, latex = formula.groups()
        drawing = convert(escapes.unescape(latex), display="inline" if bracket == "(" else "block")
        return f'<{tag} class="formula">{drawing}</{tag}>'

    return FORMULA.sub(drawn, html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Hand a page with a diagram our mermaid, before the theme's script asks for one. Other pages need not load it."""
    if 'class="mermaid"' not in output or not MERMAID.is_file():
        return output
    before, theme, after = output.partition('<script src="')
    return f'{before}<script src="{get_relative_url(PLACE, page.url)}"></script>{theme}{after}'
