"""Workflows as Python: a short script for API JSON, and API JSON from a script, without loss.

    with Workflow() as w:
        model, clip, vae = CheckpointLoaderSimple(ckpt_name="embedded")
        (positive,) = CLIPTextEncode(text="a red fox", clip=clip)
        ...

Within the block calls of nodes are taken down, not run. Nodes are numbered in their order, but for those given an
``_id``; a ``_title`` is what ComfyUI's page shows above them.
"""

from __future__ import annotations

import builtins
import keyword
import re
import runpy
import traceback
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from contextvars import Token
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from mahlstick.errors import MahlstickError
from mahlstick.nodes.comfy.api import Api, is_number, links, order, title
from mahlstick.nodes.comfy.ui import from_api
from mahlstick.nodes.graph import Kinds, is_link
from mahlstick.nodes.schema import NodeType, Recorder, recorder

_WIDTH = 120
_LONGEST_NAME = 24


@dataclass(eq=False)
class _Step:
    kind: str
    inputs: Mapping[str, Any]
    id: str
    title: str


@dataclass(frozen=True)
class Output:
    """A node's output within a workflow: what another node's input may be given."""

    step: _Step = field(repr=False)
    slot: int


class Outputs:
    """The outputs of a node that is known by its name alone, by number: ``outputs[0]``."""

    def __init__(self, step: _Step) -> None:
        self._step = step

    def __getitem__(self, slot: int) -> Output:
        if slot < 0:
            raise IndexError("outputs are counted from 0")
        return Output(self._step, slot)

    __iter__ = None  # how many there are is not known


class Workflow:
    """A workflow that a script writes down: within its block, calls of nodes are taken down and give their outputs."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._kinds: dict[str, NodeType] = {}
        self._token: Token[Recorder | None] | None = None

    def __enter__(self) -> Workflow:
        self._token = recorder.set(self._take_down)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._token is not None
        recorder.reset(self._token)

    def node(self, kind: str, inputs: Mapping[str, Any], *, id: int | str = "", title: str = "") -> Outputs:
        """Add a node by the name of its class: one of a pack, or with inputs that are no Python names."""
        return Outputs(self._add(kind, inputs, id, title))

    @property
    def api(self) -> Api:
        """API JSON. Nodes without an id of their own get the lowest numbers that are free, in their order."""
        taken = {step.id for step in self._steps}
        free = (str(number) for number in count(1) if str(number) not in taken)
        ids = {step: step.id or next(free) for step in self._steps}
        if len(set(ids.values())) < len(ids):
            twice = next(name for name in taken if [step.id for step in self._steps].count(name) > 1)
            raise MahlstickError(f"Two nodes of the workflow have the id {twice}; change one, or leave both out.")
        return {ids[step]: _entry(step, ids) for step in self._steps}

    @property
    def ui(self) -> dict[str, Any]:
        """The workflow as ComfyUI's page opens it."""
        return from_api(self.api, self._kinds)

    def run(self, **options: Any) -> Any:
        """Run it, with the options of :func:`mahlstick.nodes.run`."""
        from mahlstick.nodes import run

        return run(self.api, **options)

    def _take_down(self, node: NodeType, inputs: dict[str, Any]) -> tuple[Output, ...]:
        name, heading = inputs.pop("_id", ""), inputs.pop("_title", "")
        node.check_names(inputs)
        asked = {each.name: each.options.get("default") for each in node.inputs if each.required}
        self._kinds[node.name] = node
        step = self._add(node.name, asked | inputs, name, heading)
        return tuple(Output(step, slot) for slot in range(len(node.outputs)))

    def _add(self, kind: str, inputs: Mapping[str, Any], name: int | str, heading: str) -> _Step:
        step = _Step(kind, dict(inputs), str(name), heading)
        self._steps.append(step)
        return step


