"""Pictures that differ in one setting or two, side by side in a grid."""

from __future__ import annotations

import difflib
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from pydantic import Field, field_validator
from tqdm.auto import tqdm

from mahlstick.errors import MahlstickError
from mahlstick.pictures import save_png
from mahlstick.pipelines import generate as still
from mahlstick.pipelines import schedulers
from mahlstick.pipelines.generate import Result, StepCallback, generate
from mahlstick.pipelines.load import Loader, unet_config
from mahlstick.pipelines.recipe import GRID_KEY, Recipe, read_as
from mahlstick.pipelines.request import Request, Spec
from mahlstick.pipelines.sheet import contact_sheet

SIDE = 4096  # pixels; what the pictures of a grid take at most in width and in height
CELL = 160  # pixels; smaller pictures are shown larger
VALUES_LIMIT = 100  # of an axis

CHOICES = {"mode": ("balanced", "prompt", "control", "guess"), "blocks": ("all", "style", "layout")}
OWN = "own"  # in texts: the base model's scheduler

_WHOLE, _NUMBER, _NAME, _WORDS = "whole number", "number", "name", "words"
_KINDS = {
    "seed": _WHOLE,
    "steps": _WHOLE,
    "guidance": _NUMBER,
    "scheduler": _NAME,
    "strength": _NUMBER,
    "prompt": _WORDS,
    "negative_prompt": _WORDS,
}
_UNIT_KINDS = {
    "controls": {"scale": _NUMBER, "start": _NUMBER, "end": _NUMBER, "mode": _NAME, "adapter": _NAME},
    "image_prompts": {"scale": _NUMBER, "start": _NUMBER, "end": _NUMBER, "blocks": _NAME, "adapter": _NAME},
}
_UNIT = re.compile(r"(controls|image_prompts)\[(\d+)\]\.(\w+)")
_TITLES = {"scheduler": "sampler", "negative_prompt": "negative prompt", "adapter": "net"}

_ITEM = re.compile(r'\s*"((?:[^"]|"")*)"\s*(?=,|\n|$)|([^,\n]+)')
_WIDE_COMMA = "\uff0c"  # which Chinese keyboards write
_RANGE = re.compile(r"(-?[\d.]+)\s*-\s*(-?[\d.]+)\s*(?:\[(\d+)\]|\(\+?(-?[\d.]+)\))?")

Value = int | float | str | None


