"""What frozen models make of the examples, computed once and kept in safetensors shards.

A cache lies in a folder named after its settings, so that a changed setting starts another. In it, each example's
tensors are keyed by the example's digest, so that a changed picture or caption is encoded again and nothing else is.
Shards are written whole or not at all: a run that is killed loses the shard in the making and goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from mahlstick.errors import MahlstickError
from mahlstick.training.checkpoint import FULL
from mahlstick.training.data import Example

log = logging.getLogger(__name__)

Encode = Callable[[list[Example]], Sequence[Mapping[str, Tensor]]]

_FORMAT = 1  # raise it when shards of before must not be read
_BROKEN = (MahlstickError, OSError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for bad files
_ABANDONED = 3600  # seconds after which an unfinished shard of another machine belongs to no living process
_MANY = 500  # files from which on a progress bar is worth its line


@dataclass
class Report:
    """What `FeatureCache.fill` did: examples found in the cache, encoded, and skipped as (name, reason)."""

    cached: int = 0
    encoded: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


class FeatureCache(Mapping[str, dict[str, Tensor]]):
    """From an example's digest to its tensors by name.

    ``settings``: all that the features depend on besides the examples (models, sizes, precision), as JSON.
    Can be pickled and forked; each process opens the shards for itself.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        try:
            self._settings = json.dumps({"format": _FORMAT, "settings": settings}, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise MahlstickError(f"the cache's settings are not JSON ({error}); use text and numbers") from error
        self.path = Path(folder) / hashlib.sha256(self._settings.encode()).hexdigest()[:16]
        self._index: dict[str, tuple[Path, tuple[str, ...]]] = {}  # digest → shard, names
        self._opened: tuple[int, dict[Path, Any]] = (os.getpid(), {})
        self.refresh()

    def __getitem__(self, digest: str) -> dict[str, Tensor]:
        """The tensors of an example, on the CPU. They are mapped from the file: copy before you write to them."""
        shard, names = self._index[digest]
        return {name: self._open(shard).get_tensor(f"{digest}/{name}") for name in names}

    def __contains__(self, digest: object) -> bool:
        return digest in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def shapes(self, digest: str) -> dict[str, tuple[int, ...]]:
        """The shapes of an example's tensors, from the shard's header alone."""
        shard, names = self._index[digest]
        return {name: tuple(self._open(shard).get_slice(f"{digest}/{name}").get_shape()) for name in names}

    def select(self, examples: Iterable[Example]) -> list[Example]:
        """Those of the examples whose tensors are here: after `fill`, all but the skipped ones."""
        here = []
        for example in examples:
            with suppress(MahlstickError):
                here += [example] if example.digest() in self else []
        return here

    def refresh(self) -> None:
        """See what other processes have written or removed. A damaged shard is set aside with a warning."""
        shards = set(self.path.glob("features-*.safetensors"))
        known = {shard for shard, _ in self._index.values()}
        self._index = {digest: entry for digest, entry in self._index.items() if entry[0] in shards}
        for shard in sorted(shards - known):
            try:
                self._add(shard, self._open(shard).keys())
            except (SafetensorError, OSError) as error:
                log.warning("%s is damaged (%s); set aside, what it held is encoded again", shard, error)
                with suppress(OSError):  # another process was faster, or the folder is read-only
                    os.replace(shard, f"{shard}.broken")

    def fill(
        self,
        examples: Sequence[Example],
        encode: Encode,
        *,
        batch: int = 8,
        shard: int = 256,
        progress: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> Report:
        """Encode what is missing, ``batch`` examples at once, into shards of about ``shard`` examples.

        ``encode`` gives for each example its tensors by name. An example that cannot be read is logged, skipped and
        reported. Of ``world`` processes that fill the cache together, each does the examples ``rank::world``; then
        all call `refresh`.

        Raises MahlstickError where no example at all can be read, and where the disk is full.
        """
        self.refresh()
        self._clear()
        report = Report()
        missing = self._missing(examples[rank::world], report, progress)
        done: dict[str, Mapping[str, Tensor]] = {}
        left = len(missing)
        with tqdm(total=left, desc="encoding", disable=not progress or not left) as bar:
            for start in range(0, len(missing), batch):
                part = missing[start : start + batch]
                encoded = _encode(part, encode, report)
                report.encoded += len(encoded)
                done |= {example.digest(): _owned(tensors) for example, tensors in encoded}
                if len(done) >= shard or start + batch >= len(missing):
                    self._write(done, left)
                    left = len(missing) - start - len(part)
                    done = {}
                bar.update(len(part))
        if report.skipped:
            log.warning("%d of %d examples were skipped", len(report.skipped), len(examples[rank::world]))
        if report.skipped and world == 1 and not report.cached + report.encoded:
            name, reason = report.skipped[0]
            raise MahlstickError(f"none of {len(examples)} examples can be read; the first is {name!r}: {reason}")
        return report

    def _missing(self, examples: Sequence[Example], report: Report, progress: bool) -> list[Example]:
        """The examples to encode."""
        missing = []
        for example in tqdm(examples, "hashing", disable=not progress or len(examples) < _MANY):
            try:
                found = example.digest() in self
            except MahlstickError as error:
                _skip(example, error, report)
                continue
            if found:
                report.cached += 1
            else:
                missing.append(example)
        return missing

    def _write(self, features: dict[str, Mapping[str, Tensor]], left: int) -> None:
        """Write a shard. Its name follows from what it holds, so that no two processes take one name for two things."""
        if not features:
            return
        tensors = {f"{digest}/{name}": tensor for digest, named in features.items() for name, tensor in named.items()}
        digests = hashlib.sha256("".join(features).encode()).hexdigest()
        data = save(tensors)
        target = self.path / f"features-{digests[:16]}.safetensors"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / "settings.json").exists():
                _write_whole(self.path / "settings.json", self._settings.encode())
            _write_whole(target, data)
        except OSError as error:
            raise MahlstickError(_no_room(self.path, error, len(data) * left // len(features))) from error
        self._add(target, tensors)

    def _add(self, shard: Path, keys: Iterable[str]) -> None:
        names: dict[str, list[str]] = {}
        for key in keys:
            digest, _, name = key.partition("/")
            names.setdefault(digest, []).append(name)
        self._index |= {digest: (shard, tuple(found)) for digest, found in names.items()}

    def _open(self, shard: Path) -> Any:
        if self._opened[0] != os.getpid():  # forked
            self._opened = os.getpid(), {}
        handles = self._opened[1]
        if shard not in handles:
            handles[shard] = safe_open(shard, "pt")
        return handles[shard]

    def _clear(self) -> None:
        """Remove the unfinished shards that killed processes left."""
        for unfinished in self.path.glob(".*.tmp"):
            with suppress(FileNotFoundError):
                if _abandoned(unfinished):
                    unfinished.unlink()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": (os.getpid(), {})}


def _encode(examples: list[Example], encode: Encode, report: Report) -> list[tuple[Example, Mapping[str, Tensor]]]:
    """Examples with their tensors; of a batch that fails, those that succeed alone."""
    try:
        return list(zip(examples, encode(examples), strict=True))
    except _BROKEN as error:
        if len(examples) == 1:
            _skip(examples[0], error, report)
            return []
    return [pair for example in examples for pair in _encode([example], encode, report)]


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU: a shard in the making fills no accelerator, and holds on to no batch by a part of it."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _skip(example: Example, error: BaseException, report: Report) -> None:
    log.warning("%s is skipped: %s", example.name, error)
    report.skipped.append((example.name, str(error)))


def _write_whole(target: Path, data: bytes) -> None:
    """Write a file whole or not at all, also when the machine stops."""
    unfinished = target.with_name(f".{uuid.uuid4().hex}.{os.getpid()}.{platform.node()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def _abandoned(unfinished: Path) -> bool:
    """Whether the process that wrote a file is gone; of another machine's process its age tells."""
    _, _, process, machine = (unfinished.name.removesuffix(".tmp").split(".", 3) + 4 * [""])[:4]
    if machine == platform.node() and process.isdigit():
        return not psutil.pid_exists(int(process))
    return time.time() - unfinished.stat().st_mtime > _ABANDONED


def _no_room(folder: Path, error: OSError, needed: int) -> str:
    """Why nothing can be written, in a sentence. ``needed``: bytes that are still to come."""
    if error.errno not in FULL:
        return f"the cache {str(folder)!r} cannot be written ({error.strerror or error}); choose another place"
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
    return (
        f"the disk is full: the cache {str(folder)!r} needs about {needed / 1e6:.1f} MB more, and {free / 1e6:.1f} MB "
        f"are free; make room and start again, it goes on where it stopped"
    )
