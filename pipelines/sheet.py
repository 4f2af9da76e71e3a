"""Contact sheets: labelled rows and columns of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

from mahlstick.pictures import resize

_MARGIN = 12
_LABEL = 132  # width of the row labels
_HEADER = 34
_INK, _PAPER, _FRAME = "#222222", "#ffffff", "#d5d5d5"


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def contact_sheet(
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Image.Image | None]]],
    cell: int = 160,
) -> Image.Image:
    """A sheet with a header over each column and a label before each row.

    Args:
        columns: header texts.
        rows: (label, one picture a column; None leaves the cell empty).
        cell: side of a cell in pixels; pictures are fitted into it whole.
    """
    step = cell + _MARGIN
    width = _MARGIN + _LABEL + len(columns) * step
    sheet = Image.new("RGB", (width, _HEADER + len(rows) * step + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for j, title in enumerate(columns):
        centre = _MARGIN + _LABEL + j * step + cell // 2
        draw.text((centre, _HEADER // 2 + 2), title, _INK, _font(15), anchor="mm")
    for i, (label, pictures) in enumerate(rows):
        top = _HEADER + i * step
        text = "\n".join(wrap(label, 16)[:6])
        draw.multiline_text((_MARGIN, top + cell // 2), text, _INK, _font(15), anchor="lm")
        for j, picture in enumerate(pictures):
            if picture is not None:
                _place(sheet, draw, picture, (_MARGIN + _LABEL + j * step, top), cell)
    return sheet


def _place(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, picture: Image.Image, corner: tuple[int, int], cell: int
) -> None:
    ratio = cell / max(picture.size)
    size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    left, top = corner[0] + (cell - size[0]) // 2, corner[1] + (cell - size[1]) // 2
    sheet.paste(resize(picture.convert("RGB"), size), (left, top))
    draw.rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline=_FRAME)