class Axis(Spec):
    """A field of a request, such as ``steps`` or ``controls[0].scale``, and the values that it takes in turn.

    ``prompt`` and ``negative_prompt`` are searched for the first value, which each value then replaces; a prompt that
    is empty is replaced as a whole. Of ``scheduler``, None is the base model's own.
    """

    field: str
    values: list[Value] = Field(min_length=1, max_length=VALUES_LIMIT)

    @field_validator("field")
    @classmethod
    def _known(cls, field: str) -> str:
        if _kind(field) is None:
            names = [*_KINDS, *(f"{units}[0].{name}" for units, kinds in _UNIT_KINDS.items() for name in kinds)]
            close = difflib.get_close_matches(field, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}"
            raise ValueError(f"{field!r} is nothing that can be compared; {hint}")
        return field

    @classmethod
    def parse(cls, field: str, text: str, names: Mapping[str, str] | None = None) -> Axis:
        """The axis that a person writes: ``0.2, 0.5, 1``, a range ``1-5``, one with its step ``1-2 (+0.5)`` or with how
        many ``0-1 [5]``, names, or words, in double quotes where a comma is in them.

        ``names`` are those that ``adapter`` may have, and what they mean. Raises :class:`MahlstickError`.
        """
        kind = _kind(field) or _WORDS
        name = field.rpartition(".")[2]
        items = list(_items(text if kind == _WORDS else text.replace(_WIDE_COMMA, ",")))
        if not items:
            raise MahlstickError(f"{_title(name)}: give the values to compare, {_EXAMPLES[kind]}")
        if kind in (_WHOLE, _NUMBER):
            values: list[Value] = [value for item in items for value in _numbers(item, kind, _title(name))]
        else:
            values = [_named(item, name, names) if kind == _NAME else item for item in items]
        values = list(dict.fromkeys(values))
        _check_count(_title(name), text, len(values))
        return cls(field=field, values=values)

    @property
    def name(self) -> str:
        """``controls[0].scale`` as ``control 1 scale``."""
        unit = _UNIT.fullmatch(self.field)
        if unit is None:
            return _title(self.field)
        return f"{unit[1].removesuffix('s').replace('_', ' ')} {int(unit[2]) + 1} {_title(unit[3])}"

    def label(self, value: Value) -> str:
        """A value as the grid shows it."""
        if self.field == "prompt":
            return str(value)
        return f"{self.name} {self._text(value)}"

    def text(self, names: Mapping[str, str] | None = None) -> str:
        """The values as :meth:`parse` reads them."""
        if _kind(self.field) == _WORDS:
            return ", ".join('"' + str(value).replace('"', '""') + '"' for value in self.values)
        shown = {meaning: name for name, meaning in (names or {}).items()}
        return ", ".join(shown.get(str(value)) or self._text(value) for value in self.values)

    def _text(self, value: Value) -> str:
        if value is None:
            return OWN
        if self.field.endswith(".adapter"):
            return Path(str(value)).name
        return f"{value:.10g}" if isinstance(value, float) else str(value) or "none"

    def check(self, request: Request) -> None:
        """Raises :class:`MahlstickError` where the request has nothing of which this is the axis."""
        unit = _UNIT.fullmatch(self.field)
        if unit is not None and int(unit[2]) >= len(getattr(request, unit[1])):
            count = len(getattr(request, unit[1]))
            raise MahlstickError(f"{self.field}: the request has {count} {unit[1]}, counted from 0; name one of them")
        if self.field == "strength" and request.init is None:
            raise MahlstickError("strength: nothing is repainted; give init, the picture to start from")
        if _kind(self.field) == _WORDS:
            searched, words = getattr(request, self.field), str(self.values[0])
            if searched and not (words and words in searched):
                raise MahlstickError(
                    f"{self.name}: {words!r} is not in the {self.name}; begin with words that are, and go on with"
                    " what replaces them"
                )

    def put(self, fields: dict[str, Any], value: Value) -> None:
        """Gives the field of a request, or that of one of its units, this value."""
        unit = _UNIT.fullmatch(self.field)
        if unit is not None:
            units = [_fields(spec) for spec in fields[unit[1]]]
            units[int(unit[2])] |= {unit[3]: value}
            fields[unit[1]] = units
        elif _kind(self.field) == _WORDS:
            searched = fields.get(self.field, "")
            fields[self.field] = searched.replace(str(self.values[0]), str(value)) if searched else value
        else:
            fields[self.field] = value


class GridRecipe(Recipe):
    """The recipe of a grid: that of the request from which its pictures differ, and its axes."""

    key: ClassVar[str] = GRID_KEY

    x: Axis
    y: Axis | None = None

    def text(self) -> dict[str, str]:
        """PNG text chunks, as :meth:`Recipe.text` has them, with the axes."""
        axes = " × ".join(f"{axis.name} {axis.text()}" for axis in (self.x, self.y) if axis is not None)
        text = super().text()
        return text | {"parameters": f"{text['parameters']}, Grid: {axes}"}


