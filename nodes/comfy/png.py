"""Workflows in pictures, where ComfyUI keeps them: text chunks of a PNG, EXIF tags of a WebP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from mahlstick.errors import MahlstickError

SUFFIXES = {".png", ".webp"}
_KEYS = ("prompt", "workflow")  # API JSON, which was run, before what the page drew


def read(path: Path) -> dict[str, Any]:
    """The workflow in a picture: its API JSON, or where that is missing the saved one.

    Raises ``MahlstickError`` where there is neither.
    """
    texts = _texts(path)
    for key in _KEYS:
        try:
            found = json.loads(texts.get(key, "null"))
        except (ValueError, RecursionError) as error:
            raise MahlstickError(f"{path}: its {key} is damaged ({error}); use another picture.") from error
        if isinstance(found, dict) and found:
            return found
    raise MahlstickError(f"{path} holds no workflow; only pictures as ComfyUI or mahlstick saved them have one.")


def _texts(path: Path) -> dict[str, str]:
    try:
        with Image.open(path) as picture:
            if picture.format == "PNG":
                picture.load()  # chunks may follow the pixels
                return dict(getattr(picture, "text", {}))
            tags = [str(each) for each in picture.getexif().values()]
    except FileNotFoundError:
        raise MahlstickError(f"{path}: no such file; give a picture as ComfyUI or mahlstick saved it.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MahlstickError(f"{path}: not a readable picture ({error}); give one as ComfyUI saved it.") from error
    pairs = [tag.partition(":") for tag in tags]
    return {key.lower(): text for key, _, text in pairs}
