"""Pictures to and from the folders of a run: ``/view`` and ``/upload``."""

from __future__ import annotations

import io
import json
import mimetypes
import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders
from mahlstick.nodes.files import whole
from mahlstick.pictures import MAX_PIXELS, load_picture

_SHOWN = ("image/", "video/", "audio/", "text/plain", "application/json")
_SCRIPTABLE = "image/svg+xml"  # may run scripts where it is opened
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

_naming = Lock()


def view(asked: Mapping[str, str]) -> Response:
    """A file, or with ``preview`` (``webp;90``) or ``channel`` (``rgb``, ``a``) a picture as these say.

    What a browser would run instead of showing it is offered for download.
    """
    path = folders.located(asked.get("filename", ""), asked.get("subfolder", ""), asked.get("type", "output"))
    if not os.path.isfile(path):
        raise HTTPException(404, f"There is no file {path.name}.")
    channel = asked.get("channel", "")
    if "preview" in asked:
        return _preview(path, asked["preview"], channel)
    if channel in ("rgb", "a"):
        return _channel(path, channel)
    kind = mimetypes.guess_type(path.name)[0] or ""
    shown = kind.startswith(_SHOWN) and kind != _SCRIPTABLE
    return FileResponse(
        path,
        media_type=kind if shown else "application/octet-stream",
        filename=path.name,
        content_disposition_type="inline" if shown else "attachment",
        headers={"X-Content-Type-Options": "nosniff"},
    )


def upload(form: Mapping[str, Any]) -> dict[str, str]:
    """Keep a picture or a video, by default in the input folder. A name that is taken gets a number, unless
    ``overwrite`` is given or the file there is the same."""
    name, content = _sent(form)
    return _kept(form, name, content)


def upload_mask(form: Mapping[str, Any]) -> dict[str, str]:
    """Keep the picture named by ``original_ref`` with the sent one's alpha channel as its own."""
    name, content = _sent(form)
    alpha = _opened(io.BytesIO(content), name).convert("RGBA").getchannel("A")
    path = folders.located(*_reference(form))
    if not os.path.isfile(path):
        raise HTTPException(404, f"There is no picture {path.name} for this mask.")
    original = _opened(path, path.name)
    if original.size != alpha.size:
        raise MahlstickError(f"{name} is {alpha.size}, {path.name} {original.size}; send a mask of the same size.")
    text = PngInfo()
    for key, value in getattr(original, "text", {}).items():
        text.add_text(key, value)
    masked = original.convert("RGBA")
    masked.putalpha(alpha)
    return _kept(form, name, _encoded(masked, "PNG", pnginfo=text))


def _preview(path: Path, wish: str, channel: str) -> Response:
    kind, quality = f"{wish};90".split(";")[:2]
    kind = "jpeg" if kind == "jpeg" and "a" not in channel else "webp"
    picture = _opened(path, path.name)
    alpha = kind == "webp" and channel != "rgb" and picture.has_transparency_data
    encoded = _encoded(
        picture.convert("RGBA" if alpha else "RGB"), kind, quality=min(100, int(quality)) if quality.isdecimal() else 90
    )
    return Response(encoded, media_type=f"image/{kind}")


def _channel(path: Path, channel: str) -> Response:
    """As PNG the colours alone, or the alpha channel alone over black."""
    picture = _opened(path, path.name)
    if channel == "rgb":
        picture = picture.convert("RGB")
    else:
        alpha = picture.convert("RGBA").getchannel("A")
        picture = Image.new("RGBA", picture.size)
        picture.putalpha(alpha)
    return Response(_encoded(picture, "PNG"), media_type="image/png")


def _opened(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(source, formats=_FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise MahlstickError(f"{name} has more than {MAX_PIXELS:,} pixels; use a smaller one.")
            picture.load()
            return picture
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise MahlstickError(f"{name} is no picture that can be opened; use a PNG, JPEG or WebP file.") from error


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _sent(form: Mapping[str, Any]) -> tuple[str, bytes]:
    """The file's name and content, which is what the name says, except that videos are not looked into."""
    image = form.get("image")
    if not isinstance(image, UploadFile) or not image.filename:
        raise MahlstickError("image is missing; send a picture as the form's file of that name.")
    name = image.filename
    kind = mimetypes.guess_type(name)[0] or ""
    if not kind.startswith(("image/", "video/")) or kind == _SCRIPTABLE:
        raise MahlstickError(f"{name!r} is not named as a picture or video; let it end in .png, .jpg, .webp or .mp4.")
    content = image.file.read()
    if kind.startswith("image/"):
        load_picture(content, name=repr(name))
    return name, content


def _reference(form: Mapping[str, Any]) -> tuple[str, str, str]:
    """The file name, subfolder and folder in ``original_ref``."""
    try:
        named = json.loads(form.get("original_ref") or "")
        return str(named["filename"]), str(named.get("subfolder", "")), str(named.get("type", "output"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MahlstickError("original_ref must be JSON with the filename of the masked picture.") from error


def _kept(form: Mapping[str, Any], name: str, content: bytes) -> dict[str, str]:
    """Write the file; ComfyUI's answer says where."""
    subfolder, kind = str(form.get("subfolder", "")), str(form.get("type", "input"))
    path = folders.inside(folders.own(kind), os.path.join(subfolder, name))
    with _naming:
        if form.get("overwrite") not in ("true", "1"):
            path = _free(path, content)
        if not _holds(path, content):
            with whole(path) as unfinished:
                unfinished.write_bytes(content)
    return {"name": os.path.join(os.path.dirname(name), path.name), "subfolder": subfolder, "type": kind}


def _free(wanted: Path, content: bytes) -> Path:
    """This path or, where another file has it, one with a number."""
    path, number = wanted, 0
    while os.path.exists(path) and not _holds(path, content):
        number += 1
        path = wanted.with_name(f"{wanted.stem} ({number}){wanted.suffix}")
    return path


def _holds(path: Path, content: bytes) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) == len(content) and path.read_bytes() == content