def from_python(source: str | Path) -> Api:
    """API JSON of a script, given as its text or its path.

    The script is executed, all but what it does as ``__main__``: read scripts of others before. Raises
    ``MahlstickError`` where it fails, or makes no :class:`Workflow`.
    """
    is_text = isinstance(source, str) and "\n" in source
    name = "<workflow>" if is_text else str(source)
    if not is_text and not Path(source).is_file():
        raise MahlstickError(f"{name}: no such file; give a script that builds a workflow.")
    try:
        if is_text:
            found: dict[str, Any] = {"__name__": "workflow"}
            exec(compile(str(source), name, "exec"), found)
        else:
            found = runpy.run_path(name, run_name="workflow")
    except (Exception, SystemExit) as error:
        raise MahlstickError(f"{name}{_line(error, name)}: {type(error).__name__}: {error}") from error
    workflows = [value for value in found.values() if isinstance(value, Workflow)]
    if not workflows:
        raise MahlstickError(f"{name} makes no workflow; write its nodes in a block `with Workflow() as w:`.")
    return workflows[-1].api


def to_python(api: Api, nodes: Mapping[str, NodeType]) -> str:
    """A script that builds the workflow, and runs it when it is run itself.

    Nodes of packs, and nodes whose inputs do not fit their schema, are added by name.
    """
    writer = _Writer(api, nodes)
    lines = [line for name in writer.order for line in writer.statement(name)]
    imported = sorted(writer.imported | {"Workflow"}, key=lambda name: (name != "Workflow", name))
    head = f"from mahlstick.nodes import {', '.join(imported)}"
    if len(head) > _WIDTH:
        head = "\n".join(["from mahlstick.nodes import (", *(f"    {name}," for name in imported), ")"])
    body = "\n".join(f"    {line}" for line in lines or ["pass"])
    return f'{head}\n\nwith Workflow() as w:\n{body}\n\nif __name__ == "__main__":\n    w.run()\n'


