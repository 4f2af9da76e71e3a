"""What an annotator can be told, read from its function's signature."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from mahlstick.errors import MahlstickError


@dataclass(frozen=True)
class Range:
    """The numbers an option may take, both ends included: ``Annotated[int, Range(0, 255)]``."""

    low: float
    high: float


@dataclass(frozen=True)
class Option:
    """One keyword of an annotator. ``type`` is int, float, bool, str or object (a mask, which is a picture)."""

    name: str
    type: type
    default: Any
    range: Range | None = None
    choices: tuple[str, ...] = ()

    def read(self, value: Any) -> Any:
        """The value in the option's type; words from a command line become numbers. Raises MahlstickError."""
        if self.type is object or value == self.default:
            return value
        converted = self._convert(value)
        if converted is None:
            raise MahlstickError(f"{self.name} is {value!r}; give {self.expects}")
        return converted

    @property
    def expects(self) -> str:
        """What to give, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        nouns = {int: "a whole number", float: "a number", bool: "true or false", str: "words"}
        noun = nouns.get(self.type, "a picture")
        return f"{noun} from {self.range.low:.10g} to {self.range.high:.10g}" if self.range else noun

    def _convert(self, value: Any) -> Any:
        """The converted value, or None where there is none."""
        if self.type is str:
            return str(value) if not self.choices or value in self.choices else None
        if self.type is bool:
            words = {"true": True, "yes": True, "false": False, "no": False}
            return value if isinstance(value, bool) else words.get(str(value).lower())
        if isinstance(value, bool):
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            return None
        whole = math.isfinite(number) and number.is_integer()
        inside = self.range is None or self.range.low <= number <= self.range.high  # false for NaN
        if not inside or (self.type is int and not whole):
            return None
        return self.type(number)


def read_options(function: Callable[..., Any]) -> dict[str, Option]:
    """The keyword-only parameters of a function as options, in order."""
    hints = get_type_hints(function, include_extras=True)
    return {
        name: _option(name, hints[name], parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _option(name: str, hint: Any, default: Any) -> Option:
    if get_origin(hint) is Annotated:
        kind, limits = get_args(hint)
        return Option(name, kind, default, range=limits)
    if get_origin(hint) is Literal:
        return Option(name, str, default, choices=get_args(hint))
    return Option(name, hint if hint in (int, float, bool, str) else object, default)
