"""Pictures that a person gives or draws, and masks painted above them: a component, and its value as pictures.

A value is ``{"picture": URL, "paint": URL}``, each a ``data:`` URL or None, or None where the canvas is empty. The
picture is the file that was given, byte for byte; the paint is a PNG above it, of a size of its own. canvas.js sets the
value in the browser as soon as a stroke has ended, so that a click finds it there.
"""

from __future__ import annotations

import html
import io
import json
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.i18n import I18nData
from PIL import Image

from mahlstick.errors import MahlstickError
from mahlstick.page.texts import words
from mahlstick.pipelines.request import data_url, decoded, open_picture

INK = "#000000"
PAINT = "#c8553d"
BLANK_SIDE = 512  # pixels
FILE_LIMIT = 32 * 1024 * 1024  # bytes

SCRIPT = Path(__file__).with_name("canvas.js").read_text(encoding="utf-8")

Value = dict[str, str | None] | None

_SWATCHES = {INK: "black", "#ffffff": "white", "#808080": "grey"}
_WORDS = ("upload", "camera", "pen", "eraser", "undo", "clear", "unreadable", "large")
_OTHER_WORDS = {"size": "pen_size", "shoot": "take_photo", "stop": "close_camera"}
_BASE64 = 4 / 3  # characters for a byte


def drawing(label: I18nData, **options: Any) -> gr.HTML:
    """A canvas for a picture that is uploaded, pasted, taken by the camera or drawn."""
    return _canvas(label, "draw_hint", mask=False, files=True, colours=_SWATCHES, **options)


def mask(label: I18nData, files: bool = False, **options: Any) -> gr.HTML:
    """A canvas for paint that is a mask, above a picture that comes from the server, or with ``files`` the person."""
    return _canvas(label, "mask_hint", mask=True, files=files, colours={PAINT: "pen"}, **options)


def _canvas(label: I18nData, hint: str, *, colours: dict[str, str], mask: bool, files: bool, **options: Any) -> gr.HTML:
    named = {name: name for name in _WORDS} | _OTHER_WORDS | colours | {"title": label, "hint": hint}
    settings = {"words": words(named), "colours": list(colours), "mask": mask, "files": files}
    # In the template, not as gr.HTML's props: gradio 6.31 forgets those at an update of anything else of the component.
    written = html.escape(json.dumps(settings, ensure_ascii=False)).replace("{", "&#123;")
    return gr.HTML(
        None,
        label=label,
        html_template=f'<div class="canvas{" canvas-mask" if mask else ""}" data-settings="{written}"></div>',
        js_on_load="mahlstickCanvas(element, props, watch)",
        apply_default_css=False,
        padding=False,
        **options,
    )


def background(value: Value) -> Image.Image | None:
    """The picture below the paint, as Pillow finds it in the file. Raises :class:`MahlstickError` where it is none."""
    url = _url(value, "picture")
    return open_picture(url, "picture", alpha=True) if url else None


def flattened(value: Value) -> Image.Image | None:
    """Picture and drawing as one, on white; None where the canvas is empty."""
    below, paint = background(value), _paint(value)
    if paint is None:
        return below
    canvas = (below or Image.new("RGB", paint.size, "white")).convert("RGBA")
    canvas.alpha_composite(paint.resize(canvas.size))
    return canvas.convert("RGB")


def painted(value: Value) -> Image.Image | None:
    """The paint as a mask of mode L, 255 where it covers; None where nothing is painted."""
    paint = _paint(value)
    if paint is None:
        return None
    below = background(value)
    return paint.getchannel("A").resize(below.size if below else paint.size)


def is_empty(value: Value) -> bool:
    """Whether there is neither a picture nor paint."""
    return not (value and value.get("picture")) and _paint(value) is None


def value(picture: Image.Image | None, mask: Image.Image | None = None) -> Value:
    """What a canvas shows: a picture, and paint where the mask is bright."""
    if picture is None:
        return None
    paint = None
    if mask is not None:
        paint = Image.new("RGBA", picture.size, PAINT)
        paint.putalpha(mask.convert("L").resize(picture.size))
    return {"picture": data_url(picture), "paint": None if paint is None else data_url(paint)}


def above(picture: Value, paint: Value = None) -> Value:
    """The canvas of a mask above what another canvas shows, white where that is empty; ``paint`` is the mask so far."""
    below = (picture or {}).get("picture")
    if _paint(picture) is not None or not below:
        below = data_url(flattened(picture) or Image.new("RGB", (BLANK_SIDE, BLANK_SIDE), "white"))
    return {"picture": below, "paint": (paint or {}).get("paint")}


def _url(value: Value, name: str) -> str | None:
    url = (value or {}).get(name)
    if url and not url.startswith("data:"):
        raise MahlstickError(f"{name}: should come from the canvas, not from elsewhere; give it again")
    if url and len(url) > FILE_LIMIT * _BASE64 + 100:
        raise MahlstickError(f"{name}: is larger than {FILE_LIMIT >> 20} MB; scale it down")
    return url


def _paint(value: Value) -> Image.Image | None:
    """As RGBA, where something is on it."""
    url = _url(value, "paint")
    if not url:
        return None
    try:
        with Image.open(io.BytesIO(decoded(url, "paint")), formats=["PNG"]) as found:
            paint = found.convert("RGBA")
    except (OSError, Image.DecompressionBombError) as error:
        raise MahlstickError("paint: is no PNG of a canvas; paint it again") from error
    return paint if paint.getchannel("A").getbbox() else None