def _entry(step: _Step, ids: Mapping[_Step, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "class_type": step.kind,
        "inputs": {name: _resolved(value, ids) for name, value in step.inputs.items()},
    }
    return entry | ({"_meta": {"title": step.title}} if step.title else {})


def _resolved(value: Any, ids: Mapping[_Step, str]) -> Any:
    if not isinstance(value, Output):
        return value
    if value.step not in ids:
        raise MahlstickError(f"{value.step.kind} belongs to another workflow; its outputs cannot be used in this one.")
    return [ids[value.step], value.slot]


def _line(error: BaseException, name: str) -> str:
    """Where in the script it went wrong."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
    return f", line {lines[-1]}" if lines else ""


class _Writer:
    """The statements of a script."""

    def __init__(self, api: Api, nodes: Mapping[str, NodeType]) -> None:
        self.api, self.nodes, self.known = api, nodes, Kinds(nodes)
        self.order = order(api)
        self.is_numbered = self.order == [str(number) for number in range(1, len(api) + 1)]
        typed = {name: self._importable(step) for name, step in api.items()}
        self.kinds = {name: kind for name, kind in typed.items() if kind is not None}
        self.imported = {kind.name for kind in self.kinds.values()}
        self.uses: dict[str, dict[int, set[str]]] = {name: {} for name in api}
        for _, given, (origin, slot) in links(api):
            self.uses[origin].setdefault(slot, set()).add(given)
        self.taken = {"w", "Workflow", *self.imported, *keyword.kwlist, *keyword.softkwlist, *dir(builtins)}
        self.numbers = defaultdict[str, int](lambda: 1)  # the last that was put behind a name
        self.written: dict[tuple[str, int], str] = {}

    def statement(self, name: str) -> list[str]:
        """The lines of one node's call."""
        step, kind = self.api[name], self.kinds.get(name)
        inputs = {given: self._value(value) for given, value in step["inputs"].items()}
        mark = "_" if kind else ""
        marks = [] if self.is_numbered else [f"{mark}id={name if is_number(name) else _literal(name)}"]
        marks += [f"{mark}title={_literal(title(step))}"] if title(step) else []
        if kind:
            given = [each for each in self.known.inputs(kind.name) if each in inputs]
            call, arguments = kind.name, [f"{each}={inputs[each]}" for each in given]
        else:
            pairs = _wrapped("{", [f"{_literal(given)}: {value}" for given, value in inputs.items()], "}")
            call, arguments = "w.node", [_literal(step["class_type"]), "\n".join(pairs)]
        target = self._target(name)
        return _wrapped(f"{target} = {call}(" if target else f"{call}(", arguments + marks, ")")

    def _importable(self, step: Mapping[str, Any]) -> NodeType | None:
        """Its kind, where a call in the script can say all there is to the step."""
        kind = self.nodes.get(step["class_type"])
        if type(kind) is not NodeType or not kind.name.isidentifier():  # those of packs are subclasses
            return None
        inputs = self.known.inputs(kind.name).values()
        required = {each.name for each in inputs if each.required}
        known = {each.name for each in inputs if each.name.isidentifier() and not keyword.iskeyword(each.name)}
        fits = required <= set(step["inputs"]) <= known and not {"_id", "_title"} & set(step["inputs"])
        return kind if fits and kind.name != "Workflow" else None

    def _value(self, value: Any) -> str:
        if is_link(value) and (value[0], value[1]) in self.written:
            return self.written[value[0], value[1]]
        return _literal(value)

    def _target(self, name: str) -> str:
        """What the call's outputs are assigned to; each gets its name."""
        used = list(self.uses[name])
        kind = self.kinds.get(name)
        if not used:
            return ""
        if kind is None:
            variable = self._free(self._own_name(name) or _in_words(self.api[name]["class_type"]))
            self.written |= {(name, slot): f"{variable}[{slot}]" for slot in used}
            return variable
        slots = range(len(kind.outputs))
        variables = [self._free(self._wanted(name, slot)) if slot in used else "_" for slot in slots]
        self.written |= {(name, slot): variables[slot] for slot in slots if slot in used}
        return f"({variables[0]},)" if len(variables) == 1 else ", ".join(variables)

    def _wanted(self, name: str, slot: int) -> str:
        """The title where there is one, else the input that the output goes to, else the output's own name."""
        outputs = self.kinds[name].outputs
        inputs = self.uses[name][slot]
        goes_to = next(iter(inputs)) if len(inputs) == 1 else outputs[slot].name
        return (len(self.uses[name]) == 1 and self._own_name(name)) or goes_to

    def _own_name(self, name: str) -> str:
        """A title that a person chose and that is short."""
        kind = self.nodes.get(self.api[name]["class_type"])
        own = title(self.api[name])
        usual = {self.api[name]["class_type"], kind.display_name if kind else ""}
        return own if own not in usual and len(own) <= _LONGEST_NAME else ""

    def _free(self, wanted: str) -> str:
        """A variable's name like the one wanted that is not in use."""
        plain = re.sub(r"\W+", "_", unicodedata.normalize("NFKC", wanted.lower())).strip("_") or "node"
        plain = next(each for each in (plain, f"node_{plain}", "node") if each.isidentifier())
        name = plain
        while name in self.taken:
            self.numbers[plain] += 1
            name = f"{plain}_{self.numbers[plain]}"
        self.taken.add(name)
        return name


def _in_words(name: str) -> str:
    """``VAELoader`` as ``VAE_Loader``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)


def _wrapped(start: str, items: list[str], end: str) -> list[str]:
    """A call or a dict on one line, or where that is too long an item to a line. Items may have lines themselves."""
    line = f"{start}{', '.join(items)}{end}"
    if len(line) + 4 <= _WIDTH and "\n" not in line:
        return [line]
    return [start, *(f"    {part}" for item in items for part in f"{item},".split("\n")), end]


def _literal(value: Any) -> str:
    """A value of JSON as Python writes it."""
    if isinstance(value, str):
        text = repr(value)
        return f'"{text[1:-1]}"' if text[0] == "'" and '"' not in value else text
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(each)}' for key, each in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, float) and value - value != 0:
        return f'float("{value}")'
    return repr(value)
