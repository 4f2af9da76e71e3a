"""Where nodes stand on a page: in columns from left to right, each node right of all it depends on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

_TITLE, _GAP, _BETWEEN = 30, 40, 80  # pixels: above a node, between two of a column, between columns


def arrange(sizes: Mapping[str, tuple[int, int]], links: Iterable[tuple[str, str]]) -> dict[str, tuple[int, int]]:
    """The upper left corner of each node, in pixels, from their widths and heights. None overlap.

    ``links`` are pairs of node names, from and to, which may go in circles.
    """
    before: dict[str, list[str]] = {name: [] for name in sizes}
    for origin, target in dict.fromkeys(links):
        before[target].append(origin)
    columns: dict[int, list[str]] = {}
    for name, depth in _depths(before).items():
        columns.setdefault(depth, []).append(name)
    places: dict[str, tuple[int, int]] = {}
    left = 0
    for depth in sorted(columns):
        names = sorted(columns[depth], key=lambda name: _height_of(before[name], places))
        top = _TITLE
        for name in names:
            places[name] = (left, top)
            top += sizes[name][1] + _TITLE + _GAP
        left += max(sizes[name][0] for name in names) + _BETWEEN
    return places


def _depths(before: Mapping[str, list[str]]) -> dict[str, int]:
    """Each node's column. What depends on nothing stands right before the first that needs it."""
    behind: dict[str, list[str]] = {name: [] for name in before}
    for name, origins in before.items():
        for origin in origins:
            behind[origin].append(name)
    open_inputs = {name: len(origins) for name, origins in before.items()}
    depths = dict.fromkeys(before, 0)
    ready = [name for name, count in open_inputs.items() if not count]
    for name in ready:
        for other in behind[name]:
            depths[other] = max(depths[other], depths[name] + 1)
            open_inputs[other] -= 1
            if not open_inputs[other]:
                ready.append(other)
    for name, origins in before.items():
        if not origins and behind[name]:
            depths[name] = max(0, min(depths[other] for other in behind[name]) - 1)
    return depths


def _height_of(names: list[str], places: Mapping[str, tuple[int, int]]) -> float:
    """How far down the nodes stand, on average. What they lead to is put beside them, and sources last."""
    tops = [places[name][1] for name in names if name in places]
    return sum(tops) / len(tops) if tops else math.inf
