"""The workflow file that ComfyUI's page saves, as far as its meaning goes: nodes, links, subgraphs, group nodes.

Reads version 0.4 (links as arrays) and 1 (links as objects). Where things stand on the page is left out, and so are
the page's own reroutes, which are points on a link that goes through from end to end.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mahlstick.errors import MahlstickError

NEVER, BYPASSED = 2, 4  # a node's mode: left out, or passed by
INPUTS, OUTPUTS = "-10", "-20"  # the ends of a subgraph, as its links name them


class _Saved(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value


class Slot(_Saved):
    """An input or output. ``widget`` is there where the input is a widget's too."""

    name: str = ""
    type: str = "*"
    link: str | None = None
    widget: dict[str, Any] | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _only_words(cls, value: Any) -> Any:
        return value if isinstance(value, str) else "*"


class Link(_Saved):
    """From a node's output to a node's input."""

    id: str
    origin_id: str
    origin_slot: int = Field(ge=0)
    target_id: str
    target_slot: int

    @model_validator(mode="before")
    @classmethod
    def _from_array(cls, value: Any) -> Any:
        return dict(zip(cls.model_fields, value, strict=False)) if isinstance(value, list) else value


class Node(_Saved):
    id: str
    type: str
    mode: int = 0
    order: int = 0
    title: str = ""
    inputs: list[Slot] = Field(default_factory=list)
    outputs: list[Slot] = Field(default_factory=list)
    properties: dict[str, Any] = Field(default_factory=dict)
    widgets_values: list[Any] | dict[str, Any] = Field(default_factory=list)
    widgets_values_named: dict[str, Any] = Field(default_factory=dict)

    @property
    def values(self) -> list[Any] | dict[str, Any]:
        """What its widgets hold, by name where the file tells the names."""
        return self.widgets_values_named or self.widgets_values


class _Definitions(_Saved):
    subgraphs: list[Definition] = Field(default_factory=list)


class Graph(_Saved):
    nodes: list[Node]
    links: list[Link] = Field(default_factory=list)
    definitions: _Definitions = Field(default_factory=_Definitions)

    @field_validator("links", mode="before")
    @classmethod
    def _those_there(cls, value: Any) -> Any:
        return [each for each in value if each is not None] if isinstance(value, list) else value


class Definition(Graph):
    """A subgraph, used by nodes whose type is its ``id``. Its links end at INPUTS and OUTPUTS."""

    id: str
    inputs: list[Slot] = Field(default_factory=list)
    outputs: list[Slot] = Field(default_factory=list)
    is_group: bool = False


class Workflow(Graph):
    extra: dict[str, Any] = Field(default_factory=dict)

    def subgraphs(self) -> dict[str, Definition]:
        """Every subgraph by the type of the nodes that use it, group nodes included."""
        found: dict[str, Definition] = {}
        waiting = list(self.definitions.subgraphs)
        for one in waiting:
            found[one.id] = one
            waiting += one.definitions.subgraphs
        for name, group in (self.extra.get("groupNodes") or {}).items():
            try:
                definition = _from_group(name, group)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise MahlstickError(
                    f"The group node {name!r} is not as ComfyUI saves it; take it apart there."
                ) from error
            found |= {f"workflow{mark}{name}": definition for mark in "/>"}
        return found


def load(ui: dict[str, Any]) -> Workflow:
    """Read a saved workflow. Raises ``MahlstickError`` that names the first thing amiss."""
    try:
        return Workflow.model_validate(ui)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MahlstickError(f"The workflow's {where} is not as ComfyUI saves it: {first['msg']}.") from error


def _from_group(name: str, group: dict[str, Any]) -> Definition:
    """A group node, the older kind of subgraph. Its nodes go by their place, and its slots are what they leave open."""
    nodes = [Node.model_validate({**node, "id": place}) for place, node in enumerate(group["nodes"])]
    links: list[Link] = []

    def join(origin: Any, slot: int, target: str = "", place: int = 0) -> str:
        name = str(len(links))
        links.append(Link(id=name, origin_id=str(origin), origin_slot=slot, target_id=target, target_slot=place))
        return name

    inside = [link for link in group.get("links", []) if link[0] is not None]
    for origin, slot, target, place, *_ in inside:
        nodes[target].inputs[place].link = join(origin, slot)
    inputs = sorted((s for node in nodes for s in node.inputs if s.link is None), key=lambda s: s.widget is not None)
    for place, open_slot in enumerate(inputs):
        open_slot.link = join(INPUTS, place)
    hidden = {(link[0], link[1]) for link in inside} - {(end[0], end[1]) for end in group.get("external", [])}
    outputs = [
        (i, slot) for i, node in enumerate(nodes) for slot in range(len(node.outputs)) if (i, slot) not in hidden
    ]
    for place, (origin, slot) in enumerate(outputs):
        join(origin, slot, OUTPUTS, place)
    return Definition(id=name, nodes=nodes, links=links, inputs=inputs, is_group=True)
