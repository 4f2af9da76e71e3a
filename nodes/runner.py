"""From a workflow to its results: read it, set some of its inputs, run it, and say what came out."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders
from mahlstick.nodes.builtin import all_nodes
from mahlstick.nodes.cache import Cache, DiskCache, MemoryCache, Tiered
from mahlstick.nodes.comfy.api import Api, title
from mahlstick.nodes.comfy.packs import load_pack
from mahlstick.nodes.comfy.script import from_python, to_python
from mahlstick.nodes.comfy.ui import from_api, read
from mahlstick.nodes.engine import Engine, Listen, Outcome
from mahlstick.nodes.files import whole
from mahlstick.nodes.folders import Folders
from mahlstick.nodes.schema import NodeType

GIGABYTE = 1 << 30
IN_MEMORY = 4 * GIGABYTE
ON_DISK = 8 * GIGABYTE


def available(packs: Iterable[str | os.PathLike[str]] = ()) -> dict[str, NodeType]:
    """The nodes that come with mahlstick and those of packs, by class name. Of two with one name the later wins.

    A pack that cannot be loaded is left out, with a warning.
    """
    found = dict(all_nodes())
    for pack in packs:
        try:
            found |= load_pack(Path(pack))
        except MahlstickError as error:
            warnings.warn(str(error), stacklevel=2)
    return found


def default_cache() -> Path:
    """The folder that keeps results from one run to the next."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mahlstick" / "workflows"


def open_cache(folder: str | os.PathLike[str] | None) -> Cache:
    """A cache in memory, and in front of one on disk where a folder is given."""
    memory = MemoryCache(IN_MEMORY)
    return memory if folder is None else Tiered(memory, DiskCache(Path(folder), ON_DISK))


def engine_of(nodes: Mapping[str, NodeType], cache: Cache | None) -> Engine:
    """The engine for nodes that compute with torch and save below the current folders."""
    return Engine(nodes, cache, stamp=folders.shown_stamp, around=torch.no_grad)


def load(source: str | os.PathLike[str] | Mapping[str, Any], nodes: Mapping[str, NodeType]) -> Api:
    """API JSON of a workflow: a .json in either of ComfyUI's forms, a picture that holds one, or a Python script, which
    is executed. Raises ``MahlstickError`` where there is none."""
    if isinstance(source, Mapping):
        return read(source, nodes)
    path = Path(source)
    return from_python(path) if path.suffix.lower() == ".py" else read(path, nodes)


def run(
    workflow: str | os.PathLike[str] | Mapping[str, Any],
    changes: Mapping[str, Any] | None = None,
    *,
    nodes: Mapping[str, NodeType] | None = None,
    where: Folders | None = None,
    cache: Cache | None = None,
    targets: Iterable[str] | None = None,
    listen: Listen | None = None,
    stop: threading.Event | None = None,
) -> Outcome:
    """Run a workflow.

    ``changes`` are values of inputs by ``"id.input"`` or ``"title.input"``. ``nodes``: those there are, left out those
    that come with mahlstick. ``where``: the folders, left out those below the working folder. ``cache``: what keeps
    results, left out nothing. ``targets``: ids of the nodes to run, left out all that save or show something.

    Raises ``MahlstickError`` before anything runs where the workflow is faulty, and where a node fails; ``Interrupted``
    where ``stop`` was set.
    """
    nodes = all_nodes() if nodes is None else nodes
    with folders.using(where or folders.current()):
        api = with_changes(load(workflow, nodes), changes or {}, nodes)
        pnginfo = {"workflow": from_api(api, nodes)}
        outcome = engine_of(nodes, cache).run(api, targets, listen=listen, extra_pnginfo=pnginfo, stop=stop)
    if outcome.error is not None:
        raise outcome.error
    return outcome


def saved(outcome: Outcome, where: Folders | None = None) -> list[Path]:
    """The files that a run's nodes saved, in the order of their ids."""
    with folders.using(where or folders.current()):
        return [path for shown in outcome.ui.values() for path in folders.shown_files(shown)]


def write(
    source: str | os.PathLike[str],
    target: Path,
    form: Literal["api", "ui"],
    nodes: Mapping[str, NodeType] | None = None,
) -> Path:
    """Write a workflow as a Python script, or as JSON in the form that ComfyUI runs or the one that its page opens."""
    nodes = all_nodes() if nodes is None else nodes
    api = load(source, nodes)
    if target.suffix.lower() == ".py":
        text = to_python(api, nodes)
    else:
        text = json.dumps(from_api(api, nodes) if form == "ui" else api, indent=2, ensure_ascii=False) + "\n"
    with whole(target) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return target


class Bar:
    """A progress bar that listens to a run: the nodes, and the steps of the one that is running."""

    def __init__(self, api: Api, hidden: bool = False) -> None:
        self._names = {each: title(step) or step["class_type"] for each, step in api.items()}
        self._bar = tqdm(total=len(api), disable=hidden, bar_format="{n_fmt}/{total_fmt} |{bar}| {elapsed}  {desc}")
        self._running = False

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def __call__(self, event: str, data: Mapping[str, Any]) -> None:
        if event == "execution_cached":
            self._bar.update(len(data["nodes"]))
        elif event == "executing":
            self._bar.update(self._running)
            self._running = True
            self._tell(data["display_node"])
        elif event == "progress":
            self._tell(data["node"], f" {data['value']}/{data['max']}")
        elif event == "execution_success":
            self._bar.update(self._running)
            self._bar.set_description_str("")

    def _tell(self, node: str, more: str = "") -> None:
        self._bar.set_description_str(self._names.get(node, node) + more)


def with_changes(api: Api, changes: Mapping[str, Any], nodes: Mapping[str, NodeType]) -> Api:
    """The workflow with other values of some inputs, given as for :func:`run`. Text is read as the input's type asks.

    Raises ``MahlstickError`` where there is no such node or input, or the input takes only another node's output.
    """
    changed = deepcopy(api)
    for place, value in changes.items():
        named, _, name = place.rpartition(".")
        node = _node(api, named, place)
        inputs = changed[node]["inputs"]
        kind = nodes.get(changed[node]["class_type"])
        known = {each.name: each for each in kind.inputs} if kind else {}
        if name not in inputs and name not in known:
            raise MahlstickError(f"{place}: node {node} has no input {name!r}; it has {', '.join(known or inputs)}.")
        if name in known and not known[name].is_widget:
            raise MahlstickError(
                f"{place}: this input takes another node's {known[name].type}, so it has no value to set."
            )
        inputs[name] = _typed(value, known[name].type if name in known else "", place)
    return changed


def _node(api: Api, named: str, place: str) -> str:
    """The id of a node by its id, its title or its class."""
    if named in api:
        return named
    titles = {each: (title(step), step["class_type"]) for each, step in api.items()}
    found = [each for each, names in titles.items() if named in names]
    if len(found) == 1:
        return found[0]
    if found:
        raise MahlstickError(f"{place}: several nodes are called {named!r}; give an id, one of {', '.join(found)}.")
    listed = ", ".join(f"{each} ({named or kind})" for each, (named, kind) in titles.items())
    raise MahlstickError(f"{place}: the workflow has no node {named!r}; it has {listed}.")


def _typed(value: Any, kind: str, place: str) -> Any:
    """A value as its input's type asks."""
    if not isinstance(value, str) or kind in ("STRING", "COMBO"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        if kind in ("INT", "FLOAT", "BOOLEAN"):
            raise MahlstickError(f"{place}: {value!r} is no {kind}.") from None
        return value
