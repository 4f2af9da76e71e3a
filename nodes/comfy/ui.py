"""ComfyUI's saved workflows, which its page draws, to API JSON, which is run, and back.

What the page means by its drawing is ComfyUI's to say: reroutes, primitives, bypassed and muted nodes and subgraphs are
resolved as its ``graphToPrompt`` does, to the same ids (``7:3`` is node 3 inside node 7).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mahlstick.errors import MahlstickError
from mahlstick.nodes.comfy import png, saved, widgets
from mahlstick.nodes.comfy.api import Api, is_number, links, order, title
from mahlstick.nodes.comfy.layout import arrange
from mahlstick.nodes.comfy.scopes import OFF, PRIMITIVE, Scope, Subgraph, inputs_of
from mahlstick.nodes.graph import Kinds, is_link, parse
from mahlstick.nodes.graph import to_api as written
from mahlstick.nodes.schema import ANY, Input, NodeType

_SETTERS = {"SetNode", "easy setNode"}
_GETTERS = {"GetNode", "easy getNode"}
_DRAWN_ONLY = {PRIMITIVE, "Reroute", "Reroute (rgthree)", "Note", "MarkdownNote", *_SETTERS, *_GETTERS}
_BOX = "__value__"


def read(source: str | Path | Mapping[str, Any], nodes: Mapping[str, NodeType]) -> Api:
    """The workflow in a file or its text, in whichever of ComfyUI's formats: API JSON, a saved workflow, or a picture.

    Raises ``MahlstickError`` where there is none.
    """
    if isinstance(source, Mapping):
        return _recognised(source, "The workflow", nodes)
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return _recognised(_json(source, "The workflow"), "The workflow", nodes)
    path = Path(source)
    if path.suffix.lower() in png.SUFFIXES:
        return _recognised(png.read(path), str(path), nodes)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise MahlstickError(
            f"{source}: no readable workflow; give ComfyUI's JSON, or a picture that it saved."
        ) from error
    return _recognised(_json(text, str(path)), str(path), nodes)


def to_api(ui: dict[str, Any], nodes: Mapping[str, NodeType]) -> Api:
    """API JSON of a saved workflow. ``nodes`` tell which widget a value belongs to.

    Raises ``MahlstickError`` where the file is damaged, or has a node that is not known and does not name its widgets.
    """
    try:
        return dict(_steps(Scope.of(saved.load(ui), Kinds(nodes))))
    except RecursionError as error:
        raise MahlstickError(
            "The workflow's subgraphs are nested too deeply; unpack some of them in ComfyUI."
        ) from error


def from_api(api: Api, nodes: Mapping[str, NodeType]) -> dict[str, Any]:
    """A workflow as ComfyUI would have saved it, in columns from left to right.

    A widget that a workflow leaves out shows its default. A node that is not known names its inputs in the file.
    """
    kinds = Kinds(nodes)
    drawn = {name: _draw(name, step, kinds) for name, step in api.items()}
    joined = list(links(api))
    made = [_join(drawn, number, *link) for number, link in enumerate(joined, start=1)]
    sizes = {name: _size(node, kinds) for name, node in drawn.items()}
    places = arrange(sizes, [(link[0], name) for name, _, link in joined])
    for turn, name in enumerate(order(api)):
        drawn[name] |= {"pos": list(places[name]), "size": list(sizes[name]), "order": turn}
    return {
        "last_node_id": max((node["id"] for node in drawn.values() if isinstance(node["id"], int)), default=0),
        "last_link_id": len(made),
        "nodes": list(drawn.values()),
        "links": made,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MahlstickError(
            f"{name} is not JSON ({error}); give a workflow as ComfyUI saves or exports it."
        ) from error


def _recognised(found: Any, name: str, nodes: Mapping[str, NodeType]) -> Api:
    if isinstance(found, Mapping):
        if isinstance(found.get("nodes"), list):
            return to_api(dict(found), nodes)
        if any(isinstance(each, Mapping) and "class_type" in each for each in found.values()):
            return written(parse(found))
        if isinstance(found.get("prompt"), Mapping):
            return _recognised(found["prompt"], name, nodes)
    raise MahlstickError(f"{name} holds no workflow of ComfyUI; give one in its saved form or its API form.")


# Reading: what the drawing means


@dataclass(frozen=True)
class _Value:
    """What flows into an input where that is a widget's value and no node's output."""

    value: Any


def _steps(scope: Scope) -> Iterator[tuple[str, dict[str, Any]]]:
    """The nodes that run, in the page's order, those of a subgraph in its place."""
    for node in sorted(scope.graph.nodes, key=lambda node: node.order):
        if node.mode in OFF or node.type in _DRAWN_ONLY:
            continue
        if node.id in scope.inside:
            yield from _steps(scope.inside[node.id])
        elif node.type in scope.kinds or _takes_part(scope, node):
            yield scope.prefix + node.id, _step(scope, node)


