"""Pictures and clips to learn from: read from a folder, a Hugging Face dataset or WebDataset shards, split, sized,
ordered.

Reading lists what is there and looks at captions; no picture is decoded before it is asked for.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import math
import os
import random
import tarfile
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from tqdm import tqdm

from mahlstick import pictures
from mahlstick.errors import MahlstickError

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

Kind = Literal["pictures", "clips"]
Part = Literal["picture", "control", "reference"]
PathLike = str | os.PathLike[str]
Folders = dict[str, PathLike | None]  # control and reference: a folder of partners, where one was given
T = TypeVar("T")

#: What is taken for a picture, in folders and in shards.
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "avif")

#: What is taken for a clip. So a folder of frames is one with pictures that are none of these.
CLIPS = ("mp4", "webm", "mov", "mkv", "gif", "webp")

#: Column names, in metadata.jsonl and in Hugging Face datasets; the first that is there counts.
COLUMNS = {
    "picture": ("image", "picture"),
    "caption": ("text", "caption", "captions", "prompt"),
    "control": ("control", "conditioning_image", "control_file_name", "conditioning_image_file_name"),
    "reference": ("reference", "reference_file_name"),
}

MOST_REPEATS = 1000
_MANY = 500  # files from which on a progress bar is worth its line


# --- examples


class Source(Protocol):
    """Where an encoded picture lies. Small, hashable and picklable."""

    def read(self) -> bytes:
        """The file's bytes. Raises OSError where they cannot be had."""


@dataclass(frozen=True)
class FileSource:
    """A file, or ``size`` bytes of it from ``offset``: a member of an uncompressed tar."""

    path: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class FolderSource:
    """A folder of frames."""

    path: Path

    def read(self) -> bytes:
        """What tells it from another: a line for each frame, with its hash and its name."""
        frames = sorted(filter(_is_picture, self.path.iterdir()))
        lines = (f"{hashlib.sha256(frame.read_bytes()).hexdigest()} {frame.name}\n" for frame in frames)
        return "".join(lines).encode()


@dataclass(frozen=True)
class CellSource:
    """A cell of a Hugging Face dataset."""

    folder: Path
    column: str
    row: int

    def read(self) -> bytes:
        value = _column(self.folder, self.column)[self.row][self.column]
        if isinstance(value, dict):  # an Image that is not decoded
            if value["bytes"] is None and value["path"] is not None:
                return Path(value["path"]).read_bytes()
            value = value["bytes"]
        if not isinstance(value, bytes):
            raise OSError(f"column {self.column!r} has {type(value).__name__} there, and no picture")
        return value


@dataclass(frozen=True)
class Example:
    """One row of a dataset: a picture or a clip with its captions, and its partners where the dataset has them.

    ``name``: the picture's path below the dataset's folder, or shard and key; it stays as the dataset grows.
    ``captions``: at least one, which may be empty. ``repeats``: how often it is learned from for once that others are.
    """

    name: str
    captions: tuple[str, ...]
    picture: Source
    control: Source | None = None
    reference: Source | None = None
    repeats: int = 1

    def load(self, part: Part = "picture") -> Image.Image:
        """The picture or a partner, RGB. Raises MahlstickError with the example's name."""
        return pictures.load_picture(self._read(part), name=self._label(part))

    def frames(self, fps: float) -> Iterator[Image.Image]:
        """A clip's frames, RGB, one after the other: of a video ``fps`` a second, of a folder all in their order.

        Raises MahlstickError for what is no clip, and where a frame cannot be decoded.
        """
        from mahlstick.pipelines.video import iterate_video

        if isinstance(self.picture, FolderSource) or (isinstance(self.picture, FileSource) and self.picture.size < 0):
            yield from iterate_video(self.picture.path, fps)
            return
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / Path(self.name).name
            file.write_bytes(self._read("picture"))
            yield from iterate_video(file, fps)

    def digest(self) -> str:
        """The sha256, in hex, of all that can be learned from: picture, partners and captions.

        Read once: later changes of the files do not show. Raises MahlstickError for what cannot be read.
        """
        return self._digest

    @cached_property
    def picture_digest(self) -> str:
        """The sha256 of the picture's bytes, in hex; read once, as `digest`."""
        return hashlib.sha256(self._read("picture")).hexdigest()

    @cached_property
    def _digest(self) -> str:
        control = hashlib.sha256(self._read("control")).hexdigest() if self.control else None
        reference = hashlib.sha256(self._read("reference")).hexdigest() if self.reference else None
        everything = json.dumps([self.picture_digest, control, reference, *self.captions])
        return hashlib.sha256(everything.encode()).hexdigest()

    def _read(self, part: Part) -> bytes:
        source: Source | None = getattr(self, part)
        if source is None:
            raise MahlstickError(f"{self.name!r} has no {part}; add it to the dataset")
        try:
            return source.read()
        except OSError as error:
            reason = error.strerror or error
            raise MahlstickError(f"{self._label(part)} cannot be read ({reason}); check the dataset") from error

    def _label(self, part: Part) -> str:
        return f"{part} {self.name!r}" if part == "picture" else f"{part} of {self.name!r}"


