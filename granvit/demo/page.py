"""The page: gradio's components, and what happens when a picture is dropped, a box drawn or a patch clicked.

It is for one person on this machine, and loads nothing from elsewhere. Files are decoded by `decode_image` and by
nothing of gradio's; captions are shown as plain text.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import gradio as gr
from PIL import Image
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware

from granvit.data.files import MAX_BYTES
from granvit.demo.subject import Picture, Subject
from granvit.eval.maps import pca_picture, similarity_picture

POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'"
)
"""What a browser may load for this page: what it serves itself. gradio's own page names fonts and scripts elsewhere."""

CENTRE = (0.5, 0.5)

SURFACE = """
${value ? `<div class="surface"><img src="${value}" alt="the picture, to draw a box on" draggable="false">
<div class="box"></div></div>` : `<p class="empty">Drop a picture first.</p>`}
"""
SURFACE_CSS = """
.surface { position: relative; display: inline-block; cursor: crosshair; touch-action: none; user-select: none; }
.surface img { display: block; max-width: 100%; max-height: 560px; margin: 0; }
.box { display: none; position: absolute; box-sizing: border-box; border: 3px solid #dc2626; pointer-events: none;
  box-shadow: 0 0 0 1px white, inset 0 0 0 1px white; }
.empty { padding: 24px 0; opacity: 0.7; }
"""
CSS = ".gradio-container { width: 100%; max-width: 1120px !important; margin: 0 auto !important; }"


class LocalOnly:
    """ASGI middleware that sends `POLICY` with every answer."""

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def send_with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)


def launch(subject: Subject, port: int | None = None) -> tuple[gr.Blocks, str]:
    """Serve the page of a subject to this machine, and return it and its address. OSError where the port is taken."""
    page = build(subject)
    _, url, _ = page.launch(
        server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
        max_file_size=MAX_BYTES, enable_monitoring=False, mcp_server=False, footer_links=[], css=CSS,
        app_kwargs={"middleware": [Middleware(LocalOnly)]},
    )  # fmt: skip
    return page, url


def build(subject: Subject) -> gr.Blocks:
    """The page of a subject: two tabs that need a language model, where there is one, and two of maps."""
    with gr.Blocks(title="granvit", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(f"<h1>granvit</h1><p>{html.escape(subject.title)}</p>")
        picture = gr.State(time_to_live=3600)
        dropped = gr.Image(label="Picture", sources=["upload", "clipboard"], height=220, elem_id="dropped")
        # Functions are given the file's path, and gradio does not open it. (It writes a .pyi for each subclass.)
        dropped.preprocess = lambda payload: None if payload is None or not payload.path else str(payload.path)
        outputs: list[gr.components.Component] = [picture]
        if subject.model is not None:
            with gr.Tab("Caption a box"):
                outputs += _caption_tab(subject, picture)
            with gr.Tab("Find"):
                outputs += _find_tab(subject, picture)
        with gr.Tab("Similar patches"):
            outputs += _similarity_tab(subject, picture)
        with gr.Tab("Features in colours"):
            outputs += _colours_tab(subject)

        def show(path: str | None) -> list[Any]:
            shown = None if path is None else _said(subject.open, path)
            values: list[Any] = [shown]
            if subject.model is not None:
                values += ["", "", None, ""] if shown is None else [_data_url(shown.shown), "", shown.shown, ""]
            return values + _similar(subject, shown, CENTRE) + _colours(shown, len(subject.encoders))

        dropped.change(show, dropped, outputs, api_visibility="private")
    return page


def _caption_tab(subject: Subject, picture: gr.State) -> list[gr.components.Component]:
    gr.HTML("<p>Draw a box with the mouse or a finger.</p>")
    caption = gr.Textbox(label="Caption of the box", interactive=False, elem_id="caption")
    surface = gr.HTML(
        "", html_template=SURFACE, css_template=SURFACE_CSS, elem_id="surface",
        js_on_load=files("granvit.demo").joinpath("box.js").read_text(encoding="utf-8"),
    )  # fmt: skip

    def answer(shown: Picture | None, event: gr.EventData) -> str:
        box = event.box
        if shown is None or not isinstance(box, list) or not all(isinstance(v, int | float) for v in box):
            raise gr.Error("Drop a picture, then draw a box on it.")
        return _said(subject.caption, shown, box)

    surface.submit(answer, picture, caption, api_visibility="private")
    return [surface, caption]


def _find_tab(subject: Subject, picture: gr.State) -> list[gr.components.Component]:
    with gr.Row(equal_height=True):
        sentence = gr.Textbox(
            label="What to find", placeholder="a red circle", max_length=500, scale=4, elem_id="sentence"
        )
        button = gr.Button("Find", variant="primary", scale=1, min_width=120)
    result = _image("The box of the sentence", "found")
    line = gr.Textbox(label="Answer", interactive=False, elem_id="answer")

    def answer(shown: Picture | None, text: str) -> tuple[Image.Image, str]:
        if shown is None:
            raise gr.Error("Drop a picture first.")
        return _said(subject.find, shown, text)

    gr.on([button.click, sentence.submit], answer, [picture, sentence], [result, line], api_visibility="private")
    return [result, line]


def _similarity_tab(subject: Subject, picture: gr.State) -> list[gr.components.Component]:
    gr.HTML("<p>Click a patch, on any of the pictures.</p>")
    line = gr.Textbox(show_label=False, container=False, interactive=False, lines=2, elem_id="lowest")
    with gr.Row():
        original = _image("picture", "original")
        maps = [_image(name, f"similar-{name}") for name in subject.encoders]
    _say_comparison(subject)

    def answer(shown: Picture | None, event: gr.SelectData) -> list[Any]:
        if shown is None:
            raise gr.Error("Drop a picture first.")
        point = tuple(min((v + 0.5) / side, 1.0) for v, side in zip(event.index, shown.shown.size, strict=True))
        return _said(_similar, subject, shown, point)

    outputs = [line, original, *maps]
    for clicked in (original, *maps):
        clicked.select(answer, picture, outputs, api_visibility="private")
    return outputs


def _colours_tab(subject: Subject) -> list[gr.components.Component]:
    gr.HTML(
        "<p>The first three principal components of the patch features, as red, green and blue. Equal colours are "
        "similar features. Colours of two pictures can't be compared.</p>"
    )
    with gr.Row():
        maps = [_image(name, f"colours-{name}") for name in subject.encoders]
    _say_comparison(subject)
    return maps


def _similar(subject: Subject, shown: Picture | None, point: tuple[float, float]) -> list[Any]:
    """Values of the outputs of `_similarity_tab`."""
    if shown is None:
        return ["", None] + [None] * len(subject.encoders)
    maps = [similarity_picture(shown.shown, features, point) for features in shown.features]
    return [subject.lowest(shown, point), shown.shown, *maps]


def _colours(shown: Picture | None, count: int) -> list[Image.Image | None]:
    """Values of the outputs of `_colours_tab`."""
    return [None] * count if shown is None else [pca_picture(shown.shown, features) for features in shown.features]


def _say_comparison(subject: Subject) -> None:
    if subject.comparison:
        gr.HTML(f"<p>{html.escape(subject.comparison)}</p>")


def _image(label: str, elem_id: str) -> gr.Image:
    return gr.Image(
        label=label, interactive=False, format="png", buttons=["download", "fullscreen"], elem_id=elem_id, min_width=240
    )


def _said(function: Callable, *arguments: Any) -> Any:
    """What a function returns; what it has against its input is shown on the page, where it would be read as HTML."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
