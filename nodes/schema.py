"""What a node is: a function with typed inputs and outputs, under the name by which workflows know it.

The schema of a node comes from its function's hints. Knows no torch, so that an engine, a converter or a list of nodes
needs none. ComfyUI's words are kept where its workflows or its clients see them (types, options of an input).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from inspect import Parameter, getdoc, iscoroutinefunction, signature
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from mahlstick.errors import MahlstickError

ANY = "*"
_WIDGET_TYPES = {int: "INT", float: "FLOAT", str: "STRING", bool: "BOOLEAN"}


@dataclass(frozen=True)
class Socket:
    """An input or output that carries a value from node to node. ``type`` is ComfyUI's name; several are ``A,B``.

    A ``lazy`` input is computed only when the node asks for it (see ``needs`` of :func:`node`).
    """

    type: str
    lazy: bool = False
    tooltip: str = ""


@dataclass(frozen=True)
class Widget:
    """An input that a person enters. Its type is the hint's (int, float, str, bool), or a list where ``choices`` are
    given, which may be a function that looks them up each time.

    ``optional``: a workflow may leave it out. ``seed``: ComfyUI's page keeps a second widget beside it, which says how
    the number changes after a run. ``upload``: the page offers to upload a picture.
    """

    min: float | None = None
    max: float | None = None
    step: float | None = None
    multiline: bool = False
    choices: Sequence[Any] | Callable[[], Sequence[Any]] | None = None
    seed: bool = False
    upload: bool = False
    optional: bool = False
    lazy: bool = False
    tooltip: str = ""


@dataclass(frozen=True)
class Hidden:
    """An input that the engine fills: the whole PROMPT, the EXTRA_PNGINFO that came with it, the node's UNIQUE_ID, or
    the graph as it has grown, DYNPROMPT."""

    what: Literal["PROMPT", "EXTRA_PNGINFO", "UNIQUE_ID", "DYNPROMPT"]


@dataclass(frozen=True)
class Input:
    """One input of a node. ``options`` are those of ComfyUI's ``/object_info``."""

    name: str
    type: str
    required: bool = True
    choices: tuple[Any, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_widget(self) -> bool:
        """Whether a person enters it, so that a page shows a widget and a workflow may hold its value."""
        return (self.choices is not None or self.type in _WIDGET_TYPES.values()) and not self.options.get("forceInput")

    @property
    def lazy(self) -> bool:
        return bool(self.options.get("lazy"))

    @property
    def info(self) -> list[Any]:
        """As in ``/object_info``: the type or the list of choices, and the options."""
        kind: Any = list(self.choices) if self.choices is not None else self.type
        return [kind, dict(self.options)]


@dataclass(frozen=True)
class Output:
    """One output of a node. A ``is_list`` output gives many values, for each of which the nodes behind it run once."""

    type: str
    name: str
    is_list: bool = False


@dataclass(frozen=True)
class Returned:
    """What a node gives back where its values alone do not say it.

    ``ui`` goes to the page and to clients (``{"images": [...]}``). ``expand`` is a graph in API form to run in the
    node's place; ``outputs`` may then be links into it, ``[id, slot]``.
    """

    outputs: tuple[Any, ...] = ()
    ui: Mapping[str, Any] | None = None
    expand: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Blocked:
    """As an output: the nodes behind it do not run. With a ``message`` that is an error, without one it is silent."""

    message: str | None = None


class Recorder(Protocol):
    """Takes down a node's call in place of running it, and returns its links.

    A call may name the node's id and title too, as ``_id`` and ``_title``.
    """

    def __call__(self, node: NodeType, inputs: dict[str, Any]) -> tuple[Any, ...]: ...


#: Set while a script builds a workflow: calls of nodes are then taken down.
recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@dataclass(frozen=True, eq=False)
class NodeType:
    """A kind of node. Called with its inputs by name it runs, and returns its outputs as a tuple."""

    name: str
    function: Callable[..., Any]
    category: str = ""
    display_name: str = ""
    description: str = ""
    is_output: bool = False
    takes_lists: bool = False
    fingerprint: Callable[..., Any] | None = None
    check: Callable[..., bool | str] | None = None
    needs: Callable[..., Iterable[str]] | None = None
    output_names: tuple[str, ...] = ()
    output_lists: tuple[bool, ...] = ()

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Those a workflow gives, in order: the required ones before the others."""
        found = [_input(*declared) for declared in self._declared if not isinstance(declared[2], Hidden)]
        return tuple(sorted(found, key=lambda one: not one.required))

    @cached_property
    def hidden(self) -> dict[str, str]:
        """What the engine fills in, by the argument's name."""
        return {name: mark.what for name, _, mark, _ in self._declared if isinstance(mark, Hidden)}

    @cached_property
    def outputs(self) -> tuple[Output, ...]:
        hint = get_type_hints(self.function, include_extras=True).get("return")
        hints = (
            get_args(hint) if get_origin(hint) is tuple else () if hint in (None, types.NoneType, Returned) else (hint,)
        )
        kinds = [_mark(each)[1] for each in hints]
        names = self.output_names or tuple(_type_of(*_mark(each)) for each in hints)
        lists = self.output_lists or (False,) * len(hints)
        return tuple(
            Output(_type_of(_mark(each)[0], mark), name, is_list)
            for each, mark, name, is_list in zip(hints, kinds, names, lists, strict=True)
        )

    @cached_property
    def is_async(self) -> bool:
        return iscoroutinefunction(self.function)

    def bind(self) -> Callable[..., Any]:
        """The function to call for one node of a graph."""
        return self.function

    def returned(self, result: Any) -> Returned:
        """What the function gave back, in one form."""
        if isinstance(result, Returned):
            return result
        if result is None and not self.outputs:
            return Returned()
        return Returned(result if isinstance(result, tuple) and len(self.outputs) != 1 else (result,))

    def __call__(self, /, **inputs: Any) -> tuple[Any, ...]:
        take_down = recorder.get()
        if take_down is not None:
            return take_down(self, inputs)
        self.check_names(inputs)
        result = self.bind()(**inputs)
        if hasattr(result, "__await__"):
            import asyncio

            result = asyncio.run(_awaited(result))
        found = self.returned(result)
        if found.expand is not None:
            raise MahlstickError(f"{self.name} grows into other nodes, so it runs in a workflow only.")
        return found.outputs

    def check_names(self, inputs: Mapping[str, Any]) -> None:
        """Raises ``MahlstickError`` where a name is no input's, or an input that has no default is missing."""
        known = [each.name for each in self.inputs]
        for name in inputs:
            if name not in known and name not in self.hidden:
                raise MahlstickError(f"{self.name} has no input {name!r}; it has {', '.join(known) or 'none'}.")
        missing = [each.name for each in self.inputs if each.name not in inputs and self._is_asked(each)]
        if missing:
            raise MahlstickError(f"{self.name} also needs {', '.join(missing)}.")

    def _is_asked(self, one: Input) -> bool:
        return one.required and "default" not in one.options

    @cached_property
    def _declared(self) -> list[tuple[str, Any, Any, Any]]:
        """Name, plain type, mark and default of each parameter."""
        hints = get_type_hints(self.function, include_extras=True)
        return [(name, *_mark(hints[name]), p.default) for name, p in signature(self.function).parameters.items()]

    @property
    def info(self) -> dict[str, Any]:
        """The node's entry in ComfyUI's ``/object_info``."""
        inputs = self.inputs
        required = {each.name: each.info for each in inputs if each.required}
        optional = {each.name: each.info for each in inputs if not each.required}
        groups: dict[str, Mapping[str, Any]] = {"required": required, "optional": optional, "hidden": self.hidden}
        kept = {group: found for group, found in groups.items() if found or group == "required"}
        return {
            "input": kept,
            "input_order": {group: list(found) for group, found in kept.items()},
            "output": [each.type for each in self.outputs],
            "output_is_list": [each.is_list for each in self.outputs],
            "output_name": [each.name for each in self.outputs],
            "name": self.name,
            "display_name": self.display_name or self.name,
            "description": self.description,
            "category": self.category,
            "output_node": self.is_output,
            "python_module": "nodes",
        }


def node(
    category: str,
    *,
    name: str = "",
    display_name: str = "",
    is_output: bool = False,
    takes_lists: bool = False,
    fingerprint: Callable[..., Any] | None = None,
    check: Callable[..., bool | str] | None = None,
    needs: Callable[..., Iterable[str]] | None = None,
    outputs: Sequence[str] = (),
    lists: Sequence[bool] = (),
) -> Callable[[Callable[..., Any]], NodeType]:
    """Make a node of a function whose name is the node's, or ``name``.

    The function takes its inputs by keyword. Their hints are a :class:`Socket`, a :class:`Widget` or a :class:`Hidden`
    in ``Annotated``, a plain int, float, str or bool, or a ``Literal``; a socket with ``| None`` may stay open. It
    returns one value, a tuple as long as its return hint, or a :class:`Returned`.

    ``is_output``: it is run for its own sake. ``takes_lists``: it gets every input as a list. ``fingerprint``: called
    with the constant inputs (None for those joined to other nodes), it tells of what the result depends on beyond its
    inputs, such as a file's date; a new answer makes the node run again. ``check``: called likewise before anything
    runs; True, or a sentence that says what is wrong. ``needs``: called with the inputs that are there, it names the
    lazy ones that must be computed as well. Each of the three is given only the arguments it has. ``outputs``,
    ``lists``: the outputs' names, and which of them give many values.
    """

    def declare(function: Callable[..., Any]) -> NodeType:
        return NodeType(
            name=name or function.__name__,
            function=function,
            category=category,
            display_name=display_name,
            description=getdoc(function) or "",
            is_output=is_output,
            takes_lists=takes_lists,
            fingerprint=fingerprint,
            check=check,
            needs=needs,
            output_names=tuple(outputs),
            output_lists=tuple(lists),
        )

    return declare


def catalogue(*modules: types.ModuleType) -> dict[str, NodeType]:
    """The nodes that modules define, by name."""
    found = [value for module in modules for value in vars(module).values() if isinstance(value, NodeType)]
    return {each.name: each for each in found}


async def _awaited(result: Any) -> Any:
    return await result


def _mark(hint: Any) -> tuple[Any, Any]:
    """A hint's plain type, with None where it may be, and its Socket, Widget or Hidden."""
    if get_origin(hint) in (Union, types.UnionType):
        plain = [each for each in get_args(hint) if each is not types.NoneType]
        inner, mark = _mark(plain[0])
        return (inner | None) if len(plain) < len(get_args(hint)) else inner, mark
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        return inner, next((mark for mark in marks if isinstance(mark, (Socket, Widget, Hidden))), Widget())
    if get_origin(hint) is Literal:
        return str, Widget(choices=get_args(hint))
    return hint, Widget()


def _type_of(plain: Any, mark: Any) -> str:
    if isinstance(mark, Socket):
        return mark.type
    if mark.choices is not None:
        return "COMBO"
    plain = next((each for each in get_args(plain) if each is not types.NoneType), plain)
    if plain not in _WIDGET_TYPES:
        raise TypeError(f"{plain!r} is no type of an input: annotate it with a Socket, or use int, float, str or bool")
    return _WIDGET_TYPES[plain]


def _input(name: str, plain: Any, mark: Any, default: Any) -> Input:
    may_be_none = types.NoneType in get_args(plain)
    options: dict[str, Any] = {} if default in (Parameter.empty, None) else {"default": default}
    if mark.tooltip:
        options["tooltip"] = mark.tooltip
    if mark.lazy:
        options["lazy"] = True
    if isinstance(mark, Socket):
        return Input(name, mark.type, not may_be_none, options=options)
    named = {"min": mark.min, "max": mark.max, "step": mark.step}
    flags = {"multiline": mark.multiline, "control_after_generate": mark.seed, "image_upload": mark.upload}
    options |= {key: value for key, value in named.items() if value is not None}
    options |= {key: True for key, value in flags.items() if value}
    choices = mark.choices() if callable(mark.choices) else mark.choices
    required = not (mark.optional or may_be_none)
    return Input(name, _type_of(plain, mark), required, None if choices is None else tuple(choices), options)