# --- reading


def read_dataset(
    path: PathLike, control: PathLike | None = None, reference: PathLike | None = None, kind: Kind = "pictures"
) -> list[Example]:
    """The examples of a dataset, sorted by name. What it is shows in its content:

    - a folder of pictures, at any depth, with ``metadata.jsonl`` (``file_name`` and ``text``, or as `COLUMNS` says; and
      ``repeats``, 12 for what is to be learned from twelve times as often as others) or with a caption file beside
      each picture (``fox.txt`` for ``fox.png``, a caption a line);
    - a folder that ``datasets`` wrote with ``save_to_disk``, or one with parquet files;
    - WebDataset shards: a ``.tar``, a folder of them or a glob. Members that share the name up to the first dot are
      one sample: a picture, ``.txt`` or ``.json`` (``text`` or ``caption``), ``.control.png``, ``.reference.png``.

    ``control`` and ``reference`` are folders that hold, for each picture of a folder, a partner of the same relative
    path, with any picture extension. Without them, the subfolders ``control`` and ``reference`` are taken where
    captions are files. A picture without a caption has the empty one.

    Of ``clips``, which have no partners, each is a video or an animation (see `CLIPS`) or a folder of frames below the
    dataset's, with its captions in the same places: ``fox.txt`` for ``fox.mp4`` and for ``fox/``. They come from
    folders and shards.

    Raises MahlstickError for what is missing, doubled or not to be understood. Broken pictures are not noticed here.
    """
    path = Path(path)
    folders = {"control": control, "reference": reference} if kind == "pictures" else {}
    try:
        examples = _read(path, folders, kind)
    except OSError as error:
        file, reason = str(error.filename or path), error.strerror or error
        raise MahlstickError(f"{file!r} cannot be read ({reason}); check its permissions") from error
    if not examples:
        looked = EXTENSIONS if kind == "pictures" else (*CLIPS, "folders of frames")
        raise MahlstickError(f"{str(path)!r} holds no {kind}; looked for {', '.join(looked)}")
    for part, folder in folders.items():
        _check_partners(examples, part, folder)
    return sorted(examples, key=lambda example: example.name)


def _read(path: Path, folders: Folders, kind: Kind) -> list[Example]:
    if not path.exists():
        shards = [Path(found) for found in sorted(glob.glob(str(path), recursive=True))]
        if not shards:
            raise MahlstickError(f"dataset {str(path)!r} does not exist; check the path")
        return _read_shards(shards, path, folders, kind)
    if path.is_file():
        return _read_shards([path], path, folders, kind)
    return _read_folder(path, folders, kind)


def _read_folder(folder: Path, folders: Folders, kind: Kind) -> list[Example]:
    files = _files(folder, folders)
    tables = [file for file in files if file.name == "metadata.jsonl"]
    shards = [file for file in files if file.suffix.lower() == ".tar"]
    if _is_saved(folder):
        return _read_hugging_face(folder, folders, kind)
    if tables:
        return _read_tables(folder, tables, folders, kind)
    if any(file.suffix.lower() == ".parquet" for file in files):
        return _read_hugging_face(folder, folders, kind)
    if shards and _items(files, kind):
        raise MahlstickError(f"{str(folder)!r} holds both {kind} and .tar files; keep them in two folders")
    if shards:
        return _read_shards(shards, folder, folders, kind)
    return _read_items(folder, folders, kind)


