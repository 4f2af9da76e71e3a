"""Third-party packs of nodes, written for ComfyUI: classes under ``NODE_CLASS_MAPPINGS`` (its first interface, V1).

A pack is a program of somebody else's, and loading it runs it. That happens only with a folder that the user names.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from inspect import iscoroutinefunction, signature
from pathlib import Path
from types import ModuleType
from typing import Any

from mahlstick.errors import MahlstickError
from mahlstick.nodes.comfy import shim
from mahlstick.nodes.schema import Blocked, Input, NodeType, Output, Returned

_FILLED_IN = {"PROMPT", "EXTRA_PNGINFO", "UNIQUE_ID", "DYNPROMPT"}


def load_pack(folder: Path) -> dict[str, NodeType]:
    """The nodes of a pack by class name. ``folder`` has an ``__init__.py``, or is a file of Python itself.

    Raises ``MahlstickError`` where it is no pack or cannot be loaded; what it had loaded until then is gone again.
    """
    path = folder.expanduser().resolve()
    file = path / "__init__.py" if path.is_dir() else path
    if not file.is_file():
        raise MahlstickError(f"{folder}: no pack of nodes; give a folder with an __init__.py, or a file of Python.")
    name = "mahlstick_pack_" + re.sub(r"\W", "_", str(path))
    try:
        with shim.installed():
            return _nodes(_executed(name, file))
    except (Exception, SystemExit) as error:
        for each in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
            del sys.modules[each]
        raise MahlstickError(_said(folder, error)) from error


@dataclass(frozen=True, eq=False)
class PackNode(NodeType):
    """A V1 class as a kind of node."""

    source: Any = None

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Asked of the class each time, since its choices may be files."""
        declared = self._declares()
        return tuple(
            _input(name, spec, group == "required")
            for group in ("required", "optional")
            for name, spec in (declared.get(group) or {}).items()
        )

    @cached_property
    def hidden(self) -> dict[str, str]:
        declared = self._declares().get("hidden") or {}
        found = {name: spec if isinstance(spec, str) else spec[0] for name, spec in declared.items()}
        return {name: what for name, what in found.items() if what in _FILLED_IN}

    @cached_property
    def outputs(self) -> tuple[Output, ...]:
        types = [_type(each) for each in getattr(self.source, "RETURN_TYPES", None) or ()]
        names = dict(enumerate(getattr(self.source, "RETURN_NAMES", None) or ()))
        lists = dict(enumerate(getattr(self.source, "OUTPUT_IS_LIST", None) or ()))
        return tuple(Output(each, names.get(i, each), lists.get(i, False)) for i, each in enumerate(types))

    def bind(self) -> Callable[..., Any]:
        return _with_comfy(getattr(self.source(), self.source.FUNCTION))

    def returned(self, result: Any) -> Returned:
        if isinstance(result, dict):
            return Returned(self._values(result.get("result")), result.get("ui"), result.get("expand"))
        return Returned(self._values(result))

    def _values(self, result: Any) -> tuple[Any, ...]:
        if isinstance(result, Blocked):
            return (result,) * len(self.outputs)
        return tuple(result or ()) if isinstance(result, (tuple, list, type(None))) else (result,)

    def _declares(self) -> dict[str, Any]:
        with shim.installed():
            return dict(self.source.INPUT_TYPES())


def _executed(name: str, file: Path) -> ModuleType:
    folders = [str(file.parent)] if file.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
    if spec is None or spec.loader is None:
        raise MahlstickError("it is no file of Python")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _nodes(module: ModuleType) -> dict[str, NodeType]:
    classes = getattr(module, "NODE_CLASS_MAPPINGS", None)
    if not isinstance(classes, dict):
        raise MahlstickError("it has no NODE_CLASS_MAPPINGS, which name the nodes of a V1 pack")
    names = getattr(module, "NODE_DISPLAY_NAME_MAPPINGS", None) or {}
    found: dict[str, NodeType] = {}
    for name, source in classes.items():
        try:
            found[name] = _node(name, source, names.get(name, ""))
            _ = found[name].inputs, found[name].hidden, found[name].outputs
        except Exception as error:
            raise MahlstickError(f"its node {name} is not as ComfyUI wants it ({error!r})") from error
    return found


def _node(name: str, source: Any, display_name: str) -> PackNode:
    function = getattr(source, source.FUNCTION)
    return PackNode(
        name=name,
        function=function,
        category=getattr(source, "CATEGORY", ""),
        display_name=display_name,
        description=getattr(source, "DESCRIPTION", ""),
        is_output=bool(getattr(source, "OUTPUT_NODE", False)),
        takes_lists=bool(getattr(source, "INPUT_IS_LIST", False)),
        fingerprint=_with_comfy(source.IS_CHANGED) if hasattr(source, "IS_CHANGED") else None,
        check=_with_comfy(source.VALIDATE_INPUTS) if hasattr(source, "VALIDATE_INPUTS") else None,
        needs=_of_an_instance(source, "check_lazy_status") if hasattr(source, "check_lazy_status") else None,
        source=source,
    )


def _input(name: str, spec: Any, required: bool) -> Input:
    kind, *rest = (spec,) if isinstance(spec, str) else spec
    options = dict(rest[0]) if rest and rest[0] else {}
    choices = kind if isinstance(kind, (list, tuple)) else options.pop("options", ()) if kind == "COMBO" else None
    return Input(name, _type(kind), required, None if choices is None else tuple(choices), options)


def _type(kind: Any) -> str:
    """A list of choices has a type too: COMBO."""
    return "COMBO" if isinstance(kind, (list, tuple)) else str(kind)


def _with_comfy(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with ComfyUI's modules there for what it imports when it is called."""
    if iscoroutinefunction(function):

        @wraps(function)
        async def awaited(*args: Any, **inputs: Any) -> Any:
            with shim.installed():
                return await function(*args, **inputs)

        return awaited

    @wraps(function)
    def called(*args: Any, **inputs: Any) -> Any:
        with shim.installed():
            return function(*args, **inputs)

    return called


def _of_an_instance(source: Any, name: str) -> Callable[..., Any]:
    """A method that is given an instance of its own at each call."""

    def call(**inputs: Any) -> Any:
        return getattr(source(), name)(**inputs)

    function = _with_comfy(call)
    vars(function)["__signature__"] = signature(getattr(object.__new__(source), name))
    return function


def _said(folder: Path, error: BaseException) -> str:
    """Why a pack cannot be used, and what to do."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        if error.name.partition(".")[0] in shim.COMFY:
            return f"{folder}: the pack needs {error.name}, a part of ComfyUI that mahlstick does not have."
        return f"{folder}: the pack needs the module {error.name}, which is missing; install what the pack asks for."
    if isinstance(error, MahlstickError):
        return f"{folder}: the pack cannot be used: {error}."
    return f"{folder}: the pack cannot be loaded ({type(error).__name__}: {error}); ask those who made it."
