"""python bench/pages.py REPORT.html AUDIT.html: photographs of both, as docs/figures/report.png and docs/audit.png.

Needs playwright and a Chromium. Left a wide page by day, right a phone's by night, further down."""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

DOCS = Path(__file__).parents[1] / "docs"
HEIGHT = 1000


def main(report: str, audit: str) -> None:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for page, place, target in (
            (report, ".places >> nth=1", DOCS / "figures" / "report.png"),
            (audit, ".cards", DOCS / "audit.png"),
        ):
            wide = _photograph(browser, page, 1180, "light")
            phone = _photograph(browser, page, 390, "dark", place)
            both = Image.new("RGB", (wide.width + 20 + phone.width, HEIGHT), "white")
            both.paste(wide, (0, 0))
            both.paste(phone, (wide.width + 20, 0))
            both.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)
        browser.close()


def _photograph(browser: Browser, page: str, width: int, scheme: str, place: str | None = None) -> Image.Image:
    """HEIGHT pixels of a page from its top, or from the first `place` on."""
    tab = browser.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
    tab.goto(Path(page).resolve().as_uri())
    if place:
        tab.locator(place).first.evaluate("element => element.scrollIntoView()")
    tab.wait_for_timeout(500)  # pictures are decoded when they come into view
    content = tab.screenshot()
    tab.close()
    return Image.open(io.BytesIO(content)).convert("RGB")


if __name__ == "__main__":
    main(*sys.argv[1:])