@dataclass(frozen=True)
class Comparison:
    """What was compared: ``results[j][i]`` has the j-th value of y and the i-th of x."""

    results: list[list[Result]]
    recipe: GridRecipe

    @property
    def picture(self) -> Image.Image:
        """All pictures in one, with labels."""
        rows = [[result.images[0] for result in row] for row in self.results]
        return grid(self.recipe.x, self.recipe.y, rows)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes :attr:`picture` as a PNG that carries its recipe. The single pictures are saved as every result is."""
        _check_target(path)
        return save_png(self.picture, Path(path), self.recipe.text())


def compare(
    request: Request,
    x: Axis | tuple[str, Sequence[Value]],
    y: Axis | tuple[str, Sequence[Value]] | None = None,
    *,
    pipe: Any = None,
    loader: Loader | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
    callback: StepCallback | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> Comparison:
    """Makes the request's first picture for each value of ``x`` and of ``y``: ``compare(request, ("steps", [4, 8]))``.

    Args:
        request: what all pictures have in common. A seed that it leaves open is drawn once for all.
        x: the field that differs from column to column, and its values; :class:`Axis` says which there are.
        y: the one that differs from row to row.
        pipe, loader, device, dtype, callback: as of :func:`generate`.
        progress: show a progress bar over the pictures.
        on_result: called with each picture's result, row after row.

    Each picture is bit for bit what :func:`generate` makes of its request alone. Raises :class:`MahlstickError` before
    the first one is made where a value does not do.
    """
    across = _axis(x)
    down = None if y is None else _axis(y)
    loader = loader or Loader()
    start = _single(still.open_pictures(request))
    requests = cells(start, across, down)
    _check_nets(requests, across, down, unet_config(request.base) if pipe is None else pipe.unet.config)
    base = pipe or loader.pipeline(request.base, device=device, dtype=dtype, config=request.base_config)
    for scheduler, steps in {(cell.scheduler, cell.steps) for row in requests for cell in row}:
        schedulers.check_steps(schedulers.build(scheduler, base.scheduler), steps)
    results: list[list[Result]] = []
    with tqdm(total=sum(map(len, requests)), desc="comparing", disable=not progress) as bar:
        for row in requests:
            results.append([])
            for cell in row:
                made = generate(cell, pipe=pipe, loader=loader, device=device, dtype=dtype, progress=False,
                                callback=callback)  # fmt: skip
                results[-1].append(made)
                bar.update()
                if on_result is not None:
                    on_result(made)
    return Comparison(results, _recipe(start, across, down, results))


def cells(request: Request, x: Axis, y: Axis | None = None) -> list[list[Request]]:
    """The requests of a grid's pictures, a row for each value of ``y``.

    Raises :class:`MahlstickError` where the request has nothing of which these are axes, or a value does not do.
    """
    if y is not None and y.field == x.field:
        raise MahlstickError(f"x and y: both are the {x.name}; choose another for one of them")
    axes = [x] if y is None else [x, y]
    for axis in axes:
        axis.check(request)
    rows: list[tuple[Value, ...]] = [()] if y is None else [(value,) for value in y.values]
    start = _single(request)
    return [[_changed(start, axes, (value, *row)) for value in x.values] for row in rows]


def read_grid(path: str | os.PathLike[str]) -> GridRecipe:
    """The recipe in a grid. Raises :class:`MahlstickError` where there is none, or it cannot be read."""
    return read_as(GridRecipe, path)


def grid(x: Axis, y: Axis | None, rows: Sequence[Sequence[Image.Image | None]], side: int = SIDE) -> Image.Image:
    """The pictures of ``rows`` with the axes' values as labels; None leaves a cell empty.

    They are shown at their own size, smaller where all together would be wider or higher than ``side`` pixels.
    """
    sizes = [picture.size for row in rows for picture in row if picture is not None] or [(CELL, CELL)]
    width, height = (max(sides) for sides in zip(*sizes, strict=True))
    factor = min(max(1.0, CELL / max(width, height)), side / (width * len(x.values)), side / (height * len(rows)))
    labels = [y.label(value) for value in y.values] if y is not None else [""]
    return contact_sheet(
        [x.label(value) for value in x.values],
        list(zip(labels, rows, strict=True)),
        cell=(max(1, round(width * factor)), max(1, round(height * factor))),
    )


def _axis(given: Axis | tuple[str, Sequence[Value]]) -> Axis:
    return given if isinstance(given, Axis) else Axis(field=given[0], values=list(given[1]))


def _kind(field: str) -> str | None:
    unit = _UNIT.fullmatch(field)
    return _KINDS.get(field) if unit is None else _UNIT_KINDS[unit[1]].get(unit[3])


def _title(field: str) -> str:
    return _TITLES.get(field, field)


# --- what a person writes

_EXAMPLES = {
    _WHOLE: "such as 4, 8 or 1-5",
    _NUMBER: "such as 0.5, 1 or 0-1 [5]",
    _NAME: "names with commas between",
    _WORDS: "words with commas between",
}


def _items(text: str) -> Iterator[str]:
    """What stands between commas and ends of lines; in double quotes a comma is part of it, and nothing is allowed."""
    for quoted, bare in _ITEM.findall(text):
        if bare.strip():
            yield bare.strip()
        elif not bare:
            yield quoted.replace('""', '"')


def _numbers(item: str, kind: str, title: str) -> Iterator[Value]:
    span = _RANGE.fullmatch(item)
    try:
        if span is None:
            yield _number(item, kind)
            return
        first, step, count = _span(span)
    except ValueError:
        raise MahlstickError(f"{title}: {item!r} is no {kind}; write values {_EXAMPLES[kind]}") from None
    _check_count(title, item, count)
    for i in range(count):
        yield round(first + i * step, None if kind == _WHOLE else 4)


def _number(item: str, kind: str) -> int | float:
    value = int(item) if kind == _WHOLE else float(item)
    if not math.isfinite(value):
        raise ValueError
    return value


def _span(span: re.Match[str]) -> tuple[float, float, int]:
    """First value, step and number of values of ``1-5``, ``1-5 (+2)`` and ``0-1 [5]``."""
    first, last = float(span[1]), float(span[2])
    if span[3]:
        return first, (last - first) / max(int(span[3]) - 1, 1), int(span[3])
    step = math.copysign(float(span[4] or 1), last - first)
    if step == 0:
        raise ValueError
    return first, step, int((last - first) / step + 1e-9) + 1


def _check_count(title: str, text: str, count: int) -> None:
    if not 1 <= count <= VALUES_LIMIT:
        raise MahlstickError(f"{title}: {text!r} are {count} values; give at most {VALUES_LIMIT}")


def _named(item: str, field: str, names: Mapping[str, str] | None) -> str | None:
    if field == "scheduler":
        if item.lower() == OWN:
            return None
        schedulers.resolve(item)
        return item
    known = names if names is not None else {name: name for name in CHOICES.get(field, (item,))}
    for name, meaning in known.items():
        if name.lower() == item.lower():
            return meaning
    raise MahlstickError(f"{_title(field)}: {item!r} is unknown; choose from {', '.join(known) or 'none'}")


# --- from a request to a grid


def _single(request: Request) -> Request:
    """The request for its first picture alone."""
    seed = request.seeds[0] if request.seeds is not None else request.seed
    drawn = secrets.randbelow(2**32) if seed is None else seed
    return request.model_copy(update={"images": 1, "batch": 1, "seeds": None, "seed": drawn})


def _fields(spec: Any) -> dict[str, Any]:
    return {**spec} if isinstance(spec, dict) else {name: getattr(spec, name) for name in spec.model_fields_set}


def _changed(request: Request, axes: Sequence[Axis], values: Sequence[Value]) -> Request:
    """All at once, since one value may do only together with the other."""
    fields = _fields(request)
    for axis, value in zip(axes, values, strict=True):
        axis.put(fields, value)
    return Request(**fields)


def _check_nets(requests: list[list[Request]], x: Axis, y: Axis | None, config: Any) -> None:
    """Kind and base of the adapters on an axis, from their headers, before the first picture is made."""
    for axis, shown in ((x, requests[0]), (y, [row[0] for row in requests])):
        unit = _UNIT.fullmatch(axis.field) if axis is not None else None
        if unit is None or unit[3] != "adapter":
            continue
        kind = "controlnet" if unit[1] == "controls" else "ip_adapter"
        for cell in shown:
            adapter = getattr(cell, unit[1])[int(unit[2])].adapter
            if isinstance(adapter, str):
                still.check_adapter(f"{unit[1]}[{unit[2]}]", kind, adapter, config)


def _recipe(start: Request, x: Axis, y: Axis | None, results: list[list[Result]]) -> GridRecipe:
    """That of the first picture, which has its input pictures and whatever the base decides, with what ``start`` had in
    place of the axes' first values."""
    first = results[0][0].recipe
    fields = _fields(first.request)
    for axis in (x, y):
        unit = _UNIT.fullmatch(axis.field) if axis is not None else None
        if axis is None:
            continue
        before = _value(start, axis.field)
        if unit is None and before is not None:
            fields[axis.field] = before
        elif unit is not None and (isinstance(before, str) or unit[3] != "adapter"):
            axis.put(fields, before)
    return GridRecipe(
        **_fields(first)
        | {
            "request": Request(**fields | {"seed": None, "seeds": [start.seed]}),
            "index": None,
            "files": {name: mark for row in results for made in row for name, mark in made.recipe.files.items()},
            "x": x,
            "y": y,
        }
    )


def _value(request: Request, field: str) -> Any:
    unit = _UNIT.fullmatch(field)
    return getattr(request, field) if unit is None else getattr(getattr(request, unit[1])[int(unit[2])], unit[3])


def _check_target(path: str | os.PathLike[str]) -> None:
    if Path(path).suffix.lower() != ".png":
        raise MahlstickError(f"{path}: a grid is kept in one PNG; end the name in .png")
    still.check_target(path)