def _read_items(folder: Path, folders: Folders, kind: Kind) -> list[Example]:
    """Pictures or clips with a caption file beside each."""
    folders = {part: given or _subfolder(folder, part) for part, given in folders.items()}
    files = _files(folder, folders)
    captions = {_stem(file, folder): file for file in files if file.suffix.lower() == ".txt"}
    stems: dict[str, Path] = {}
    items = _items(files, kind)
    if kind == "clips" and folder in items:
        raise MahlstickError(
            f"{str(folder)!r} holds pictures; put the frames of each clip into a subfolder, and take other pictures out"
        )
    for picture in items:
        other = stems.setdefault(_stem(picture, folder), picture)
        if other is not picture:
            raise MahlstickError(
                f"{str(other)!r} and {picture.name!r} share one name, and so their captions and partners; rename one"
            )
    _refuse_lone_captions([text for stem, text in captions.items() if stem not in stems], folder, kind)
    finders: dict[str, Any] = {part: _partner_finder(part, other) for part, other in folders.items()}
    return [
        Example(
            picture.relative_to(folder).as_posix(),
            caption_lines(captions[stem].read_bytes(), repr(str(captions[stem]))) if stem in captions else ("",),
            FolderSource(picture) if picture.is_dir() else FileSource(picture),
            **{part: find(picture.relative_to(folder)) for part, find in finders.items()},
        )
        for stem, picture in stems.items()
    ]


def _read_tables(folder: Path, tables: list[Path], folders: Folders, kind: Kind) -> list[Example]:
    """Pictures or clips that metadata.jsonl names, one such file or one for each subfolder."""
    finders = {part: _partner_finder(part, other) for part, other in folders.items()}
    examples: dict[str, Example] = {}
    used: set[Path] = set()
    for table in tables:
        for label, row in table_rows(table):
            picture = _named(table, row, ("file_name",), label, kind)
            if picture is None:
                raise MahlstickError(f"{label} has no file_name; give its path, relative to the file")
            name = Path(os.path.relpath(picture, folder))
            partners: dict[str, Source | None] = {}
            for part, find in finders.items():
                partner = None if folders[part] else _named(table, row, COLUMNS[part], label)
                partners[part] = FileSource(partner) if partner else find(name)
                used |= {partner.resolve()} if partner else set()
            if name.as_posix() in examples:
                raise MahlstickError(
                    f"{label} names {str(picture)!r} a second time; give all its captions in one row, as a list"
                )
            source = FolderSource(picture) if picture.is_dir() else FileSource(picture)
            captions, repeats = _captions(row, label), _repeats(row, label)
            examples[name.as_posix()] = Example(name.as_posix(), captions, source, **partners, repeats=repeats)
            used.add(picture.resolve())
    left = [item for item in _items(_files(folder, folders), kind) if item.resolve() not in used]
    if left:
        log.warning("left out, because metadata.jsonl does not name them: %s", _some(left, folder))
    return list(examples.values())


