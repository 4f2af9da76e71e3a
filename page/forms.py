"""What of a workflow a person may enter: the widgets of its nodes, and first those that one changes first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mahlstick.nodes.comfy.api import Api, order, title
from mahlstick.nodes.graph import InvalidGraph, Kinds, is_link, parse, validate
from mahlstick.nodes.schema import Input, NodeType

MOST = 150  # entries; a workflow with more keeps the rest as it is

_FIRST = {
    "steps", "cfg", "denoise", "guidance", "width", "height", "batch_size", "frames", "frame_rate", "text", "prompt",
    "strength", "strength_model", "scale", "weight", "ckpt_name", "lora_name", "control_net_name", "model_name",
}  # fmt: skip
_FILE_FAULTS = {"value_not_in_list", "custom_validation_failed"}


@dataclass(frozen=True)
class Entry:
    """A widget of a node: its input, and the value that the workflow gives it."""

    node: str
    input: Input
    value: Any

    @property
    def name(self) -> str:
        return self.input.name

    @property
    def kind(self) -> Literal["picture", "choice", "switch", "number", "text"]:
        if self.input.options.get("image_upload"):
            return "picture"
        if self.input.choices is not None:
            return "choice"
        kinds: dict[str, Literal["switch", "number"]] = {"BOOLEAN": "switch", "INT": "number", "FLOAT": "number"}
        return kinds.get(self.input.type, "text")

    @property
    def is_seed(self) -> bool:
        return bool(self.input.options.get("control_after_generate")) or self.name in ("seed", "noise_seed")

    @property
    def is_long(self) -> bool:
        """Whether it is a text of several lines."""
        return bool(self.input.options.get("multiline"))

    @property
    def comes_first(self) -> bool:
        return self.is_long or self.is_seed or self.kind == "picture" or self.name in _FIRST


@dataclass(frozen=True)
class Group:
    """The entries of one node below its title."""

    node: str
    title: str
    entries: tuple[Entry, ...]


def groups(api: Api, nodes: Mapping[str, NodeType]) -> tuple[list[Group], list[Group]]:
    """What one changes first: texts, then pictures, then the rest in the order in which it runs; and all others."""
    names, kinds = titles(api, nodes), Kinds(nodes)
    first, rest, left = [], [], MOST
    for node in order(api):
        found = list(_entries(node, api[node], kinds))[:left]
        left -= len(found)
        found.sort(key=lambda entry: not entry.is_long)
        both = [tuple(each for each in found if each.comes_first is one) for one in (True, False)]
        first += [Group(node, names[node], both[0])] if both[0] else []
        rest += [Group(node, names[node], both[1])] if both[1] else []
    return sorted(first, key=_turn), rest


def titles(api: Mapping[str, Any], nodes: Mapping[str, NodeType]) -> dict[str, str]:
    """What each node is called; of several with one title, with its id."""
    names = {node: title(step) or _usual_title(step, nodes) for node, step in api.items()}
    shared = Counter(names.values())
    return {node: name if shared[name] == 1 else f"{name} {node}" for node, name in names.items()}


def unknown(api: Api, nodes: Mapping[str, NodeType]) -> list[str]:
    """The kinds of nodes in a workflow that are not there."""
    return sorted({step["class_type"] for step in api.values()} - set(nodes))


def faults(api: Api, nodes: Mapping[str, NodeType]) -> InvalidGraph | None:
    """Why a workflow will not run, if it will not."""
    try:
        validate(parse(api), nodes)
    except InvalidGraph as error:
        return error
    return None


def absent_files(api: Api, error: InvalidGraph) -> list[str]:
    """What a refused workflow names and does not find: models, pictures."""
    places = [
        (node, fault["extra_info"].get("input_name"))
        for node, found in error.node_errors.items()
        for fault in found["errors"]
        if fault["type"] in _FILE_FAULTS
    ]
    values = [api[node]["inputs"].get(name) for node, name in places]
    return list(dict.fromkeys(value for value in values if isinstance(value, str) and value))


def complaints(api: Api, error: InvalidGraph) -> dict[str, str]:
    """What is wrong with each node of a refused workflow."""
    return {
        node: "; ".join(_complaint(api[node], fault) for fault in found["errors"])
        for node, found in error.node_errors.items()
    }


def _complaint(step: Mapping[str, Any], fault: Mapping[str, Any]) -> str:
    name = fault["extra_info"].get("input_name", "")
    if fault["type"] == "value_not_in_list":
        return f"{name}: {step['inputs'].get(name)} is not there; choose another"
    said = fault["details"] or fault["message"]
    return f"{name}: {fault['message']}" if said == name else f"{fault['message']}: {said}"


def _usual_title(step: Mapping[str, Any], nodes: Mapping[str, NodeType]) -> str:
    kind: str = step["class_type"]
    return (nodes[kind].display_name if kind in nodes else "") or kind


def _entries(node: str, step: Mapping[str, Any], kinds: Kinds) -> Iterator[Entry]:
    for name, one in kinds.inputs(step["class_type"]).items() if step["class_type"] in kinds else ():
        value = step["inputs"].get(name)
        if one.is_widget and name in step["inputs"] and not is_link(value) and not isinstance(value, dict | list):
            yield Entry(node, one, value)


def _turn(group: Group) -> int:
    if group.entries[0].is_long:
        return 0
    return 1 if any(entry.kind == "picture" for entry in group.entries) else 2
