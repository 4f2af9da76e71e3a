"""Which nodes and links of a saved workflow know one another, and which values show at the edge of a subgraph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from mahlstick.errors import MahlstickError
from mahlstick.nodes.comfy import saved, widgets
from mahlstick.nodes.graph import Kinds
from mahlstick.nodes.schema import Input

PRIMITIVE = "PrimitiveNode"  # the page's own: a value by itself
OFF = (saved.NEVER, saved.BYPASSED)
_MOST_SUBGRAPHS = 10_000
_OWN_INPUT = "-1"  # the node to which a subgraph counts its own inputs, where it lists the widgets that it shows


def inputs_of(kinds: Kinds, kind: str) -> Mapping[str, Input]:
    """The inputs of a kind by name; none where it is not known."""
    return kinds.inputs(kind) if kind in kinds else {}


class _File:
    """What all scopes of a workflow share."""

    def __init__(self, workflow: saved.Workflow, kinds: Kinds) -> None:
        self.kinds = kinds
        self.definitions = workflow.subgraphs()
        self._uses = 0

    def use(self, kind: str) -> saved.Definition:
        """A subgraph, for one more node. Subgraphs that double at each level would be more nodes than memory holds."""
        self._uses += 1
        if self._uses > _MOST_SUBGRAPHS:
            raise MahlstickError(f"The workflow's subgraphs are used more than {_MOST_SUBGRAPHS} times; unpack some.")
        return self.definitions[kind]


class Scope:
    """A workflow's nodes and links. ``inside``: the scopes of those nodes that are subgraphs, but for those that are
    off. ``shown``: values that stand in for those of widgets, by node and name."""

    prefix = ""
    shown: Mapping[tuple[str, str], Any] = {}

    def __init__(self, file: _File, graph: saved.Graph) -> None:
        self.file, self.graph = file, graph
        self.nodes = {node.id: node for node in graph.nodes}
        self.links = {link.id: link for link in graph.links}
        hosts = [node for node in graph.nodes if node.type in file.definitions and node.mode not in OFF]
        self.inside = {node.id: self._enter(node) for node in hosts}

    @classmethod
    def of(cls, workflow: saved.Workflow, kinds: Kinds) -> Scope:
        return cls(_File(workflow, kinds), workflow)

    @property
    def kinds(self) -> Kinds:
        return self.file.kinds

    def outwards(self) -> Iterator[Scope]:
        """This scope and those around it."""
        yield self

    def fields(self, node: saved.Node) -> list[widgets.Field]:
        if node.type == PRIMITIVE:
            return [widgets.Field("value")]
        return widgets.fields(inputs_of(self.kinds, node.type).values(), node.inputs)

    def behind(self, slot: saved.Slot | None) -> saved.Link | None:
        """The link that ends at an input."""
        return self.links.get(slot.link) if slot and slot.link is not None else None

    def _enter(self, host: saved.Node) -> Subgraph:
        if any(isinstance(scope, Subgraph) and scope.host.type == host.type for scope in self.outwards()):
            raise MahlstickError(f"Node {self.prefix}{host.id} puts a subgraph inside itself; remove it in ComfyUI.")
        return Subgraph(self, host)


class Subgraph(Scope):
    """The nodes and links inside one node, its ``host``, that is a subgraph."""

    def __init__(self, outer: Scope, host: saved.Node) -> None:
        self.outer, self.host = outer, host
        self.prefix = f"{outer.prefix}{host.id}:"
        self.definition = outer.file.use(host.type)
        super().__init__(outer.file, self.definition)

    def outwards(self) -> Iterator[Scope]:
        yield self
        yield from self.outer.outwards()

    def result(self, place: int) -> saved.Link | None:
        """The link that ends at an output."""
        ends = (link for link in self.graph.links if link.target_id == saved.OUTPUTS and link.target_slot == place)
        return next(ends, None)

    def given(self, place: int) -> tuple[saved.Link | None, Any]:
        """What an input gets: a link of the scope outside, and the value of the widget shown there.

        A file may leave out inputs of the host that nothing is joined to, so they go by name.
        """
        name = self._input(place)
        slots = self.host.inputs[place : place + 1] if self.definition.is_group else self.host.inputs
        slot = next((slot for slot in slots if self.definition.is_group or slot.name == name), None)
        return self.outer.behind(slot), self.shown.get((saved.INPUTS, name))

    @cached_property
    def shown(self) -> Mapping[tuple[str, str], Any]:  # type: ignore[override]
        """Values that the host shows for widgets inside, or at INPUTS for its own inputs."""
        shown = self._shown_fields()
        found, _ = widgets.read(self.host.values, shown)
        own = {(each.node or saved.INPUTS, each.name): value for each, value in found.items()}
        further = {(each.node, each.name): self.outer.shown.get((self.host.id, each.name)) for each in shown}
        return own | {place: value for place, value in further.items() if value is not None}

    def _shown_fields(self) -> list[widgets.Field]:
        """Widgets inside that the host shows, in its order: those it lists, else all that its inputs lead to."""
        if self.definition.is_group:
            return [each for node in self.graph.nodes for each in self._open_fields(node)]
        listed = self.host.properties.get("proxyWidgets")
        if isinstance(listed, list) and listed:
            pairs = [each for each in listed if isinstance(each, list) and len(each) > 1]
            return [self._listed_field(str(node), str(name)) for node, name, *_ in pairs]
        led = {
            link.origin_slot for link in self.graph.links if link.origin_id == saved.INPUTS and self._to_widget(link)
        }
        return [widgets.Field(self._input(place), node=saved.INPUTS) for place in sorted(led)]

    def _listed_field(self, node: str, name: str) -> widgets.Field:
        """A widget inside, or the input that leads to it."""
        slots = self.nodes[node].inputs if node in self.nodes else []
        link = self.behind(next((slot for slot in slots if slot.name == name), None))
        if link and link.origin_id == saved.INPUTS:
            node, name = _OWN_INPUT, self._input(link.origin_slot)
        return widgets.Field(name, node=saved.INPUTS if node == _OWN_INPUT else node)

    def _open_fields(self, node: saved.Node) -> list[widgets.Field]:
        """Widgets of a node inside that are no inputs."""
        joined = {slot.name for slot in node.inputs if slot.widget}
        return [widgets.Field(f.name, f.input, node=node.id) for f in self.fields(node) if f.name not in joined]

    def _to_widget(self, link: saved.Link) -> bool:
        node = self.nodes.get(link.target_id)
        return node is not None and any(slot.link == link.id and slot.widget for slot in node.inputs)

    def _input(self, place: int) -> str:
        """The name of an input."""
        return self.definition.inputs[place].name if place < len(self.definition.inputs) else ""