def table_rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what to call it in errors, the object) for each line of a ``metadata.jsonl``.

    Raises ``MahlstickError`` for a line that is no JSON object.
    """
    for number, line in enumerate(_text(table.read_bytes(), repr(str(table))).split("\n"), start=1):
        if not line.strip():
            continue
        label = f"{str(table)!r} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise MahlstickError(f"{label} is not JSON ({error.msg}); give one object a line") from error
        if not isinstance(row, dict):
            raise MahlstickError(f"{label} is not an object; give file_name and text")
        yield label, row


def _named(
    table: Path, row: dict[str, Any], columns: Sequence[str], label: str, kind: Kind = "pictures"
) -> Path | None:
    """The file that the first of the columns names, or a clip's folder, or None. Raises MahlstickError where it is not
    there."""
    value = next((row[column] for column in columns if row.get(column) is not None), None)
    if value is None:
        return None
    if not isinstance(value, str):
        raise MahlstickError(f"{label} has {value!r} for a file's name; give a path, relative to the file")
    file = table.parent / value
    if not file.is_file() and not (kind == "clips" and file.is_dir()):
        raise MahlstickError(f"{label} names {value!r}, which is not there; add it or take the line out")
    return file


def _read_shards(shards: list[Path], path: Path, folders: Folders, kind: Kind) -> list[Example]:
    _refuse_folders(folders, path, "members named like fox.control.png")
    other = [shard for shard in shards if shard.suffix.lower() != ".tar"]
    if other:
        raise MahlstickError(f"{str(other[0])!r} is no dataset; give a folder, or .tar shards that are not compressed")
    root = Path(os.path.commonpath([shard.parent.absolute() for shard in shards]))
    return [
        example
        for shard in tqdm(shards, "reading shards", disable=len(shards) < 20)
        for example in _read_shard(shard, shard.absolute().relative_to(root), kind)
    ]


def _read_shard(shard: Path, name: Path, kind: Kind) -> list[Example]:
    examples, lone = [], []
    try:
        with tarfile.open(shard, "r:") as archive:
            for key, members in _samples(archive, shard, kind).items():
                if "picture" in members:
                    sources: dict[str, Any] = {
                        part: FileSource(shard, member.offset_data, member.size)
                        for part, member in members.items()
                        if part in ("picture", "control", "reference")
                    }
                    captions = _member_captions(archive, members, f"{str(shard)!r}, {key!r}")
                    examples.append(Example((name / key).as_posix(), captions, **sources))
                elif members:
                    lone.append(shard / key)
    except tarfile.TarError as error:
        raise MahlstickError(f"{str(shard)!r} is damaged or compressed ({error}); write it as plain tar") from error
    _refuse_lone_captions(lone, shard, kind)
    return examples


def _samples(archive: tarfile.TarFile, shard: Path, kind: Kind) -> dict[str, dict[str, tarfile.TarInfo]]:
    """The members by key, the name up to the base name's first dot, and by what they are."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in archive:
        folder, _, base = member.name.removeprefix("./").rpartition("/")
        stem, _, rest = base.partition(".")
        part = _member_part(rest.lower(), kind)
        if not stem or not part or not member.isreg() or member.issparse():
            continue
        if samples.setdefault(f"{folder}/{stem}".lstrip("/"), {}).setdefault(part, member) is not member:
            raise MahlstickError(f"{str(shard)!r} holds a second {part} {member.name!r}; give each sample its own key")
    # tarfile takes a damaged header in the middle for the end.
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no member's header at byte {archive.offset}")
    return samples


def _member_part(rest: str, kind: Kind) -> str | None:
    """What a member is by its name from the first dot on."""
    part, _, extension = rest.rpartition(".")
    if kind == "clips" and rest in CLIPS:
        return "picture"
    if kind == "pictures" and extension in EXTENSIONS and part in ("", "control", "reference"):
        return part or "picture"
    return rest if rest in ("txt", "json") else None


def _member_captions(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], label: str) -> tuple[str, ...]:
    def content(member: tarfile.TarInfo) -> bytes:
        file = archive.extractfile(member)
        assert file is not None
        return file.read()

    if "txt" in members:
        return caption_lines(content(members["txt"]), label)
    if "json" not in members:
        return ("",)
    try:
        row = json.loads(_text(content(members["json"]), label))
    except json.JSONDecodeError as error:
        raise MahlstickError(f"{label} has a .json that is not JSON ({error.msg}); mend or remove it") from error
    return _captions(row if isinstance(row, dict) else {}, label)


