"""Pictures that a person gives or draws, and masks painted above them: components, and their values as pictures.

The value of a canvas is ``{"picture": URL, "paint": URL}``, each a ``data:`` URL or None, or None where it is empty.
The picture is the file that was given, byte for byte; the paint is a PNG above it, of a size of its own. That of a
strip is a list of such URLs, or None. canvas.js sets a value in the browser as soon as a stroke has ended or a file is
read, and a click waits for it, so that it is found there.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
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
StripValue = list[str] | None

_SWATCHES = {INK: "black", "#ffffff": "white", "#808080": "grey"}
_WORDS = ("upload", "camera", "pen", "eraser", "undo", "clear", "remove", "unreadable", "large")
_OTHER_WORDS = {"size": "pen_size", "shoot": "take_photo", "stop": "close_camera"}
_BASE64 = 4 / 3  # characters for a byte


def drawing(label: I18nData, **options: Any) -> gr.HTML:
    """A canvas for a picture that is uploaded, pasted, taken by the camera or drawn."""
    return _canvas(label, "draw_hint", mask=False, files=True, colours=_SWATCHES, **options)


def mask(label: I18nData, files: bool = False, **options: Any) -> gr.HTML:
    """A canvas for paint that is a mask, above a picture that comes from the server, or with ``files`` the person."""
    return _canvas(label, "mask_hint", mask=True, files=files, colours={PAINT: "pen"}, **options)


def strip(label: I18nData, several: bool = True, **options: Any) -> gr.HTML:
    """Pictures side by side that are uploaded, pasted or taken by the camera; at most one without ``several``."""
    words = {"title": label, "hint": "strip_hint" if several else "strip_hint_one"}
    return _component("Strip", words, {"several": several, "files": True}, **options)


def _canvas(label: I18nData, hint: str, *, colours: dict[str, str], mask: bool, files: bool, **options: Any) -> gr.HTML:
    settings = {"colours": list(colours), "mask": mask, "files": files}
    return _component("Canvas", colours | {"title": label, "hint": hint}, settings, **options)


def _component(kind: str, named: Mapping[str, Any], settings: Mapping[str, Any], **options: Any) -> gr.HTML:
    """A component of canvas.js, with the texts of the page that it shows."""
    texts = words({name: name for name in _WORDS} | _OTHER_WORDS | dict(named))
    # In the template, not as gr.HTML's props: gradio 6.31 forgets those at an update of anything else of the component.
    written = html.escape(json.dumps({"words": texts, **settings}, ensure_ascii=False)).replace("{", "&#123;")
    classes = "canvas canvas-mask" if settings.get("mask") else "canvas"
    return gr.HTML(
        None,
        label=named["title"],
        html_template=f'<div class="{classes}" data-settings="{written}"></div>',
        js_on_load=f"mahlstick{kind}(element, props, watch)",
        apply_default_css=False,
        padding=False,
        **options,
    )


def background(value: Value) -> Image.Image | None:
    """The picture below the paint, as Pillow finds it in the file. Raises :class:`MahlstickError` where it is none."""
    url = _checked((value or {}).get("picture"), "picture")
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


def pictures(value: StripValue) -> list[Image.Image]:
    """What a strip shows. Raises :class:`MahlstickError` where one is no picture."""
    return [open_picture(_checked(url, "picture"), "picture") for url in value or ()]


def strip_value(pictures: Sequence[Image.Image]) -> StripValue:
    """What a strip is to show."""
    return [data_url(picture) for picture in pictures] or None


def _checked(url: str | None, name: str) -> str | None:
    """Raises :class:`MahlstickError` where it is not from the browser, or too long."""
    if url and not url.startswith("data:"):
        raise MahlstickError(f"{name}: should come from the canvas, not from elsewhere; give it again")
    if url and len(url) > FILE_LIMIT * _BASE64 + 100:
        raise MahlstickError(f"{name}: is larger than {FILE_LIMIT >> 20} MB; scale it down")
    return url


def _paint(value: Value) -> Image.Image | None:
    """As RGBA, where something is on it."""
    url = _checked((value or {}).get("paint"), "paint")
    if not url:
        return None
    try:
        with Image.open(io.BytesIO(decoded(url, "paint")), formats=["PNG"]) as found:
            paint = found.convert("RGBA")
    except (OSError, Image.DecompressionBombError) as error:
        raise MahlstickError("paint: is no PNG of a canvas; paint it again") from error
    return paint if paint.getchannel("A").getbbox() else None
