"""A workflow as a graph of steps: read from ComfyUI's API JSON, written back, and checked before anything runs.

ComfyUI's behaviour is the specification of the checks and of how they are reported. One thing differs: a fault in any
node that an output depends on refuses the whole graph, so that nothing runs in part. No function here calls itself, so
that long chains and deep nesting do no harm.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from math import isnan
from typing import Any, NamedTuple, TypeGuard

from mahlstick.errors import MahlstickError
from mahlstick.nodes.schema import ANY, Input, NodeType

_WRAP = "__value__"
_DEEPEST = 64  # lists within lists in a constant
_MANY = 20  # choices, faults or nodes that an error lists
_WIDE = 200  # characters of a value in an error
_NO_LINK = 'A list is a link, [node id, output number]; as a constant it is written {"__value__": [...]}'
_CONVERT: dict[str, Callable[[Any], Any]] = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}

Fault = dict[str, Any]


class Link(NamedTuple):
    """An input that takes what output number ``slot`` of ``node`` gives."""

    node: str
    slot: int


class NoLink(list[Any]):
    """A list that is neither a link nor marked as a constant: a fault, if the node knows the input."""


@dataclass
class Step:
    """One node of a graph: its class name, and its inputs, each a :class:`Link` or a constant."""

    kind: str
    inputs: dict[str, Any] = field(default_factory=dict)
    title: str = ""


Graph = dict[str, Step]


class InvalidGraph(MahlstickError):
    """A graph that will not run. ``error`` and ``node_errors`` are what ComfyUI answers to ``/prompt``."""

    def __init__(self, error: Fault, node_errors: Mapping[str, dict[str, Any]] | None = None) -> None:
        self.error = error
        self.node_errors = dict(node_errors or {})
        super().__init__(_sentence(error, self.node_errors))


def parse(prompt: Any) -> Graph:
    """The graph in ComfyUI's API JSON. A list of two, ``[id, slot]``, is a link; a constant list is
    ``{"__value__": [...]}`` there and a plain list in the graph. What nodes do not know is kept.

    Raises :class:`InvalidGraph` where ``prompt`` has another form.
    """
    if not isinstance(prompt, Mapping):
        raise _malformed("A workflow is an object that has an entry for each node", _shown(prompt))
    return {each: _parse_step(each, entry) for each, entry in prompt.items()}


def to_api(graph: Graph) -> dict[str, Any]:
    """The graph in ComfyUI's API JSON."""
    return {each: _api_step(step) for each, step in graph.items()}


def validate(graph: Graph, nodes: Mapping[str, NodeType], targets: Iterable[str] | None = None) -> list[str]:
    """The ids of the nodes to run: all output nodes, or ``targets``. Raises :class:`InvalidGraph`."""
    return prepare(graph, Kinds(nodes), targets)[1]


def prepare(graph: Graph, kinds: Kinds, targets: Iterable[str] | None = None) -> tuple[Graph, list[str]]:
    """The graph as it will run, and the ids of the nodes to run.

    It holds what these depend on, with constants converted to the types of their inputs and without inputs that the
    nodes do not know. ``graph`` stays as it is. Raises :class:`InvalidGraph`.
    """
    outputs = _outputs(graph, kinds, targets)
    checks = _Checks(graph, kinds, outputs)
    for each in outputs:
        checks.check_upwards(each)
    if checks.faults:
        raise checks.refusal()
    return checks.prepared, outputs


class Kinds:
    """The kinds of nodes, each asked for its inputs once: to look up choices may mean to walk through folders."""

    def __init__(self, nodes: Mapping[str, NodeType]) -> None:
        self._nodes = nodes
        self._inputs: dict[str, dict[str, Input]] = {}

    def __contains__(self, kind: object) -> bool:
        return isinstance(kind, str) and kind in self._nodes

    def __getitem__(self, kind: str) -> NodeType:
        return self._nodes[kind]

    def inputs(self, kind: str) -> dict[str, Input]:
        """The inputs of a kind by name, the required ones first."""
        if kind not in self._inputs:
            self._inputs[kind] = {each.name: each for each in self._nodes[kind].inputs}
        return self._inputs[kind]

    def links(self, step: Step) -> Iterator[tuple[Input, Link]]:
        """The links of a step into inputs that its kind knows."""
        for name, one in self.inputs(step.kind).items():
            value = step.inputs.get(name)
            if isinstance(value, Link):
                yield one, value


