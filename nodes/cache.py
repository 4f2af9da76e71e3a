"""Results of nodes, kept by what they were made of, in memory and on disk.

A key is the digest of a node's code, its constants, the keys of what it is joined to, and what its fingerprint says. So
a result serves again in any graph, run or process where all of these are the same, and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from importlib.util import find_spec
from inspect import unwrap
from pathlib import Path
from typing import Any, Protocol

from mahlstick.nodes.files import whole
from mahlstick.nodes.folders import stamp
from mahlstick.nodes.schema import Blocked, NodeType

log = logging.getLogger(__name__)

_ABANDONED = 3600  # seconds after which an unfinished file belongs to no living process
_SLACK = 20  # a folder is looked through each time that a twentieth of its limit was written


@dataclass(frozen=True)
class Entry:
    """What a node gave. ``outputs`` has for each output the list of its values.

    ``shown`` is what it showed, as ComfyUI's ``ui``: under "" the node itself, under the rest of their ids the nodes
    that it grew into. ``stamps`` tell of what each of these rests on.
    """

    outputs: tuple[list[Any], ...] = ()
    shown: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stamps: list[str] = field(default_factory=list)


class Cache(Protocol):
    """Keeps entries by key. It may forget any of them at any time."""

    def get(self, key: str) -> Entry | None: ...

    def put(self, key: str, entry: Entry) -> None: ...

    def free(self) -> None:
        """Give back memory."""


def key(
    node: NodeType,
    constants: Mapping[str, str | None],
    links: Mapping[str, tuple[str | None, int]],
    fingerprint: str | None = "",
) -> str | None:
    """The SHA-256 of all that a result depends on; None where it is never the same again.

    ``constants`` and ``fingerprint`` are :func:`canonical`, and so None where they equal nothing. ``links`` are the key
    and the output's number of what the other inputs are joined to.
    """
    upstream = {name: list(link) for name, link in links.items()}
    if fingerprint is None or None in constants.values() or None in [found for found, _ in links.values()]:
        return None
    parts = [_code(node), dict(constants), upstream, fingerprint]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def canonical(value: Any) -> str | None:
    """A value as text that is the same for equal values; None for what equals nothing (NaN) or is no plain data."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, default=_bytes)
    except (TypeError, ValueError, RecursionError):
        return None


class MemoryCache:
    """Entries in memory, up to ``limit`` bytes of tensors, arrays and networks; the least recently used go first.

    What several entries share counts once.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._entries: OrderedDict[str, tuple[Entry, dict[int, int]]] = OrderedDict()
        self._holders: dict[int, int] = {}  # from an object's identity to the number of entries that hold it

    def get(self, key: str) -> Entry | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: str, entry: Entry) -> None:
        self._drop(key)
        parts = _parts(entry)
        if sum(parts.values()) > self.limit:
            return
        self._entries[key] = (entry, parts)
        for part, size in parts.items():
            self._holders[part] = self._holders.get(part, 0) + 1
            self.size += size if self._holders[part] == 1 else 0
        while self.size > self.limit:
            self._drop(next(iter(self._entries)))

    def free(self) -> None:
        """Forget all."""
        while self._entries:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: str) -> None:
        _, parts = self._entries.pop(key, (None, {}))
        for part, size in parts.items():
            self._holders[part] -= 1
            if not self._holders[part]:
                del self._holders[part]
                self.size -= size


class DiskCache:
    """Entries of tensors and plain data in a folder, up to ``limit`` bytes; the least recently used files go first.

    What cannot be stored, such as a model, is left out. Each entry is a safetensors file. It is written under another
    name and moved, so that several processes may share the folder and a crash leaves nothing broken; a damaged file
    counts as none and is removed.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self.folder = Path(folder)
        self.limit = limit
        self._room = limit - limit // _SLACK
        self._written = limit  # since the folder was last looked through: at the start, for all we know, too much

    def get(self, key: str) -> Entry | None:
        path = self._path(key)
        try:
            entry = _read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read (%s); its node runs again", path, error)
            return None
        except Exception as error:  # there is no end to what a damaged file may raise
            log.warning("%s is damaged (%s); it is removed and its node runs again", path, error)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)  # the time of use
        return entry

    def put(self, key: str, entry: Entry) -> None:
        tensors: dict[str, Any] = {}
        try:
            parts = {"outputs": _packed(entry.outputs, tensors), "shown": _packed(entry.shown, tensors)}
            structure = json.dumps({**parts, "stamps": entry.stamps})
            if sum(tensor.nbytes for tensor in tensors.values()) + len(structure) > self._room:
                return
            self._written += _write(self._path(key), tensors, structure)
            if self._written > self.limit - self._room:
                self._trim()
        except _NotStorable:
            return
        except Exception as error:  # a full disk, an odd kind of tensor: no reason to end a run
            log.warning("%s cannot keep a result (%s)", self.folder, error)

    def free(self) -> None:
        """Does nothing: none of it is in memory."""

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _trim(self) -> None:
        """Remove the files used longest ago until there is room, and what killed processes left."""
        found = sorted(_files(self.folder), key=lambda one: one[1])
        size = sum(size for size, _, _ in found)
        for bytes_, used, path in found:
            unfinished = path.suffix == ".tmp"
            if time.time() - used > _ABANDONED if unfinished else size > self._room:
                with suppress(OSError):  # another process was faster, or reads it
                    path.unlink()
                    size -= bytes_
        self._written = 0


