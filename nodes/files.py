"""The files that workflows name and nodes write: found, numbered, and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders
from mahlstick.nodes.schema import Hidden

Prompt = Annotated[dict[str, Any] | None, Hidden("PROMPT")]
PngText = Annotated[dict[str, Any] | None, Hidden("EXTRA_PNGINFO")]


def chosen_file(name: str) -> Path:
    """The file that a workflow names: below the input folder, or another if it says so, as in ``"fox.png [output]"``.

    Raises ``MahlstickError`` where there is none, or where the name leads outside the folder.
    """
    path = folders.located(name)
    if not path.is_file():
        raise MahlstickError(f"{name}: no such file in {path.parent}; put it there, or choose another.")
    return path


def check_file(name: str | None) -> bool | str:
    """True, or the sentence that says why the file cannot be used. None stands for a name yet to come."""
    try:
        return name is None or bool(chosen_file(name))
    except MahlstickError as error:
        return str(error)


def digest(name: str | None) -> str | None:
    """The SHA-256 of the file, in hexadecimal."""
    return None if name is None else hashlib.sha256(chosen_file(name).read_bytes()).hexdigest()


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to within the block, which then takes the place of ``path``. Fails the block, nothing is left."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            yield unfinished
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise MahlstickError(f"{str(path)!r} cannot be written ({reason}); choose another place") from error


def new_files(
    root: Path, prefix: str, suffix: str, *, count: int = 1, size_wh: tuple[int, int] = (0, 0), prompt: Prompt = None
) -> list[Path]:
    """Paths that are still free, ``prefix_00001_.png`` and on, below ``root``; the number goes on from the highest.

    ``prefix`` may hold folders and, between percent signs, ``width``, ``height``, ``year`` to ``second``,
    ``date:yyyy-MM-dd hh.mm.ss``, ``batch_num``, or ``Node.input`` for what the prompt gives that input of the node
    with that class or title; what is unknown stays. Raises ``MahlstickError`` for a prefix that leads outside.
    """
    start = folders.inside(root, _filled(prefix, size_wh, prompt))
    if start == folders.inside(root, "."):
        raise MahlstickError(f"{prefix!r} names a folder; give the beginning of a file's name.")
    # Some systems take names that differ by case for the same.
    numbered = re.compile(re.escape(start.name).replace("%batch_num%", r"\d+") + r"_(\d+)_", re.IGNORECASE)
    found = [numbered.match(each) for each in (os.listdir(start.parent) if start.parent.is_dir() else [])]
    first = max((int(match[1]) for match in found if match), default=0) + 1
    names = [start.name.replace("%batch_num%", str(index)) for index in range(count)]
    return [start.with_name(f"{name}_{first + index:05}_{suffix}") for index, name in enumerate(names)]


def listing(path: Path, kind: Literal["output", "temp"]) -> dict[str, str]:
    """A written file as clients look it up: its name, its folder below the ``kind`` of folder, and that."""
    subfolder = path.parent.relative_to(getattr(folders.current(), kind).expanduser().resolve()).as_posix()
    return {"filename": path.name, "subfolder": "" if subfolder == "." else subfolder, "type": kind}


def texts(prompt: Prompt, extra_pnginfo: PngText) -> dict[str, str]:
    """What a saved file tells of its making, as JSON: the prompt, and the page's workflow with what else came along."""
    given = ({} if prompt is None else {"prompt": prompt}) | (extra_pnginfo or {})
    return {key: json.dumps(value) for key, value in given.items()}


def _filled(prefix: str, size_wh: tuple[int, int], prompt: Prompt) -> str:
    now = datetime.now()
    known = {"width": str(size_wh[0]), "height": str(size_wh[1]), "year": str(now.year)}
    known |= {unit: f"{getattr(now, unit):02}" for unit in ("month", "day", "hour", "minute", "second")}

    def value(field: re.Match[str]) -> str:
        word = field[1]
        if word.startswith("date:"):
            return _dated(word.removeprefix("date:"), now)
        return known.get(word) or _entered(prompt, word) or field[0]

    return re.sub("%([^%]+)%", value, prefix)


def _dated(form: str, now: datetime) -> str:
    """By the letters of ComfyUI's page: yyyy, yy, M, d, h (of 24), m, s, doubled for two digits."""
    parts = {"M": now.month, "d": now.day, "h": now.hour, "m": now.minute, "s": now.second}

    def part(letters: re.Match[str]) -> str:
        if letters[0].startswith("y"):
            return str(now.year)[-len(letters[0]) :]
        return str(parts[letters[0][0]]).zfill(len(letters[0]))

    return re.sub("yyyy|yy|MM?|dd?|hh?|mm?|ss?", part, form)


def _entered(prompt: Prompt, word: str) -> str | None:
    """What the prompt gives an input, by ``Node.input``, fit for a file's name."""
    name, dot, widget = word.rpartition(".")
    nodes = list((prompt or {}).values()) if dot else []
    named = [each for each in nodes if each.get("class_type") == name]
    named += [each for each in nodes if each.get("_meta", {}).get("title") == name]
    found = named[0].get("inputs", {}).get(widget) if named else None
    return None if found is None or isinstance(found, list) else re.sub(r'[/?<>\\:*|"\x00-\x1f\x7f]', "_", str(found))