class LiveGraph:
    """The graph as it grows while it runs: what a node gets as DYNPROMPT, hence ComfyUI's names of its methods.

    A node that expands is the parent of the nodes that it adds, and what these show is shown as its own.
    """

    def __init__(self, prepared: Graph, original: Graph) -> None:
        self.steps = dict(prepared)
        self._original = original
        self._parents: dict[str, str] = {}
        self._displays: dict[str, str] = {}

    def add(self, parent: str, call: int, expand: Mapping[str, Any]) -> dict[str, str]:
        """Add what call number ``call`` of ``parent`` expands to. Returns the new ids, unique below the parent's, by
        those in ``expand``. Raises ``MahlstickError`` where a link leads nowhere."""
        below = f"{parent}."
        unique = all(each.startswith(below) and each not in self.steps for each in expand)
        names = {each: each if unique else f"{below}{call}.{each}" for each in expand}
        for each, entry in expand.items():
            inputs = {name: self.resolve(value, names) for name, value in entry.get("inputs", {}).items()}
            self.steps[names[each]] = Step(entry["class_type"], inputs)
            self._parents[names[each]] = parent
            self._displays[names[each]] = entry.get("override_display_id", parent)
        for each in names.values():
            for name, value in self.steps[each].inputs.items():
                if isinstance(value, Link) and value.node not in self.steps:
                    raise MahlstickError(f"Added node {each}: input {name} is joined to {value.node}: no such node.")
        return names

    def resolve(self, value: Any, names: Mapping[str, str]) -> Any:
        """A value of an expansion, with its link to the node's new id."""
        value = _value(value)
        return Link(names.get(value.node, value.node), value.slot) if isinstance(value, Link) else value

    def get_node(self, node_id: str) -> dict[str, Any]:
        return _api_step(self.steps[node_id])

    def has_node(self, node_id: str) -> bool:
        return node_id in self.steps

    def all_node_ids(self) -> set[str]:
        return set(self.steps)

    def get_original_prompt(self) -> dict[str, Any]:
        return to_api(self._original)

    def get_parent_node_id(self, node_id: str) -> str | None:
        return self._parents.get(node_id)

    def get_real_node_id(self, node_id: str) -> str:
        """The node of the workflow that a node was added by, or the node itself."""
        return _last(node_id, self._parents)

    def get_display_node_id(self, node_id: str) -> str:
        """The node as whose own a page shows this one's progress and pictures."""
        return _last(node_id, self._displays)


