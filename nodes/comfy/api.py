"""ComfyUI's API JSON, the form in which workflows are run: ``{id: {"class_type", "inputs", "_meta"}}``.

An input is a value, or a link ``[id, slot]`` to another node's output. Every other format is read into this one and
written from it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from typing import Any

from mahlstick.nodes.graph import is_link

Api = dict[str, dict[str, Any]]

_MOST_OUTPUTS = 1000  # of a node; more can only be a mistake


def links(api: Mapping[str, Any]) -> Iterator[tuple[str, str, list[Any]]]:
    """Node, input and link of every joined input whose other end is there."""
    for name, step in api.items():
        for given, value in step["inputs"].items():
            if is_link(value) and value[0] in api and 0 <= value[1] < _MOST_OUTPUTS:
                yield name, given, value


def is_number(name: str) -> bool:
    """Whether a node's id is one that ComfyUI's page gives, which saves it as a number."""
    return name.isascii() and name.isdecimal() and len(name) < 16 and str(int(name)) == name


def title(step: Mapping[str, Any]) -> str:
    """The title that a person gave a node, or nothing."""
    return str((step.get("_meta") or {}).get("title") or "")


def order(api: Mapping[str, Any]) -> list[str]:
    """The nodes, each behind those it depends on, else as they stand. In a circle the first that stands comes first."""
    place = {name: i for i, name in enumerate(api)}
    open_inputs = dict.fromkeys(api, 0)
    behind: dict[str, list[str]] = {name: [] for name in api}
    for name, _, (origin, _) in links(api):
        open_inputs[name] += 1
        behind[origin].append(name)
    waiting = dict.fromkeys(api)
    ready = [place[name] for name in api if not open_inputs[name]]
    names, found = list(api), []
    while waiting:
        name = names[heapq.heappop(ready)] if ready else next(iter(waiting))
        if name not in waiting:
            continue
        del waiting[name]
        found.append(name)
        for other in behind[name]:
            open_inputs[other] -= 1
            if not open_inputs[other]:
                heapq.heappush(ready, place[other])
    return found
