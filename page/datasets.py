"""What a person may train on: folders below a configured one, and archives of their own, unpacked safely."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath

from mahlstick.errors import MahlstickError
from mahlstick.training.data import CLIPS, COLUMNS, EXTENSIONS, table_rows

DEEPEST = 2  # levels below the configured folder
MOST = 500  # folders, of which to choose
MOST_FILES = 20_000  # of an archive
MOST_BYTES = 2 << 30  # of all that is in it

_TABLE = "metadata.jsonl"
_KEPT = {f".{each}" for each in (*EXTENSIONS, *CLIPS, "txt")}
_NAMING = ("file_name", *COLUMNS["control"], *COLUMNS["reference"])
_BLOCK = 1 << 20
# What a damaged or encrypted archive, or one of a method that is not known, raises.
_FAULTS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError, EOFError, UnicodeError)


def folders(root: Path | None) -> dict[str, Path]:
    """``root``, as its name and a slash, and the folders below by their paths there; hidden ones left out."""
    if root is None:
        return {}
    found = ((path.relative_to(root).as_posix(), path) for path in _below(root, DEEPEST))
    return dict([(f"{root.name}/", root), *islice(found, MOST)])


def uploaded(home: Path) -> dict[str, Path]:
    """The archives that were unpacked there, by name."""
    found = sorted(path for path in home.iterdir() if not path.name.startswith(".")) if home.is_dir() else []
    return {path.name: _inmost(path) for path in found if path.is_dir()}


def unpack(archive: Path, home: Path, most_files: int = MOST_FILES, most_bytes: int = MOST_BYTES) -> tuple[Path, int]:
    """Unpacks the pictures, clips and captions of a zip into a new folder below ``home``.

    Returns the folder, and how many other files were left out. Raises :class:`MahlstickError`, with nothing unpacked,
    where it is no zip, is too large, or names a file outside, and where a table of captions cannot be read.
    """
    home.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=home, prefix=".unpacking-"))
    try:
        with zipfile.ZipFile(archive) as opened:
            left_out = _extract(opened, archive.name, beside, most_files, most_bytes)
        _check_tables(beside, archive.name)
        target = _free(home / (re.sub(r"[^\w.-]+", "-", archive.stem).strip("-.") or "pictures"))
        beside.rename(target)
    except (*_FAULTS, OSError) as error:
        reason = getattr(error, "strerror", None) or error  # which names no folder of the server
        raise MahlstickError(
            f"{archive.name}: cannot be unpacked ({reason}); write it as a plain .zip again"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target, left_out


def _extract(opened: zipfile.ZipFile, name: str, folder: Path, most_files: int, most_bytes: int) -> int:
    """Writes what is a picture or a caption; the sizes that the archive tells are not believed."""
    files = [member for member in opened.infolist() if not member.is_dir()]
    if len(files) > most_files:
        raise MahlstickError(f"{name}: holds {len(files):,} files, and {most_files:,} are allowed; give a folder")
    left = most_bytes
    kept = [member for member in files if _is_kept(member, name)]
    for member in kept:
        target = folder / PurePosixPath(member.filename.replace("\\", "/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        with opened.open(member) as source, target.open("wb") as file:
            while block := source.read(_BLOCK):
                left -= len(block)
                if left < 0:
                    raise MahlstickError(f"{name}: holds more than {most_bytes >> 20} MiB; give a folder")
                file.write(block)
    return len(files) - len(kept)


def _is_kept(member: zipfile.ZipInfo, name: str) -> bool:
    """Whether to unpack a file. Raises :class:`MahlstickError` where it would lie outside."""
    path = PurePosixPath(member.filename.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in "".join(path.parts[:1]):
        raise MahlstickError(f"{name}: names {member.filename!r}, which leads outside of it; pack the folder again")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    linked = stat.S_ISLNK(member.external_attr >> 16)
    return not (hidden or linked) and (path.suffix.lower() in _KEPT or path.name == _TABLE)


def _check_tables(folder: Path, name: str) -> None:
    """Raises :class:`MahlstickError` where a table of captions names a picture outside of the archive."""
    for table in folder.rglob(_TABLE):
        try:
            rows = [row for _, row in table_rows(table)]
        except MahlstickError as error:
            raise MahlstickError(f"{name}: {str(error).replace(f'{folder}{os.sep}', '')}") from error
        for value in [row[column] for row in rows for column in _NAMING if isinstance(row.get(column), str)]:
            if "\0" in value or not (table.parent / value).resolve().is_relative_to(folder.resolve()):
                raise MahlstickError(
                    f"{name}: its {_TABLE} names {value!r}, which leads outside of it; name what is in the archive"
                )


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if depth:
        with os.scandir(folder) as entries:
            found = sorted(Path(entry) for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        for path in found:
            yield path
            yield from _below(path, depth - 1)


def _inmost(folder: Path) -> Path:
    """The folder that was packed, where the archive holds that alone."""
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def _free(path: Path) -> Path:
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found
