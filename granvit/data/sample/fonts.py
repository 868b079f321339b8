"""Fonts for generated pages: files of installed packages, all free to publish pictures with."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from PIL import ImageFont

_FONTS = {  # package: (folder in it, files); the licences stand in README.md beside this file
    "matplotlib": (
        "mpl-data/fonts/ttf",
        "DejaVuSans.ttf DejaVuSans-Bold.ttf DejaVuSans-Oblique.ttf DejaVuSans-BoldOblique.ttf "
        "DejaVuSansMono.ttf DejaVuSansMono-Bold.ttf DejaVuSansMono-Oblique.ttf "
        "DejaVuSansMono-BoldOblique.ttf DejaVuSerif.ttf DejaVuSerif-Bold.ttf DejaVuSerif-Italic.ttf "
        "DejaVuSerif-BoldItalic.ttf STIXGeneral.ttf STIXGeneralBol.ttf STIXGeneralItalic.ttf "
        "STIXGeneralBolIta.ttf",
    ),
    "font_caladea": (
        "files",
        "Caladea-Regular.ttf Caladea-Bold.ttf Caladea-Italic.ttf Caladea-BoldItalic.ttf",
    ),
    "font_hanken_grotesk": (
        "files",
        "HankenGrotesk-Light.otf HankenGrotesk-Regular.otf HankenGrotesk-Medium.otf "
        "HankenGrotesk-SemiBold.otf HankenGrotesk-Bold.otf HankenGrotesk-Italic.otf "
        "HankenGrotesk-BoldItalic.otf",
    ),
    "font_amatic_sc": ("files", "AmaticSC-Bold.ttf"),
    "font_fredoka_one": ("files", "FredokaOne-Regular.ttf"),
}

FONTS = tuple((package, name) for package, (_, names) in _FONTS.items() for name in names.split())
MONOSPACED = tuple(font for font in FONTS if "Mono" in font[1])


@cache
def font(package: str, name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of `FONTS` at a size in pixels. Raises RuntimeError where its package is not installed."""
    # find_spec, not import: only the packages' files are needed, and matplotlib takes a second to import.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"pages are drawn with fonts of the package {package}, which is not installed")
    return ImageFont.truetype(Path(spec.origin).parent / _FONTS[package][0] / name, size)
