"""Contact sheets: labelled rows and columns of pictures."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mahlstick.pictures import resize

_MARGIN = 12
_LABEL = 132  # width of the row labels
_TEXT = 15  # height of the letters' line
_LINES = 6  # of a label
_INK, _PAPER, _FRAME = "#222222", "#ffffff", "#d5d5d5"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


# With Chinese letters, by their files' names on Linux, Windows and macOS; Pillow looks where systems keep fonts.
_SYSTEM_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "SourceHanSansSC-Regular.otf", "wqy-microhei.ttc",
    "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "msyh.ttc", "simsun.ttc", "PingFang.ttc", "Hiragino Sans GB.ttc",
    "STHeiti Light.ttc", "Arial Unicode.ttf",
)  # fmt: skip
_NO_LETTER = "\uffff"


def _font(size: int, text: str) -> Font:
    """Pillow's own, or the system's that has the most letters of a text."""
    own, letters = _loaded(None, size), set(text)
    if all(_has(own, letter) for letter in letters):
        return own
    found = [font for name in _SYSTEM_FONTS if (font := _loaded(name, size)) is not None]
    return max([own, *found], key=lambda font: sum(_has(font, letter) for letter in letters))


@lru_cache(maxsize=64)
def _loaded(name: str | None, size: int) -> Any:
    """None where the system has no such font."""
    try:
        return ImageFont.load_default(size) if name is None else ImageFont.truetype(name, size)
    except OSError:
        return None


@lru_cache(maxsize=4096)
def _has(font: Font, letter: str) -> bool:
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask(_NO_LETTER))


def _drawable(text: str, font: Font) -> str:
    """The text with a code, such as \\u72d0, in place of each letter that the font lacks."""
    return "".join(
        letter if _has(font, letter) else letter.encode("ascii", "backslashreplace").decode() for letter in text
    )


def contact_sheet(
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Image.Image | None]]],
    cell: int | tuple[int, int] = 160,
) -> Image.Image:
    """A sheet with a header over each column and a label before each row; the letters grow with large cells.

    Args:
        columns: header texts.
        rows: (label, one picture a column; None leaves the cell empty). Without any label there is no place for them.
        cell: side, or (width, height), of a cell in pixels; pictures are fitted into it whole.
    """
    width, height = (cell, cell) if isinstance(cell, int) else cell
    text = max(_TEXT, min(width, height) // 16)
    font = _font(text, "".join([*columns, *(label for label, _ in rows)]))
    label_width = _LABEL * text // _TEXT if any(label for label, _ in rows) else 0
    heads = [_wrapped(_drawable(title, font), font, width) for title in columns]
    lines = max((head.count("\n") + 1 for head in heads), default=1)
    header = 34 * text // _TEXT + (lines - 1) * _line(text)
    step = width + _MARGIN
    sheet = Image.new(
        "RGB", (_MARGIN + label_width + len(columns) * step, header + len(rows) * (height + _MARGIN) + _MARGIN), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for j, head in enumerate(heads):
        centre = _MARGIN + label_width + j * step + width // 2
        draw.multiline_text(
            (centre, header // 2 + 2), head, _INK, font, anchor="mm", align="center", spacing=_line(text) - text
        )
    for i, (label, pictures) in enumerate(rows):
        top = header + i * (height + _MARGIN)
        shown = _wrapped(_drawable(label, font), font, label_width - _MARGIN)
        draw.multiline_text((_MARGIN, top + height // 2), shown, _INK, font, anchor="lm", spacing=_line(text) - text)
        for j, picture in enumerate(pictures):
            if picture is not None:
                _place(sheet, draw, picture, (_MARGIN + label_width + j * step, top), (width, height))
    return sheet


def strip(frames: Sequence[Image.Image], height: int = 96) -> Image.Image:
    """Frames of one size side by side."""
    gap = 4
    width = max(1, round(frames[0].width * height / frames[0].height))
    shown = Image.new("RGB", (len(frames) * (width + gap) - gap, height), _PAPER)
    for i, frame in enumerate(frames):
        shown.paste(resize(frame.convert("RGB"), (width, height)), (i * (width + gap), 0))
    return shown


def _line(text: int) -> int:
    """The distance of two lines."""
    return text * 5 // 4


def _wrapped(text: str, font: Font, width: int) -> str:
    """The text in lines of at most ``width`` pixels, broken within words where there is no space, as in Chinese."""
    rest = " ".join(text.split())
    lines: list[str] = []
    while rest and len(lines) < _LINES:
        lengths = range(1, min(len(rest), width) + 1)
        fits = max(1, bisect_right(lengths, width, key=lambda n: math.ceil(font.getlength(rest[:n]))))
        space = rest.rfind(" ", 0, fits + 1)
        end = space if fits < len(rest) and space > 0 else fits
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if rest:
        lines[-1] = lines[-1][:-1] + "…"
    return "\n".join(lines)


def _place(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, picture: Image.Image, corner: tuple[int, int], cell: tuple[int, int]
) -> None:
    ratio = min(cell[0] / picture.width, cell[1] / picture.height)
    size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    left, top = corner[0] + (cell[0] - size[0]) // 2, corner[1] + (cell[1] - size[1]) // 2
    sheet.paste(resize(picture.convert("RGB"), size), (left, top))
    draw.rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline=_FRAME)
