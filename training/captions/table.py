"""The captions of a folder: read from what it has, written as ``metadata.jsonl`` with every fact that stands there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mahlstick.errors import MahlstickError
from mahlstick.training.captions.journal import replace_whole
from mahlstick.training.data import EXTENSIONS, Example, FileSource, read_dataset

T = TypeVar("T")

METADATA = "metadata.jsonl"
TEXT = "text"  # what is learned from
ORIGINAL, WRITTEN, SCORES = "caption_original", "caption_written", "caption_scores"  # scores of both, in their order


@dataclass
class Row:
    """A picture, the line of ``metadata.jsonl`` that it has or gets, and which file that stands in."""

    example: Example
    fields: dict[str, Any]
    table: Path

    @property
    def original(self) -> list[str]:
        """The captions that no run of ours wrote: those of before the first, and what was put in by hand since."""
        there = [text for text in self.example.captions if text.strip()]
        before = self.fields.get(ORIGINAL, [])
        ours = self.written
        return distinct([*before, *(text for text in there if text not in ours)])

    @property
    def written(self) -> list[str]:
        """Those that the last run wrote."""
        return list(self.fields.get(WRITTEN, []))

    def settle(
        self,
        original: Sequence[str],
        written: Sequence[str],
        kept: Sequence[str],
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Put down what was found: captions of before, ours, those to learn from, and what a filter scored them."""
        self.fields |= {TEXT: distinct(kept), ORIGINAL: list(original), WRITTEN: list(written)}
        self.fields.pop(SCORES, None)
        if scores is not None:
            self.fields[SCORES] = [round(scores[text], 6) for text in (*original, *written)]


def distinct(items: Iterable[T]) -> list[T]:
    """Without repetitions, in the order of the first ones."""
    return list(dict.fromkeys(items))


def read(folder: Path, unnamed: bool = False) -> list[Row]:
    """A row for each picture of the folder; those that its ``metadata.jsonl`` does not name only if ``unnamed``.

    Raises ``MahlstickError`` as `read_dataset` does, and for a dataset of another kind than a folder of pictures.
    """
    if not folder.is_dir():
        raise MahlstickError(f"{str(folder)!r} is no folder; give a folder of pictures")
    examples = {example.name: example for example in read_dataset(folder)}
    if not all(isinstance(example.picture, FileSource) and example.picture.size < 0 for example in examples.values()):
        raise MahlstickError(f"{str(folder)!r} holds a packed dataset; unpack its pictures into a folder first")
    tables = [path for path in sorted(folder.rglob(METADATA)) if not _hidden(path, folder)]
    if not tables:
        return [Row(example, _fields(example, folder), folder / METADATA) for example in examples.values()]
    rows = [
        Row(examples[_name(table.parent / fields["file_name"], folder)], fields, table)
        for table in tables
        for fields in _objects(table)
    ]
    return rows + (_others(folder, rows) if unnamed else [])


def write(rows: Sequence[Row]) -> None:
    """Replace each ``metadata.jsonl`` whole."""
    for table in distinct(row.table for row in rows):
        lines = [json.dumps(row.fields, ensure_ascii=False) for row in rows if row.table == table]
        replace_whole(table, "".join(f"{line}\n" for line in lines))


def _fields(example: Example, folder: Path) -> dict[str, Any]:
    """The line of a picture that has none yet. Its partners, found by their folders, must be named from now on."""
    fields = {"file_name": example.name}
    for part in ("control", "reference"):
        source = getattr(example, part)
        if isinstance(source, FileSource):
            fields[part] = _name(source.path, folder)
    return fields


def _name(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _objects(table: Path) -> list[dict[str, Any]]:
    """The lines, which `read_dataset` has found to be objects."""
    return [json.loads(line) for line in table.read_text(encoding="utf-8-sig").split("\n") if line.strip()]


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _others(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """Pictures that no ``metadata.jsonl`` names, as rows of the folder's own."""
    if any(row.example.control or row.example.reference for row in rows):
        raise MahlstickError(
            f"{str(folder)!r} has control or reference pictures; name its new pictures in {METADATA} with theirs"
        )
    named = {(row.table.parent / row.fields["file_name"]).resolve() for row in rows}
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower().lstrip(".") in EXTENSIONS]
    new = [path for path in files if path.is_file() and not _hidden(path, folder) and path.resolve() not in named]
    examples = [Example(_name(path, folder), ("",), FileSource(path)) for path in new]
    return [Row(example, _fields(example, folder), folder / METADATA) for example in examples]