def call_with(function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """Call a function with those of the values that it has arguments for."""
    takes = _arguments(function)
    return function(**{name: value for name, value in values.items() if takes is None or name in takes})


class _Checks:
    """The checks of all that some outputs depend on."""

    def __init__(self, graph: Graph, kinds: Kinds, outputs: Sequence[str]) -> None:
        self.prepared: Graph = {}
        self.faults: dict[str, list[Fault]] = {}
        self._graph = graph
        self._kinds = kinds
        self._outputs = outputs
        self._in_cycles: set[str] = set()

    def check_upwards(self, output: str) -> None:
        """Check an output and all before it."""
        if output in self.prepared:
            return
        way, ahead = [output], [self._enter(output)]  # the nodes from the output to here, their links still to follow
        on_way = {output}
        while way:
            one, link = next(ahead[-1], (None, None))
            if one is None or link is None:
                on_way.remove(way.pop())
                ahead.pop()
            elif link.node in on_way:
                self._note_cycle(way, link.node)
            elif link.node not in self.prepared:
                way.append(link.node)
                on_way.add(link.node)
                ahead.append(self._enter(link.node, (one, link)))

    def refusal(self) -> InvalidGraph:
        """All that was found."""
        lines = [f"{each['message']}: {each['details']}" for faults in self.faults.values() for each in faults]
        error = _fault("prompt_outputs_failed_validation", "Prompt outputs failed validation", "\n".join(lines[:_MANY]))
        dependent = self._dependent()
        node_errors = {
            each: {"errors": faults, "dependent_outputs": dependent[each], "class_type": self._graph[each].kind}
            for each, faults in self.faults.items()
        }
        return InvalidGraph(error, node_errors)

    def _enter(self, each: str, via: tuple[Input, Link] | None = None) -> Iterator[tuple[Input, Link]]:
        """Check a node, reached by a link. Returns its own links to nodes that are there."""
        step = self._graph[each]
        self.prepared[each] = Step(step.kind, title=step.title)
        links: list[tuple[Input, Link]] = []
        try:
            links += [(one, link) for one, link in self._kinds.links(step) if link.node in self._graph]
            faults = self._faults(step, self.prepared[each].inputs)
        except Exception as error:  # from choices that cannot be looked up, or a node pack's own check
            faults = [_raised(error, via)]
        if faults:
            self.faults[each] = [*self.faults.get(each, ()), *faults]
        return iter(links)

    def _faults(self, step: Step, inputs: dict[str, Any]) -> list[Fault]:
        """What is wrong with a step. Its inputs, converted, are put into ``inputs``."""
        node = self._kinds[step.kind]
        judged = _arguments(node.check) if node.check else set()
        faults: list[Fault | None] = []
        for name, one in self._kinds.inputs(step.kind).items():
            if name not in step.inputs:
                missing = _fault("required_input_missing", "Required input is missing", name, input_name=name)
                faults.append(missing if one.required else None)
                continue
            inputs[name] = step.inputs[name]
            if isinstance(inputs[name], NoLink):
                faults.append(_input_fault(one, "bad_linked_input", _NO_LINK, list(inputs[name])))
            elif isinstance(inputs[name], Link):
                faults.append(self._link_fault(one, inputs[name], judged))
            else:
                in_range = judged is not None and name not in judged
                inputs[name], fault = _constant(one, inputs[name], in_range=in_range)
                faults.append(fault)
        return [fault for fault in faults if fault] or self._judgement(node, inputs)

    def _link_fault(self, one: Input, link: Link, judged: set[str] | None) -> Fault | None:
        if link.node not in self._graph:
            return _input_fault(one, "bad_linked_input", f"There is no node {link.node}", list(link))
        kind = self._graph[link.node].kind
        gives = self._kinds[kind].outputs
        if not 0 <= link.slot < len(gives):
            return _input_fault(one, "bad_linked_input", f"{kind} has no output {link.slot}", list(link))
        given = gives[link.slot].type
        if _matches(given, one.type) or (judged is not None and "input_types" in judged):
            return None
        fault = _input_fault(one, "return_type_mismatch", "Return type mismatch between linked nodes", list(link))
        fault["details"] = f"{one.name}, received_type({given}) mismatch input_type({one.type})"
        fault["extra_info"] |= {"received_type": given, "linked_node": list(link)}
        return fault

    def _judgement(self, node: NodeType, inputs: Mapping[str, Any]) -> list[Fault]:
        """What the node's own check says, told of each input that it looked at."""
        if node.check is None:
            return []
        takes = _arguments(node.check)
        joined = {name: value for name, value in inputs.items() if isinstance(value, Link)}
        values: dict[str, Any] = {**inputs, **dict.fromkeys(joined)}
        if takes is not None and "input_types" in takes:
            values["input_types"] = {name: self._type(link) for name, link in joined.items()}
        answer = call_with(node.check, values)
        if answer is True:
            return []
        said = "" if answer is False else f" - {answer}"
        return [
            _fault("custom_validation_failed", "Custom validation failed for node", f"{name}{said}", input_name=name)
            for name in inputs
            if takes is None or name in takes
        ] or [_fault("custom_validation_failed", "Custom validation failed for node", said.removeprefix(" - "))]

    def _type(self, link: Link) -> str:
        return self._kinds[self._graph[link.node].kind].outputs[link.slot].type

    def _note_cycle(self, way: Sequence[str], back: str) -> None:
        if back in self._in_cycles:
            return
        nodes = way[way.index(back) :]
        self._in_cycles.update(nodes)
        names = [f"{each} ({self._graph[each].kind})" for each in [*nodes, back]]
        path = " -> ".join(names if len(names) <= _MANY else [*names[: _MANY - 2], "…", names[-1]])
        nodes = nodes[:_MANY]
        for each in nodes:
            fault = _fault("dependency_cycle", "Dependency cycle detected", path, node_id=each, cycle_nodes=nodes)
            self.faults[each] = [fault, *self.faults.get(each, ())]

    def _dependent(self) -> dict[str, list[str]]:
        """The outputs that depend on each node."""
        found: dict[str, list[str]] = {each: [] for each in self.prepared}
        for output in self._outputs:
            seen, ahead = {output}, [output]
            while ahead:
                here = ahead.pop()
                found[here].append(output)
                links = (value for value in self.prepared[here].inputs.values() if isinstance(value, Link))
                fresh = {link.node for link in links if link.node in self.prepared} - seen
                seen |= fresh
                ahead += fresh
        return found


def _outputs(graph: Graph, kinds: Kinds, targets: Iterable[str] | None) -> list[str]:
    for each, step in graph.items():
        if step.kind not in kinds:
            raise InvalidGraph(
                _fault(
                    "missing_node_type",
                    f"Node {each} ({step.kind}) is unknown here; install or name the node pack that brings it",
                    f"Node ID '#{each}'",
                    node_id=each,
                    class_type=step.kind,
                    node_title=step.title or step.kind,
                )
            )
    wanted = [each for each, step in graph.items() if kinds[step.kind].is_output] if targets is None else list(targets)
    lost = [f"no node {each}" for each in wanted if each not in graph]
    if lost or not wanted:
        raise InvalidGraph(_fault("prompt_no_outputs", "Prompt has no outputs", ", ".join(lost[:_MANY])))
    return wanted


def _constant(one: Input, value: Any, *, in_range: bool) -> tuple[Any, Fault | None]:
    """A constant, converted, and what is wrong with it."""
    try:
        value = _CONVERT[one.type](value) if one.type in _CONVERT else value
        if isinstance(value, float) and isnan(value):
            raise ValueError("it is not a number")
    except Exception as error:
        message = f"Failed to convert an input value to a {one.type} value"
        fault = _input_fault(one, "invalid_input_type", message, value)
        fault["details"] = f"{one.name}, {_shown(value)}, {_cut(str(error))}"
        fault["extra_info"]["exception_message"] = _cut(str(error))
        return value, fault
    return value, _range_fault(one, value) if in_range else None


def _range_fault(one: Input, value: Any) -> Fault | None:
    if one.choices is not None:
        chosen = value if isinstance(value, list) and one.options.get("multiselect") else [value]
        wrong = [each for each in chosen if each not in one.choices]
        return _choice_fault(one, wrong, value) if wrong else None
    if not isinstance(value, (int, float)):
        return None
    least, most = one.options.get("min"), one.options.get("max")
    if least is not None and value < least:
        return _input_fault(one, "value_smaller_than_min", f"Value {_shown(value)} smaller than min of {least}", value)
    if most is not None and value > most:
        return _input_fault(one, "value_bigger_than_max", f"Value {_shown(value)} bigger than max of {most}", value)
    return None


def _choice_fault(one: Input, wrong: Sequence[Any], value: Any) -> Fault:
    choices = one.choices or ()
    listed = f"(list of length {len(choices)})" if len(choices) > _MANY else str(list(choices))
    fault = _input_fault(one, "value_not_in_list", "Value not in list", value)
    fault["details"] = f"{one.name}: {', '.join(repr(_shown(each)) for each in wrong[:_MANY])} not in {listed}"
    return fault


def _fault(kind: str, message: str, details: str = "", **extra: Any) -> Fault:
    return {"type": kind, "message": message, "details": details, "extra_info": extra}


def _input_fault(one: Input, kind: str, message: str, value: Any) -> Fault:
    return _fault(kind, message, one.name, **_about(one), received_value=_shown(value))


def _about(one: Input) -> dict[str, Any]:
    """Which input a fault is in; without its choices where they are many."""
    many = one.choices is not None and len(one.choices) > _MANY
    return {"input_name": one.name, "input_config": None if many else one.info}


def _raised(error: Exception, via: tuple[Input, Link] | None) -> Fault:
    """A node's check that failed itself; ``via`` is the link by which we came, None at an output."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    extra: dict[str, Any] = {"exception_type": name, "traceback": traceback.format_tb(error.__traceback__)}
    if via is None:
        return _fault("exception_during_validation", "Exception when validating node", str(error), **extra)
    one, link = via
    extra |= {**_about(one), "exception_message": str(error), "linked_node": list(link)}
    return _fault("exception_during_inner_validation", "Exception when validating inner node", str(error), **extra)


def _malformed(message: str, details: str) -> InvalidGraph:
    return InvalidGraph(_fault("invalid_prompt", message, details))


def _parse_step(each: Any, entry: Any) -> Step:
    if not isinstance(each, str):
        raise _malformed("A node's id is text", _shown(each))
    if not isinstance(entry, Mapping):
        raise _malformed("A node is an object with class_type and inputs", f"Node ID '#{each}'")
    inputs, meta = entry.get("inputs", {}), entry.get("_meta")
    title = meta.get("title") if isinstance(meta, Mapping) else None
    title = title if isinstance(title, str) else ""
    kind = entry.get("class_type")
    if not isinstance(kind, str):
        message = f"Node '{title or f'ID #{each}'}' has no class_type; the workflow is damaged"
        extra = {"node_id": each, "class_type": None, "node_title": title or None}
        raise InvalidGraph(_fault("missing_node_type", message, f"Node ID '#{each}'", **extra))
    if not isinstance(inputs, Mapping) or not all(isinstance(name, str) for name in inputs):
        raise _malformed("A node's inputs are an object with names", f"Node ID '#{each}' ({kind})")
    for name, value in inputs.items():
        if _is_too_deep(value):
            raise _malformed("An input is nested too deeply", f"Node ID '#{each}' ({kind}), input {name}")
    lists = {name: NoLink(value) for name, value in inputs.items() if isinstance(value, list) and not is_link(value)}
    return Step(kind, {name: _value(value) for name, value in inputs.items()} | lists, title)


def is_link(value: Any) -> TypeGuard[list[Any]]:
    """Whether a value in API JSON is a link, ``[id, slot]``."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int


def _value(value: Any) -> Any:
    """What an input is in a graph that is ``value`` in API JSON."""
    if is_link(value):
        return Link(*value)
    return value[_WRAP] if isinstance(value, Mapping) and _WRAP in value else value


def _api_step(step: Step) -> dict[str, Any]:
    inputs = {name: _api_value(value) for name, value in step.inputs.items()}
    return {"inputs": inputs, "class_type": step.kind} | ({"_meta": {"title": step.title}} if step.title else {})


def _api_value(value: Any) -> Any:
    if isinstance(value, (Link, NoLink)):
        return list(value)
    return {_WRAP: value} if isinstance(value, list) or (isinstance(value, Mapping) and _WRAP in value) else value


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        # each list once, for one may be in many places, or in itself
        found = {id(each): each for each in level if isinstance(each, (list, Mapping))}
        level = [inner for each in found.values() for inner in (each if isinstance(each, list) else each.values())]
        if not level:
            return False
    return True


def _matches(given: str, wanted: str) -> bool:
    if given == wanted or ANY in (given, wanted):
        return True
    return bool({each.strip() for each in given.split(",")} & {each.strip() for each in wanted.split(",")})


def _arguments(function: Callable[..., Any]) -> set[str] | None:
    """The names of a function's arguments; None where it takes any."""
    parameters = signature(function).parameters
    return None if any(each.kind is Parameter.VAR_KEYWORD for each in parameters.values()) else set(parameters)


def _last(each: str, after: Mapping[str, str]) -> str:
    while each in after:
        each = after[each]
    return each


def _shown(value: Any) -> Any:
    """A value as errors show it: itself where it is short and JSON, else a part of it as text."""
    try:
        if len(json.dumps(value, allow_nan=False)) <= _WIDE:
            return value
    except (TypeError, ValueError, RecursionError):
        pass
    try:
        return _cut(repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits, an object within many
        return f"<{type(value).__name__}>"


def _cut(text: str) -> str:
    return text if len(text) <= _WIDE else f"{text[:_WIDE]}…"


def _sentence(error: Fault, node_errors: Mapping[str, dict[str, Any]]) -> str:
    """The first fault, and how many others there are."""
    if not node_errors:
        details = f" ({error['details']})" if error["details"] else ""
        return f"{error['message']}{details}."
    each, found = next(iter(node_errors.items()))
    first = found["errors"][0]
    name = first["extra_info"].get("input_name", "")
    where = f"Node {each} ({found['class_type']})" + (f", input {name}" if name else "")
    what = first["message"] if first["details"] == name else f"{first['message']}: {first['details']}"
    more = sum(len(one["errors"]) for one in node_errors.values()) - 1
    others = f" (and {more} more {'fault' if more == 1 else 'faults'})" if more else ""
    return f"{where}: {what}{others}."