def _read_hugging_face(folder: Path, folders: Folders, kind: Kind) -> list[Example]:
    if kind == "clips":
        raise MahlstickError(f"{str(folder)!r} is a Hugging Face dataset; give clips as files, or in .tar shards")
    _refuse_folders(folders, folder, "columns control and reference")
    _table.cache_clear()
    _column.cache_clear()
    table = _table(folder)
    names = {what: _first(known, table.column_names) for what, known in COLUMNS.items()}
    if names["picture"] is None:
        raise MahlstickError(
            f"{str(folder)!r} has the columns {', '.join(table.column_names)}; name the pictures' column image"
        )
    caption = names.pop("caption")
    captions = table.select_columns([caption])[:][caption] if caption else [None] * len(table)

    def sources(row: int) -> dict[str, Any]:
        return {part: CellSource(folder, name, row) for part, name in names.items() if name}

    return [
        Example(f"row-{row:09d}", _captions({"text": value}, f"{str(folder)!r} row {row}"), **sources(row))
        for row, value in enumerate(captions)
    ]


@lru_cache(maxsize=4)
def _table(folder: Path) -> Any:
    """The ``datasets.Dataset`` in the folder: of several splits ``train``, or the only one."""
    try:
        import datasets
    except ImportError as error:
        raise MahlstickError(
            f"{str(folder)!r} is a Hugging Face dataset and needs datasets; pip install datasets"
        ) from error
    try:
        found = datasets.load_from_disk(str(folder)) if _is_saved(folder) else datasets.load_dataset(str(folder))
    except Exception as error:  # arrow, parquet, JSON and builder errors share no base
        reason = str(error).strip().partition("\n")[0]
        raise MahlstickError(f"{str(folder)!r} cannot be read as a dataset ({reason}); write it again") from error
    if isinstance(found, datasets.Dataset):
        return found
    if "train" not in found and len(found) > 1:
        raise MahlstickError(f"{str(folder)!r} has the splits {', '.join(found)}; keep one, or name one train")
    return found["train"] if "train" in found else next(iter(found.values()))


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote it."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


@lru_cache(maxsize=16)
def _column(folder: Path, column: str) -> Any:
    """One column of `_table`, its pictures as bytes."""
    import datasets

    table = _table(folder).select_columns([column])
    if isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _first(known: Iterable[str], columns: Iterable[str]) -> str | None:
    return next((name for name in known if name in columns), None)


def _captions(row: dict[str, Any], label: str) -> tuple[str, ...]:
    value = next((row[column] for column in COLUMNS["caption"] if row.get(column) is not None), "")
    captions = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(caption, str) for caption in captions):
        raise MahlstickError(f"{label} has {value!r} for a caption; give a text or a list of texts")
    return captions or ("",)


def _repeats(row: dict[str, Any], label: str) -> int:
    value = row.get("repeats", 1)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_REPEATS:
        raise MahlstickError(f"{label} has {value!r} for repeats; give a whole number from 1 to {MOST_REPEATS}")
    return value


def caption_lines(data: bytes, label: str) -> tuple[str, ...]:
    """A caption a line, without empty ones."""
    lines = (line.strip() for line in _text(data, label).splitlines())
    return tuple(line for line in lines if line) or ("",)