class Tiered:
    """Caches one before the other, the fastest first. What a later one has, those before it get."""

    def __init__(self, *caches: Cache) -> None:
        self._caches = caches

    def get(self, key: str) -> Entry | None:
        for index, each in enumerate(self._caches):
            entry = each.get(key)
            if entry is not None:
                for faster in self._caches[:index]:
                    faster.put(key, entry)
                return entry
        return None

    def put(self, key: str, entry: Entry) -> None:
        for each in self._caches:
            each.put(key, entry)

    def free(self) -> None:
        for each in self._caches:
            each.free()


class _NotStorable(Exception):
    """A value that is neither a tensor nor plain data."""


def _bytes(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    raise TypeError


def _code(node: NodeType) -> list[str]:
    """What changes when the code behind a node does: any of the package or folder that defines it, or any of ours."""
    function = unwrap(node.function)
    name = str(getattr(function, "__module__", "")).partition(".")[0]
    module = sys.modules.get(name)
    package = getattr(module, "__path__", None)
    code = getattr(function, "__code__", None)
    if package and getattr(module, "__file__", None):  # without a file its path changes with the working folder
        digest = _digest(tuple(package), "**/*.py")
    else:
        digest = _digest((str(Path(code.co_filename).parent),), "*.py") if code else ""
    return [node.name, digest, _suite()]


@cache
def _suite() -> str:
    """Of all our code that nodes may call, and of the embedded model: a version number would miss what was pulled or
    edited."""
    ours = [folder for name in ("nodes", "pipelines", "adapters", "annotators") for folder in _folders(name)]
    models = [stamp(Path(folder) / "embedded") for folder in _folders("assets")]
    return _digest(tuple(ours), "**/*.py") + "".join(models)


def _folders(name: str) -> list[str]:
    spec = find_spec(f"mahlstick.{name}")
    return list((spec and spec.submodule_search_locations) or ())


@cache
def _digest(folders: tuple[str, ...], pattern: str) -> str:
    found = hashlib.sha256()
    for path in sorted(path for folder in folders for path in Path(folder).glob(pattern)):
        found.update(path.read_bytes())
    return found.hexdigest()


def _parts(entry: Entry) -> dict[int, int]:
    """The bytes of each tensor, array or network in an entry, by its identity."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    ahead: list[Any] = [entry.outputs]
    while ahead:
        value = ahead.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (str, bytes)):
            found[id(value)] = len(value)
        elif isinstance(value, Mapping):
            ahead += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            ahead += value
        elif is_dataclass(value) and not isinstance(value, type):
            ahead += [getattr(value, each.name) for each in fields(value)]
        else:
            found[id(value)] = _size(value)
    return {part: size for part, size in found.items() if size}


def _size(value: Any) -> int:
    if hasattr(value, "parameters") and hasattr(value, "buffers"):
        return sum(_size(each) for held in (value.parameters(), value.buffers()) for each in held)
    size = getattr(value, "nbytes", 0)
    return size if isinstance(size, int) else 0


def _packed(value: Any, tensors: dict[str, Any]) -> Any:
    """A value as JSON, its tensors gathered by name. Only exact types: what a subclass adds would be lost."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, tuple):
        return {kind.__name__: [_packed(each, tensors) for each in value]}
    if kind is dict:
        return {"dict": [[_packed(name, tensors), _packed(each, tensors)] for name, each in value.items()]}
    if kind is Blocked:
        return {"blocked": value.message}
    if "torch" not in sys.modules:
        raise _NotStorable
    from torch import Tensor, strided

    if kind is not Tensor or value.layout is not strided or value.is_quantized or value.is_meta:
        raise _NotStorable
    name = str(len(tensors))
    tensors[name] = value
    return {"tensor": name, "device": str(value.device)}


def _unpacked(packed: Any, tensors: Mapping[str, Any]) -> Any:
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        return _placed(tensors[packed["tensor"]], packed["device"])
    if "blocked" in packed:
        return Blocked(packed["blocked"])
    if "dict" in packed:
        return {_unpacked(name, tensors): _unpacked(each, tensors) for name, each in packed["dict"]}
    return (
        [_unpacked(each, tensors) for each in packed["list"]]
        if "list" in packed
        else tuple(_unpacked(each, tensors) for each in packed["tuple"])
    )


def _placed(tensor: Any, device: str) -> Any:
    """The tensor where it was, on a machine that has the place."""
    try:
        return tensor.to(device)
    except (RuntimeError, AssertionError):
        return tensor


def _write(path: Path, tensors: Mapping[str, Any], structure: str) -> int:
    """Write an entry whole or not at all. Returns its size in bytes."""
    from safetensors.torch import save_file

    owned = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with whole(path) as unfinished:
        save_file(owned, unfinished, {"structure": structure, "sum": _checksum(owned, structure)})
        return unfinished.stat().st_size


def _read(path: Path) -> Entry:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    structure = metadata["structure"]
    if metadata["sum"] != _checksum(tensors, structure):
        raise ValueError("its sum is wrong")
    found = json.loads(structure)
    return Entry(_unpacked(found["outputs"], tensors), _unpacked(found["shown"], tensors), found["stamps"])


def _checksum(tensors: Mapping[str, Any], structure: str) -> str:
    """Tells a file that a power failure left half on the disk; forcing it there would take longer."""
    from torch import uint8

    found = zlib.crc32(structure.encode())
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].reshape(-1).view(uint8).numpy(), found)
    return str(found)


def _files(folder: Path) -> Iterator[tuple[int, float, Path]]:
    """Size, time of use and path of each file of ours."""
    for path in folder.iterdir():
        if path.suffix in (".safetensors", ".tmp"):
            with suppress(OSError):
                found = path.stat()
                yield found.st_size, found.st_mtime, path