def _takes_part(scope: Scope, node: saved.Node) -> bool:
    """Else a node that nobody knows is one of the page's own: a label, a switch."""
    joined = any(slot.link or slot.widget for slot in node.inputs)
    return joined or any(link.origin_id == node.id for link in scope.graph.links)


def _step(scope: Scope, node: saved.Node) -> dict[str, Any]:
    inputs = {name: _boxed(value) for name, value in _values(scope, node).items()}
    for slot in node.inputs:
        source = _source(scope, slot)
        if source is not None:
            inputs[slot.name] = _boxed(source.value) if isinstance(source, _Value) else source
    step: dict[str, Any] = {"class_type": node.type, "inputs": inputs}
    usual = scope.kinds[node.type].display_name if node.type in scope.kinds else ""
    if node.title and node.title not in (node.type, usual):
        step["_meta"] = {"title": node.title}
    return step


def _boxed(value: Any) -> Any:
    """A list would pass for a link, so ComfyUI puts it into a dict."""
    return {_BOX: value} if isinstance(value, list) else value


def _values(scope: Scope, node: saved.Node) -> dict[str, Any]:
    """What a node's widgets hold: as saved, else as a subgraph around it shows them, else their defaults."""
    fields = scope.fields(node)
    found, left = widgets.read(node.values, fields)
    if node.type not in scope.kinds and any(value is not None for value in left):
        raise MahlstickError(
            f"Node {scope.prefix}{node.id} is a {node.type}, which is not known here, and the file does not name its "
            "inputs; load the pack it comes from, or export the workflow in API format."
        )
    values = {each.name: each.default for each in fields} | {each.name: value for each, value in found.items()}
    values |= {name: scope.shown[node.id, name] for name in values if (node.id, name) in scope.shown}
    return {name: value for name, value in values.items() if value is not None}


def _source(scope: Scope, slot: saved.Slot) -> list[Any] | _Value | None:
    """What flows into an input in the end: a node's output, a value, or nothing."""
    link, wanted = scope.behind(slot), slot.type
    seen: set[tuple[str, str]] = set()
    while link is not None:
        if (scope.prefix, link.id) in seen:
            raise MahlstickError(f"Link {link.id} leads in a circle around no node that runs; cut it in ComfyUI.")
        seen.add((scope.prefix, link.id))
        if link.origin_id == saved.INPUTS and isinstance(scope, Subgraph):
            link, value = scope.given(link.origin_slot)
            if link is None:
                return None if value is None else _Value(value)
            scope = scope.outer
            continue
        node = scope.nodes.get(link.origin_id)
        if node and node.type == PRIMITIVE:
            return _Value(value) if (value := _values(scope, node).get("value")) is not None else None
        if node is None or node.mode == saved.NEVER:
            return None
        if node.mode == saved.BYPASSED:
            passed = _passed(node, link.origin_slot, wanted)
            link, wanted = scope.behind(passed), passed.type if passed else wanted
        elif node.id in scope.inside:
            scope = scope.inside[node.id]
            link = scope.result(link.origin_slot)
        elif node.type in _GETTERS:
            scope, link = _set_elsewhere(scope, node)
        elif node.type in _DRAWN_ONLY:
            link = scope.behind(node.inputs[0]) if node.inputs else None
        else:
            return [scope.prefix + node.id, link.origin_slot]
    return None


