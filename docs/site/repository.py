"""A hook of mkdocs: the site's pages that are not in docs/, and the links that lead to them.

Files of the repository link to each other by relative paths, as a repository viewer follows them. On the site README.md
is the start page, other files of text that a page links to are pages under source/, and the rest is copied there. Links
are rewritten to where their files lie on the site.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
CODE = {".py": "python", "": "text"}  # suffixes of files that are shown as code, and their languages
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md, CONTRIBUTING.md and CHANGELOG.md, and whatever these and the pages of docs/ link to."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()] + list(PAGES)
    for path in PAGES:
        files.append(_file(path, config))
    for path in waiting:  # grows: pages out of docs/ have links too
        text = (ROOT / path).read_text(encoding="utf-8")
        for target in _targets(path, text):
            if files.get_file_from_path(_place(target)) is None and (ROOT / target).is_file():
                files.append(_file(target, config))
                if target.endswith(".md"):
                    waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links of a page of the repository to the places of their files on the site."""
    here = page.file.src_uri
    path = page.meta.get("path", f"docs/{here}")

    def led(link: re.Match[str]) -> str:
        place = _place(_resolve(path, link[1]))
        return link[1] if files.get_file_from_path(place) is None else posixpath.relpath(place, posixpath.dirname(here))

    return LINK.sub(led, markdown) if path.endswith(".md") else markdown


def _targets(path: str, text: str) -> Iterator[str]:
    return (_resolve(path, link) for link in LINK.findall(text))


def _resolve(path: str, link: str) -> str:
    """The file that a link in the file `path` leads to; both relative to the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def _place(path: str) -> str:
    """Where a file of the repository lies on the site, as a source of mkdocs."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    suffix = ".md" if Path(path).suffix in CODE else ""
    return PAGES.get(path, f"source/{path}{suffix}")


def _file(path: str, config: MkDocsConfig) -> File:
    """A file out of docs/ as mkdocs takes it: a page, with its path in the page's metadata, or a copy."""
    suffix = Path(path).suffix
    if suffix != ".md" and suffix not in CODE:
        return File.generated(config, _place(path), abs_src_path=str(ROOT / path))
    text = (ROOT / path).read_text(encoding="utf-8")
    hidden = "" if path in PAGES else "search: {exclude: true}\n"
    if suffix in CODE:
        text = f"# {path}\n\n~~~~~~~~ {{.{CODE[suffix]} linenums=1}}\n{text}\n~~~~~~~~\n"
    return File.generated(config, _place(path), content=f"---\npath: {path}\n{hidden}---\n{text}")