def _text(data: bytes, label: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MahlstickError(f"{label} is not UTF-8 text; save it again as UTF-8") from error


def _files(folder: Path, partners: Folders) -> list[Path]:
    """All files below, sorted, without hidden ones and those below the partners' folders."""

    def fail(error: OSError) -> None:
        raise error

    excluded = {Path(other).resolve() for other in partners.values() if other}
    files = []
    for base, below, names in os.walk(folder, onerror=fail):
        kept = (name for name in below if not name.startswith("."))
        below[:] = [name for name in kept if Path(base, name).resolve() not in excluded]
        files += [Path(base, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _subfolder(folder: Path, name: str) -> Path | None:
    return folder / name if (folder / name).is_dir() else None


def _is_picture(file: Path) -> bool:
    return file.suffix.lower().lstrip(".") in EXTENSIONS


def _is_still(file: Path) -> bool:
    """Whether it is a frame of a clip."""
    return _is_picture(file) and not _is_clip(file)


def _is_clip(file: Path) -> bool:
    return file.suffix.lower().lstrip(".") in CLIPS


def _items(files: Iterable[Path], kind: Kind) -> list[Path]:
    """The pictures among the files; or the clips, and the folders of frames."""
    if kind == "pictures":
        return [file for file in files if _is_picture(file)]
    return sorted({file if _is_clip(file) else file.parent for file in files if _is_clip(file) or _is_still(file)})


def _stem(file: Path, folder: Path) -> str:
    """The path below the folder, a file's without the extension."""
    inside = file.relative_to(folder)
    return (inside if file.is_dir() else inside.with_suffix("")).as_posix()


def _partner_finder(part: str, folder: PathLike | None) -> Callable[[Path], Source | None]:
    """From a picture's relative path to its partner of the same path, or else of the same path but the extension."""
    if folder is None:
        return lambda name: None
    folder = Path(folder)
    if not folder.is_dir():
        raise MahlstickError(f"{part} folder {str(folder)!r} does not exist; check the path")
    stems: dict[str, list[Path]] = {}
    for file in _files(folder, {}):
        if _is_picture(file):
            stems.setdefault(_stem(file, folder), []).append(file)

    def find(name: Path) -> Source | None:
        found = stems.get(name.with_suffix("").as_posix(), [])
        exact = [file for file in found if file.name == name.name]
        if len(found) > 1 and not exact:
            raise MahlstickError(f"{name.as_posix()!r} has {len(found)} of {part} in {str(folder)!r}; keep one")
        return FileSource((exact or found)[0]) if found else None

    return find


def _check_partners(examples: list[Example], part: str, folder: PathLike | None) -> None:
    """Refuse a dataset of which some examples have the partner and some do not."""
    missing = [Path(example.name) for example in examples if getattr(example, part) is None]
    if missing and (folder or len(missing) < len(examples)):
        where = f" in {str(folder)!r}" if folder else ""
        raise MahlstickError(
            f"{len(missing)} of {len(examples)} pictures have no {part}{where}: {_some(missing)}; "
            f"add what is missing or take these pictures out"
        )


def _refuse_lone_captions(captions: list[Path], folder: Path, kind: Kind) -> None:
    if captions:
        raise MahlstickError(
            f"captions without {kind} in {str(folder)!r}: {_some(captions, folder)}; "
            f"add the {kind} or remove the captions"
        )


def _refuse_folders(folders: Folders, path: Path, instead: str) -> None:
    for part, folder in folders.items():
        if folder is not None:
            raise MahlstickError(f"{part} folder {str(folder)!r} does not go with {str(path)!r}; use {instead}")


def _some(files: list[Path], below: Path | None = None) -> str:
    """The first three, and how many more."""
    names = [(file.relative_to(below) if below else file).as_posix() for file in files]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more


# --- validation


def split(examples: Sequence[Example], share: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(to train on, held out): a picture is held out when the hash of its bytes and the seed falls below the share.

    So a picture that stands in several rows is on one side, and a picture that is added moves no other: but for the
    smallest sets, where one picture changes sides if a side would be empty. One picture alone is trained on, and so
    is one that cannot be read. Raises MahlstickError for a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise MahlstickError(f"the validation share is {share}; give a number from 0 to below 1")
    if share == 0:
        return list(examples), []
    places = [_place(example, seed) for example in tqdm(examples, "hashing", disable=len(examples) < _MANY)]
    distinct = sorted({place for place in places if place < 1})
    bound = share
    if len(distinct) > 1:  # at least the first is held out, and the last is not
        bound = min(max(share, math.nextafter(distinct[0], 1)), distinct[-1])
    elif distinct:
        bound = 0
    held_out = [example for example, place in zip(examples, places, strict=True) if place < bound]
    train = [example for example, place in zip(examples, places, strict=True) if place >= bound]
    return train, held_out


def repeated(examples: Sequence[Example]) -> list[Example]:
    """Each of the examples as often as it says."""
    return [example for example in examples for _ in range(example.repeats)]


def _place(example: Example, seed: int) -> float:
    """Uniform in [0, 1) over pictures; 1 for one that cannot be read."""
    try:
        digest = hashlib.sha256(f"{seed} {example.picture_digest}".encode()).digest()
    except MahlstickError:
        return 1.0
    return int.from_bytes(digest[:6], "big") / 2**48


# --- sizes


def bucket_sizes(resolution: int, step: int = 64, longest: float = 2.0) -> list[tuple[int, int]]:
    """Sizes (width, height) in multiples of ``step``, from the tallest to the widest.

    For each shorter side the longest other side with an area of at most that of the square, which is ``resolution``
    rounded to the step, and with a ratio of the sides of at most ``longest``. After NovelAI's aspect ratio bucketing.
    """
    if resolution < 1 or step < 1 or longest < 1:
        raise MahlstickError(
            f"buckets of resolution {resolution}, step {step} and longest ratio {longest} cannot be; "
            f"give at least 1 for each"
        )
    square = max(1, round(resolution / step))
    sizes = []
    for shorter in range(1, square + 1):
        longer = square * square // shorter
        if longer <= longest * shorter:
            sizes += [(shorter * step, longer * step), (longer * step, shorter * step)]
    return sorted(set(sizes), key=lambda size: size[0] / size[1])


def nearest_bucket(size_wh: tuple[int, int], buckets: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The bucket of the most similar aspect ratio, by the logarithm; of two equally near the larger."""
    aspect = math.log(size_wh[0] / size_wh[1])
    return min(buckets, key=lambda wh: (abs(math.log(wh[0] / wh[1]) - aspect), -wh[0] * wh[1], wh))


def fit(picture: Image.Image, size_wh: tuple[int, int]) -> Image.Image:
    """The picture scaled to cover (width, height), its middle cut out."""
    return pictures.resize(picture, size_wh, "crop")


def fit_control(
    control: Image.Image, picture: Image.Image, size_wh: tuple[int, int], name: str = "control"
) -> Image.Image:
    """The control picture with the crop that `fit` gives its picture.

    Another size is stretched to the picture's. Raises MahlstickError, with ``name``, where the proportions are more
    than 2 % apart.
    """
    if pictures.aspect_differs(control, picture.size):
        ours, theirs = (f"{one.width}x{one.height}" for one in (control, picture))
        raise MahlstickError(f"{name} is {ours} and its picture {theirs}; give both the same proportions")
    return fit(pictures.resize(control, picture.size), size_wh)


# --- order


class Plan:
    """The order in which examples are seen: a pure function of the step, so that a resumed run needs no sampler state.

    ``bucket_of``: for each example what those in a batch must share, such as the size. ``batch``: of one optimiser
    step, over all processes. In each epoch every example comes at least once; a bucket's last batch is filled up
    from the start of the bucket's order. The orders depend on the seed and the epoch alone.
    """

    def __init__(self, bucket_of: Sequence[Hashable], batch: int, seed: int) -> None:
        if batch < 1:
            raise MahlstickError(f"a batch of {batch} cannot be; give at least 1")
        if len(bucket_of) == 0:
            raise MahlstickError("there are no examples to plan; check the dataset")
        buckets: dict[Hashable, list[int]] = {}
        for index, bucket in enumerate(bucket_of):
            buckets.setdefault(bucket, []).append(index)
        self._buckets = list(buckets.values())
        self._batch = batch
        self._seed = seed
        self._epoch: tuple[int, list[list[int]]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return sum(math.ceil(len(bucket) / self._batch) for bucket in self._buckets)

    @property
    def repeated(self) -> float:
        """The share of an epoch's rows that only fill up a bucket's last batch."""
        return 1 - sum(map(len, self._buckets)) / (self.steps_per_epoch * self._batch)

    def batch_at(self, step: int) -> list[int]:
        """The indices of the batch of optimiser step ``step``, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._batches(epoch)
        return list(self._epoch[1][position])

    def _batches(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self._seed} {epoch}")
        batches = []
        for bucket in self._buckets:
            order = _shuffled(bucket, rng)
            steps = math.ceil(len(order) / self._batch)
            endless = cycle(order)
            batches += [list(islice(endless, self._batch)) for _ in range(steps)]
        return _shuffled(batches, rng)


def _shuffled(items: list[T], rng: random.Random) -> list[T]:
    """In random order. Python promises the same `random()` from a seed in every version, and no more than that."""
    return sorted(items, key=lambda _: rng.random())