def _passed(node: saved.Node, place: int, wanted: str) -> saved.Slot | None:
    """The input that goes on in place of a bypassed node's output.

    That beside the output if its type fits, else the first of exactly the type wanted, else the first that fits.
    """
    beside = node.inputs[place : place + 1]
    if wanted in (ANY, ""):
        return next(iter(beside or node.inputs), None)
    given = node.outputs[place].type if place < len(node.outputs) else wanted
    fitting = [slot for slot in node.inputs if _fits(slot.type, given) and _fits(slot.type, wanted)]
    exact = [slot for slot in node.inputs if slot.type == wanted]
    return next(iter([slot for slot in beside if slot in fitting] + exact + fitting), None)


def _fits(one: str, other: str) -> bool:
    """Whether ComfyUI's page lets the types be joined."""
    return ANY in (one, other) or bool({*one.lower().split(",")} & {*other.lower().split(",")})


def _set_elsewhere(scope: Scope, getter: saved.Node) -> tuple[Scope, saved.Link | None]:
    """The link into the node that sets what ``getter`` gets, here or further out."""
    for around in scope.outwards():
        for node in around.graph.nodes:
            if node.type in _SETTERS and node.values == getter.values and node.inputs:
                return around, around.behind(node.inputs[0])
    return scope, None


# Writing


def _draw(name: str, step: Mapping[str, Any], kinds: Kinds) -> dict[str, Any]:
    kind: str = step["class_type"]
    known = inputs_of(kinds, kind)
    slots = _slots(step["inputs"], known)
    fields = widgets.fields(known.values(), [saved.Slot.model_validate(slot) for slot in slots])
    outputs = kinds[kind].outputs if kind in kinds else ()
    return {
        "id": int(name) if is_number(name) else name,
        "type": kind,
        "flags": {},
        "mode": 0,
        "inputs": slots,
        "outputs": [{"name": each.name, "type": each.type, "links": []} for each in outputs],
        **({"title": title(step)} if title(step) else {}),
        "properties": {"Node name for S&R": kind},
        "widgets_values": _listed(step["inputs"], fields),
    }


def _slots(given: Mapping[str, Any], known: Mapping[str, Input]) -> list[dict[str, Any]]:
    """A node's inputs, but for widgets that nothing is joined to. Those with a ``widget`` come last."""
    found = []
    for name in {**known, **given}:
        is_known_widget = name in known and known[name].is_widget
        is_constant = name in given and not is_link(given[name])
        if is_known_widget and not is_link(given.get(name)):
            continue
        slot = {"name": name, "type": known[name].type if name in known else ANY, "link": None}
        found.append(slot | ({"widget": {"name": name}} if is_known_widget or is_constant else {}))
    return sorted(found, key=lambda slot: "widget" in slot)


def _listed(given: Mapping[str, Any], fields: list[widgets.Field]) -> list[Any]:
    values = []
    for each in fields:
        value = given.get(each.name)
        if value is None or is_link(value):
            value = each.default
        values.append(value[_BOX] if isinstance(value, dict) and set(value) == {_BOX} else value)
        if each.is_seed:
            values.append("fixed")
    return values + ["image" for each in fields if each.input and each.input.options.get("image_upload")]


def _join(drawn: Mapping[str, dict[str, Any]], number: int, name: str, given: str, link: list[Any]) -> list[Any]:
    """Draw a link; returns it as saved."""
    origin, place = drawn[link[0]], link[1]
    while len(origin["outputs"]) <= place:
        origin["outputs"].append({"name": ANY, "type": ANY, "links": []})
    output = origin["outputs"][place]
    output["links"].append(number)
    target, slot = drawn[name], next(i for i, slot in enumerate(drawn[name]["inputs"]) if slot["name"] == given)
    target["inputs"][slot]["link"] = number
    return [number, origin["id"], place, target["id"], slot, output["type"]]


def _size(node: Mapping[str, Any], kinds: Kinds) -> tuple[int, int]:
    """Width and height in pixels as ComfyUI's page would draw the node, with room for its pictures."""
    inputs = inputs_of(kinds, node["type"]).values()
    texts = sum(bool(each.options.get("multiline")) for each in inputs)
    loads = any(each.options.get("image_upload") for each in inputs)
    shows = any(each.type == "IMAGE" for each in inputs) and kinds[node["type"]].is_output
    rows = max(sum("widget" not in slot for slot in node["inputs"]), len(node["outputs"]))
    values = len(node["widgets_values"])
    width = 400 if texts else 315 if values else 210
    return width, 20 * rows + 24 * values + 110 * texts + 220 * (loads or shows) + (14 if values else 6)
