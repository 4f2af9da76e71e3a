"""ComfyUI's ``comfy_execution.graph_utils`` for node packs: how a node builds the graph to which it expands."""

from __future__ import annotations

from itertools import count
from typing import Any

from mahlstick.nodes.graph import is_link
from mahlstick.nodes.schema import Blocked as ExecutionBlocker

__all__ = ["ExecutionBlocker", "GraphBuilder", "Node", "is_link"]


class GraphBuilder:
    """Nodes to be run in place of one. Its ids begin with ``prefix``, else with a number of its own."""

    _prefixes = count()

    def __init__(self, prefix: str | None = None) -> None:
        self.prefix = f"{next(self._prefixes)}." if prefix is None else prefix
        self.nodes: dict[str, Node] = {}
        self._numbers = count(1)

    def node(self, class_type: str, id: str | None = None, **inputs: Any) -> Node:
        name = f"{self.prefix}{next(self._numbers) if id is None else id}"
        return self.nodes.setdefault(name, Node(name, class_type, inputs))

    def lookup_node(self, id: str) -> Node | None:
        return self.nodes.get(f"{self.prefix}{id}")

    def remove_node(self, id: str) -> None:
        del self.nodes[f"{self.prefix}{id}"]

    def replace_node_output(self, node_id: str, index: int, new_value: Any) -> None:
        """Put a value, or with None nothing, wherever the output is joined to."""
        output = [f"{self.prefix}{node_id}", index]
        for node in self.nodes.values():
            for key in [key for key, value in node.inputs.items() if value == output]:
                node.set_input(key, new_value)

    def finalize(self) -> dict[str, Any]:
        """The graph in API form."""
        return {name: node.serialize() for name, node in self.nodes.items()}


class Node:
    """A node of a :class:`GraphBuilder`."""

    def __init__(self, id: str, class_type: str, inputs: dict[str, Any]) -> None:
        self.id, self.class_type, self.inputs = id, class_type, inputs
        self.override_display_id: str | None = None

    def out(self, index: int) -> list[Any]:
        """A link to an output."""
        return [self.id, index]

    def set_input(self, key: str, value: Any) -> None:
        self.inputs.pop(key, None)
        if value is not None:
            self.inputs[key] = value

    def get_input(self, key: str) -> Any:
        return self.inputs.get(key)

    def set_override_display_id(self, override_display_id: str) -> None:
        self.override_display_id = override_display_id

    def serialize(self) -> dict[str, Any]:
        shown = {"override_display_id": self.override_display_id} if self.override_display_id else {}
        return {"class_type": self.class_type, "inputs": self.inputs, **shown}
