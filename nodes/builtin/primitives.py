"""Nodes for plain values: numbers and texts that others take, and a view of any value."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

from mahlstick.nodes.schema import Returned, Widget, node
from mahlstick.nodes.values import AnyT


@node("utils/primitive", display_name="Int")
def PrimitiveInt(*, value: Annotated[int, Widget(min=-sys.maxsize, max=sys.maxsize, seed=True)]) -> int:
    """A whole number."""
    return value


@node("utils/primitive", display_name="Float")
def PrimitiveFloat(*, value: Annotated[float, Widget(min=-sys.maxsize, max=sys.maxsize, step=0.1)]) -> float:
    """A number."""
    return value


@node("utils/primitive", display_name="String")
def PrimitiveString(*, value: str) -> str:
    """A text of one line."""
    return value


@node("utils/primitive", display_name="String (Multiline)")
def PrimitiveStringMultiline(*, value: Annotated[str, Widget(multiline=True)]) -> str:
    """A text of several lines."""
    return value


@node("utils/primitive", display_name="Boolean")
def PrimitiveBoolean(*, value: bool) -> bool:
    """True or false."""
    return value


@node("utils/string", display_name="Concatenate")
def StringConcatenate(
    *,
    string_a: Annotated[str, Widget(multiline=True)],
    string_b: Annotated[str, Widget(multiline=True)],
    delimiter: str = "",
) -> str:
    """The first text, the delimiter, the second text."""
    return delimiter.join((string_a, string_b))


@node("utils", display_name="Preview as Text", is_output=True)
def PreviewAny(*, source: AnyT) -> str | Returned:
    """Shows a value of any kind as text: JSON where it can be, otherwise as Python prints it."""
    text = _as_text(source)
    return Returned((text,), ui={"text": (text,)})


def _as_text(source: Any) -> str:
    if source is None or isinstance(source, (str, int, float, bool)):
        return str(source)
    try:
        return json.dumps(source, indent=4)
    except (TypeError, ValueError, RecursionError):
        return str(source)
