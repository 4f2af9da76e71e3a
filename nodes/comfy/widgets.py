"""Which widgets a node has on ComfyUI's page, and how a saved workflow lists their values.

The list goes by the order of the node's inputs. Behind a seed stands one value more, which says how it changes after a
run, and at the end may stand what the page added, such as an upload button.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mahlstick.nodes.comfy.saved import Slot
from mahlstick.nodes.schema import Input

CONTROL = "control_after_generate"
_AFTER_A_RUN = ("fixed", "increment", "decrement", "randomize")
_OF_THE_PAGE = {CONTROL, "videopreview"}
_EMPTY = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}


@dataclass(frozen=True, eq=False)
class Field:
    """A widget: its name, the node's input where it is known, and in a subgraph also the node that has it."""

    name: str
    input: Input | None = None
    node: str = field(default="", kw_only=True)
    is_button: bool = field(default=False, kw_only=True)

    @property
    def is_seed(self) -> bool:
        """Whether a value that says how it changes stands behind its own."""
        asked = self.input is not None and bool(self.input.options.get(CONTROL))
        return asked or self.name in ("seed", "noise_seed")

    @property
    def default(self) -> Any:
        """What a new node holds there; None where that is not known."""
        if self.input is None:
            return None
        first = self.input.choices[0] if self.input.choices else None
        return self.input.options.get("default", first if self.input.choices is not None else _EMPTY[self.input.type])


def fields(inputs: Iterable[Input], slots: Iterable[Slot]) -> list[Field]:
    """A node's widgets in order: those among the inputs of its kind, and those that the file alone tells of."""
    known = [Field(each.name, each) for each in inputs if each.is_widget]
    names = {each.name for each in known} | _OF_THE_PAGE
    told = [slot for slot in slots if slot.widget and slot.name not in names]
    return known + [Field(slot.name, is_button=slot.type.endswith("UPLOAD")) for slot in told]


def read(values: list[Any] | dict[str, Any], widgets: Sequence[Field]) -> tuple[dict[Field, Any], list[Any]]:
    """The value of each widget as far as the file goes, and what is left over.

    Named values may be of widgets that are in no schema: such nodes add them on the page, and take them as inputs.
    """
    if isinstance(values, dict):
        known = {each.name: each for each in widgets}
        return {known.get(n, Field(n)): v for n, v in values.items() if n not in _OF_THE_PAGE and v is not None}, []
    left = list(values)
    found: dict[Field, Any] = {}
    for place, each in enumerate(widgets, start=1):
        if not left:
            break
        found[each] = left.pop(0)
        if left and _says_how_to_go_on(left[0], each, too_many=len(left) > len(widgets) - place):
            del left[0]
    return {each: value for each, value in found.items() if value is not None and not each.is_button}, left


def _says_how_to_go_on(value: Any, widget: Field, *, too_many: bool) -> bool:
    """Whether a value behind a widget's own tells how that changes after a run; the oldest files have a bool there."""
    if isinstance(value, bool):
        return widget.is_seed and too_many
    return value in _AFTER_A_RUN and (widget.is_seed or (widget.input is None and too_many))
