"""Pictures that a person draws and paints: the editor's value as pictures, and back."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

INK = "#000000"
PAINT = "#c8553d"

Value = dict[str, Any] | None


def drawing(label: gr.I18nData, **options: Any) -> gr.ImageEditor:
    """An editor for a picture that is uploaded, pasted, taken by the camera or drawn."""
    brush = gr.Brush(default_size=12, colors=[INK, "#ffffff", "#808080"], default_color=INK, color_mode="fixed")
    return _editor(label, sources=("upload", "clipboard", "webcam"), brush=brush, **options)


def mask(label: gr.I18nData, sources: tuple[str, ...] = (), **options: Any) -> gr.ImageEditor:
    """An editor for paint that is a mask, over a picture."""
    brush = gr.Brush(default_size=40, colors=[PAINT], default_color=PAINT, color_mode="fixed")
    return _editor(label, sources=sources, brush=brush, **options)


def _editor(label: gr.I18nData, **options: Any) -> gr.ImageEditor:
    return gr.ImageEditor(
        label=label,
        type="pil",
        format="png",  # what is sent back to the browser must not lose a bit
        layers=False,
        transforms=(),
        canvas_size=(512, 512),
        height=320,
        buttons=[],
        **options,
    )


def background(value: Value) -> Image.Image | None:
    """The picture below the paint."""
    return _visible(value.get("background")) if value else None


def flattened(value: Value) -> Image.Image | None:
    """Picture and drawing as one, on white; None where the canvas is empty."""
    layers = _layers(value)
    below = background(value)
    if below is None and not layers:
        return None
    canvas = (below or Image.new("RGBA", layers[0].size, "white")).convert("RGBA")
    if not layers:
        return below
    for layer in layers:
        canvas.alpha_composite(layer.resize(canvas.size))
    return canvas.convert("RGB")


def painted(value: Value) -> Image.Image | None:
    """The paint as a mask of mode L, 255 where it is; None where nothing is painted."""
    layers = _layers(value)
    if not layers:
        return None
    below = background(value)
    found = Image.new("L", below.size if below else layers[0].size)
    for layer in layers:
        alpha = layer.getchannel("A").resize(found.size)
        found.paste(255, mask=alpha.point(lambda opacity: 255 * (opacity > 127)))
    return found


def value(picture: Image.Image | None, mask: Image.Image | None = None) -> Value:
    """What an editor shows: a picture, and paint where the mask is bright."""
    if picture is None:
        return None
    layers = []
    if mask is not None:
        paint = Image.new("RGBA", picture.size, PAINT)
        paint.putalpha(mask.convert("L").resize(picture.size))
        layers.append(paint)
    return {"background": picture, "layers": layers, "composite": None}


def _layers(value: Value) -> list[Image.Image]:
    """Those with something on them."""
    layers = [layer.convert("RGBA") for layer in (value or {}).get("layers") or []]
    return [layer for layer in layers if layer.getchannel("A").getbbox()]


def _visible(picture: Image.Image | None) -> Image.Image | None:
    """None for the empty background that the editor sends where nothing was uploaded."""
    if picture is None or (picture.mode == "RGBA" and not picture.getchannel("A").getbbox()):
        return None
    return picture
