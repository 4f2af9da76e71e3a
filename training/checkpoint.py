"""Checkpoints on disk: written beside and renamed, hashed, the last few kept."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mahlstick.errors import MahlstickError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# EFBIG is the limit of a process or a file system for one file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and torch.save raise errors of their own: the one with the number in its text, the other without.
FULL_WORDS = (*(f"os error {code})" for code in FULL), "PytorchStreamWriter failed", "unexpected pos", "iostream error")


class Checkpoints:
    """The folder ``out/checkpoints`` with one folder ``step-00001000`` for each checkpoint kept.

    ``main`` is whether this process is the one that renames and removes; ``wait`` is a barrier between processes.
    """

    def __init__(self, folder: Path, keep: int, main: bool = True, wait: Callable[[], None] = lambda: None) -> None:
        self.folder, self.keep, self.main, self.wait = folder, keep, main, wait

    def steps(self) -> list[int]:
        """The steps of whole checkpoints, oldest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted(int(path.name.removeprefix("step-")) for path in found if (path / MANIFEST).is_file())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def newest(self) -> int | None:
        """The last step whose files are what their hashes say; a damaged checkpoint is reported and passed over."""
        for step in reversed(self.steps()):
            if (fault := damage(self.path(step))) is None:
                return step
            log.warning("%s: %s; going back to the checkpoint before it", self.path(step), fault)
        return None

    def write(self, step: int, save: Callable[[Path], None]) -> None:
        """Let ``save`` fill a folder beside, hash it, and rename it; then drop the oldest.

        Raises ``MahlstickError`` where the disk is full; the checkpoints before it stay whole.
        """
        beside = self.folder / ".in-the-making"
        if self.main:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        self.wait()
        with making(beside, self.told):
            save(beside)
            self.wait()
            if self.main:
                seal(beside)
                shutil.rmtree(self.path(step), ignore_errors=True)
                beside.rename(self.path(step))
                sync(self.folder)
                self.tidy()
        self.wait()

    def tidy(self, used: int | None = None) -> None:
        """Remove all but the last whole checkpoints and the one in use; also what a kill left half done."""
        kept = {self.path(step) for step in (*self.steps()[-self.keep :], used) if step is not None}
        for path in (*self.folder.glob("step-*"), self.folder / ".in-the-making"):
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def told(self) -> str:
        """What is left where the disk is full."""
        return f"the checkpoint of step {self.steps()[-1]} is whole" if self.steps() else "no checkpoint is whole yet"


@contextmanager
def making(folder: Path, told: Callable[[], str]) -> Iterator[None]:
    """A folder is written inside; it is removed where that fails. Raises ``MahlstickError`` where the disk is full."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not disk_full(error):
            raise
        raise MahlstickError(
            f"{folder.parent}: the disk is full, and {told()}; make room and give the command again"
        ) from error


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is a disk without room."""
    if error is None:
        return False
    said = (isinstance(error, OSError) and error.errno in FULL) or any(word in str(error) for word in FULL_WORDS)
    return said or disk_full(error.__cause__ or error.__context__)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all, also where others are writing it."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def seal(folder: Path) -> None:
    """Write every file's hash beside them, all of it through to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): digest(path) for path in files}
    for path in files:
        sync(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    sync(manifest)
    sync(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        wrong = [name for name, wanted in hashes.items() if digest(folder / name) != wanted]
    except (OSError, ValueError) as error:
        return str(error)
    return f"{wrong[0]} is damaged" if wrong else None


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Through to the disk, so that a power cut after the rename finds what was renamed."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and orders its renames itself
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
