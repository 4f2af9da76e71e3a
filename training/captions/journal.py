"""What was found of each picture, a line for each, written through to the disk: a kill loses what is in the making."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mahlstick.errors import MahlstickError
from mahlstick.training.checkpoint import disk_full, sync

NAME = ".captions.jsonl"  # hidden, so that no reader of datasets takes it for one


class Journal:
    """An append-only file beside the pictures: by a key of how it was found, and by picture, what was found.

    A line that a kill cut off is passed over, and the next one begins a line of its own. Of two lines for one key and
    picture the later counts; where both are objects, the later adds to the earlier.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._found: dict[str, dict[str, Any]] = {}
        try:
            with open(self.path, "ab+") as file:
                file.seek(0)
                lines = file.read().split(b"\n")
                if lines[-1]:  # the end of a line is missing
                    file.write(b"\n")
        except OSError as error:
            raise _unwritable(self.path, error) from error
        for line in lines:
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            key, picture, found = row["key"], row["picture"], row["found"]
        except (ValueError, KeyError, TypeError):
            return
        known = self._found.setdefault(key, {})
        known[picture] = known[picture] | found if isinstance(known.get(picture), dict) else found

    def of(self, key: str) -> Mapping[str, Any]:
        """What is known under a key, by picture."""
        return self._found.get(key, {})

    def add(self, key: str, found: Mapping[str, Any]) -> None:
        """Keep what was found under the key, by picture."""
        rows = ({"key": key, "picture": picture, "found": what} for picture, what in found.items())
        lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
        try:
            with open(self.path, "ab") as file:
                file.write(b"".join(line + b"\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from error
        for line in lines:
            self._take(line)


def replace_whole(path: Path, text: str) -> None:
    """Put a text in the place of a file, whole or not at all, also when the machine stops."""
    beside = path.with_name(f".{path.name}")
    try:
        beside.write_text(text, encoding="utf-8")
        sync(beside)
        beside.replace(path)
        sync(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> MahlstickError:
    if disk_full(error):
        return MahlstickError(f"{path}: the disk is full; make room and give the command again, it goes on from there")
    return MahlstickError(f"{path}: cannot be written ({error.strerror or error}); check the folder's permissions")
