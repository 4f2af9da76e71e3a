"""A style library: pictures that are found by words or by likeness, to be references of image prompts.

A library is one SQLite file: for each picture its sha256, where it lies, its captions, and its features. A transaction
holds some pictures, so a run that is killed has added those of the transactions before, whole, and the command given
again adds the rest. The search is exact: all features against the query's, which for a hundred thousand pictures takes
less than reading them (docs/architecture.md).

What words are compared with depends on the encoder. CLIP and SigLIP have a text tower that learned together with their
image tower, so words find pictures by their looks, and captions by their sense. The embedded image encoder has none
(the embedded text encoder went on to learn with the UNet), and neither has DINOv2: there, words find captions that hold
the same words, and pictures are compared with pictures.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sqlite3
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mahlstick.adapters.image_encoder import ImageEncoder, fetched
from mahlstick.errors import MahlstickError
from mahlstick.pictures import load_picture
from mahlstick.pipelines.load import choose_device, embedded_folder, text_tower
from mahlstick.pipelines.recipe import fingerprint
from mahlstick.pipelines.request import Found, ImagePromptSpec
from mahlstick.pipelines.sheet import contact_sheet

if TYPE_CHECKING:
    from mahlstick.pictures import PictureSource

Array = np.ndarray[Any, Any]
_Waiting = dict[str, dict[str, Any]]  # pictures to be encoded, by their sha256
State = Literal["here", "changed", "missing"]

LIBRARY = "library.sqlite"  # in the working folder, where none is named
EMBEDDED = "embedded"
_FORMAT = 1
_APPLICATION = 0x6D61686C  # "mahl", by which SQLite tells files of one program from others
_BATCH = 16
_COLUMNS = 4  # of a grid of finds
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS pictures (
    sha256 TEXT PRIMARY KEY, path TEXT NOT NULL UNIQUE, size INTEGER NOT NULL, modified INTEGER NOT NULL,
    captions TEXT NOT NULL, image BLOB NOT NULL, words BLOB);
"""
# A text tower by the model_type of the whole model.
_TEXT_TOWERS = {"clip": "CLIPTextModelWithProjection", "siglip": "SiglipTextModel"}
# A word, or one sign of the scripts that put no space between words.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


# --- what a library looks and reads with


@dataclass(frozen=True)
class Towers:
    """An image encoder, and the text tower that learned with it, if there is one."""

    image: ImageEncoder
    text: Any = None
    tokenizer: Any = None

    @classmethod
    def load(cls, name: str, device: str | None = None) -> Towers:
        """``embedded``; a folder or hub id of a CLIP, SigLIP or DINOv2; or a folder that ``mahlstick train clip`` made.

        Raises ``MahlstickError`` where there is none.
        """
        image, *rest = _places(name)
        encoder = ImageEncoder.from_pretrained(image)
        if rest:  # the picture processor lies beside its network
            encoder = ImageEncoder(encoder.model, _load("AutoImageProcessor", rest[0]))
        text, tokenizer = _text_tower(name)
        device = choose_device(device)
        encoder.model.to(device)
        return cls(encoder, text.to(device) if text is not None else None, tokenizer)

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Array:
        """``(n, width)`` unit vectors, float32."""
        return _unit(self.image.features(pictures))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Array:
        """``(n, width)`` unit vectors, float32; what goes beyond the tower's context is cut off."""
        length = min(self.tokenizer.model_max_length, self.text.config.max_position_embeddings)
        # SigLIP was trained on texts of full length; to a CLIP, which reads up to the end, it makes no difference.
        ids = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        found = self.text(ids.to(self.text.device))
        return _unit(found.text_embeds if hasattr(found, "text_embeds") else found.pooler_output)


def _folder(name: str) -> Path:
    """The folder of that name, which need not be there: it may be a hub id."""
    return embedded_folder() if name == EMBEDDED else Path(name).expanduser()


def _places(name: str) -> list[Path | str]:
    """Where the image encoder lies and, of a folder with several parts, its picture processor."""
    folder = _folder(name)
    if (folder / "image_encoder").is_dir():
        return [folder / "image_encoder", folder / "feature_extractor"]
    return [folder if folder.exists() else name]


def _text_tower(name: str) -> tuple[Any, Any]:
    """The text tower in the space of the image encoder with its tokenizer, or None twice."""
    import transformers

    if not _reads(name):
        return None, None
    folder = _folder(name)
    if (tower := text_tower(folder)) is not None:
        return _load("CLIPTextModel", tower).eval(), _load("AutoTokenizer", folder / "tokenizer")
    source = folder if folder.exists() else name
    config = _load("AutoConfig", source)
    if config.model_type == "clip":  # whose own width of the projection counts, not that beside its tower
        config.text_config.projection_dim = config.projection_dim
    tower = getattr(transformers, _TEXT_TOWERS[config.model_type])

    def load(local: bool) -> Any:
        return tower.from_pretrained(source, config=config.text_config, local_files_only=local).eval()

    return fetched(source, "a text encoder", load), _load("AutoTokenizer", source)


def _reads(name: str) -> bool:
    """Whether an encoder has a text tower, without loading it."""
    folder = _folder(name)
    if text_tower(folder) is not None:
        return True
    if (folder / "model_index.json").is_file():
        return False
    return _load("AutoConfig", folder if folder.exists() else name).model_type in _TEXT_TOWERS


def _load(kind: str, source: Path | str) -> Any:
    import transformers

    return fetched(
        source, f"an {kind}", lambda local: getattr(transformers, kind).from_pretrained(source, local_files_only=local)
    )


def _unit(rows: Tensor) -> Array:
    found: Array = torch.nn.functional.normalize(rows.float(), dim=-1).cpu().numpy()
    return found


def _encoder_print(name: str) -> str:
    """A fingerprint of what an encoder's name stands for."""
    folder = _folder(name)
    parts: list[Path | str] = [*_places(name)]
    if (tower := text_tower(folder)) is not None:
        parts += [tower, folder / "tokenizer"]
    prints = [fingerprint(Path(part)) for part in parts]
    return prints[0] if len(prints) == 1 else f"sha256:{hashlib.sha256(' '.join(prints).encode()).hexdigest()}"


# --- what a library holds and finds


@dataclass(frozen=True)
class Entry:
    """A picture of a library. ``name`` is its path as the library keeps it: below the library's folder, or absolute;
    ``size`` and ``modified`` are its file's, in bytes and nanoseconds, when it was added."""

    name: str
    sha256: str
    captions: tuple[str, ...]
    file: Path
    size: int
    modified: int

    @property
    def state(self) -> State:
        """Whether the file is as it was added."""
        try:
            stat = self.file.stat()
            touched = (stat.st_size, stat.st_mtime_ns) != (self.size, self.modified)
            return "changed" if touched and _sha256(self.file) != self.sha256 else "here"
        except OSError:
            return "missing"


@dataclass(frozen=True)
class Hit(Entry):
    """A picture that was found. ``similarities`` by what was compared: ``picture`` (the words with its looks),
    ``caption`` (the words with its captions), ``like`` (a picture with it); each at most 1."""

    similarities: Mapping[str, float]

    @property
    def similarity(self) -> float:
        """The highest of them."""
        return max(self.similarities.values())


@dataclass
class Report:
    """What `Library.add` did: how many pictures were added, changed (new captions, or another place) and known, and
    which were left out, with the reason."""

    added: int = 0
    changed: int = 0
    known: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


class Library:
    """Pictures that are found by words or by likeness, in one file at ``path``.

    ``encoder``: ``embedded``, or the folder or hub id of a CLIP, a SigLIP or a DINOv2; left out, that of the library,
    and of a new one the embedded. The encoder is loaded when it is needed first: not for a search among captions alone.
    """

    def __init__(
        self, path: str | os.PathLike[str] = LIBRARY, encoder: str | None = None, device: str | None = None
    ) -> None:
        self.path = Path(path).expanduser()
        self._encoder, self._device = encoder, device

    def __len__(self) -> int:
        with self._reading() as data:
            return int(data.execute("SELECT count(*) FROM pictures").fetchone()[0])

    def pictures(self) -> list[Entry]:
        """All pictures by name, each with its state: ``here``, ``changed`` since it was added, or ``missing``."""
        with self._reading() as data:
            rows = data.execute("SELECT path, sha256, captions, size, modified FROM pictures ORDER BY path").fetchall()
        return [self._entry(*row) for row in rows]

    def add(
        self, pictures: Iterable[str | os.PathLike[str]] | Mapping[Any, Sequence[str]], progress: bool = True
    ) -> Report:
        """Add pictures by path, with their captions if it is a mapping; those that are known are not encoded again, and
        keep their captions where none are given.

        A picture is known by its content. One that changed is added anew in its old place, one that moved is kept with
        its new place, and of two copies the first counts. What is no picture is skipped and reported. Raises
        ``MahlstickError`` for another encoder than the library's, and where the file cannot be written.
        """
        given = pictures if isinstance(pictures, Mapping) else {path: () for path in pictures}
        report, waiting = Report(), _Waiting()
        with self._writing() as data:
            facts = self._facts(data)
            for path, captions in tqdm(given.items(), "adding", disable=not progress):
                try:
                    self._read(data, Path(path), [text for text in captions if text.strip()], report, waiting)
                except (MahlstickError, OSError) as error:
                    report.skipped.append((str(path), getattr(error, "strerror", None) or str(error)))
                if len(waiting) == _BATCH:
                    self._write(data, waiting, facts)
                    waiting.clear()
            self._write(data, waiting, facts)
        return report

    def remove(self, names: Iterable[str | os.PathLike[str]] = (), missing: bool = False) -> list[str]:
        """Take pictures out, by path, by a folder of them, or by the beginning of their sha256; and with ``missing``
        all whose files are gone. Returns their names; the files stay.

        Raises ``MahlstickError``, before anything is removed, for a name that the library does not hold.
        """
        entries = self.pictures()
        chosen = {entry.name for entry in entries if missing and entry.state == "missing"}
        for name in names:
            found = {entry.name for entry in entries if _is_named(entry, os.fspath(name))}
            if not found:
                raise MahlstickError(f"{self.path}: holds no picture {os.fspath(name)}; library list shows what it has")
            chosen |= found
        with self._writing() as data, data:
            data.executemany("DELETE FROM pictures WHERE path = ?", [(name,) for name in chosen])
        return sorted(chosen)

    def search(
        self,
        text: str | None = None,
        like: PictureSource | None = None,
        count: int = 9,
        least: float | None = None,
    ) -> list[Hit]:
        """The ``count`` pictures nearest to words, to a picture, or to both, the nearest first.

        Several similarities (the words with the looks, the words with the captions, a picture with the looks) count
        alike: each in standard deviations over the library, where what has no caption has the mean. ``least``: hits
        must reach it in one of them. Raises ``MahlstickError`` for an empty library, and for words where neither
        captions nor the encoder can tell.
        """
        hits = (hit for hit in self._nearest(text, like) if least is None or hit.similarity >= least)
        return list(islice(hits, count))

    def references(self, text: str, count: int = 1, least: float | None = None) -> list[Hit]:
        """The ``count`` nearest to the words that can be used: those whose files are gone or changed are passed over,
        with a warning.

        Raises ``MahlstickError`` as `search`, and where nothing is near enough or left.
        """
        chosen: list[Hit] = []
        near, best = 0, None
        for hit in self._nearest(text):
            if len(chosen) == count:
                break
            best = hit if best is None else max(best, hit, key=lambda each: each.similarity)
            if least is not None and hit.similarity < least:
                continue
            near += 1
            if hit.state == "here":
                chosen.append(hit)
            else:
                warnings.warn(f"{hit.file}: {_TOLD[hit.state]}; the next one is taken", stacklevel=2)
        if not near and best is not None:
            raise MahlstickError(
                f"{self.path}: nothing in it is near enough to {text!r}: {best.name} comes nearest with"
                f" {best.similarity:.2f}, and least is {least:g}; give a smaller one, or other words"
            )
        if not chosen:
            raise MahlstickError(f"{self.path}: every picture near {text!r} has changed or is gone; add them again")
        return chosen

    def again(self, found: Found) -> Path:
        """The file of a picture that was found before, wherever it lies now.

        Raises ``MahlstickError`` where it is gone or has changed.
        """
        with self._reading() as data:
            row = data.execute("SELECT path FROM pictures WHERE sha256 = ?", (found.sha256,)).fetchone()
        places = [self._file(name) for name in ([row[0]] if row else []) + [found.file]]
        for place in places:
            if _holds(place, found.sha256):
                return place
        raise MahlstickError(
            f"{found.file}: was found in {self.path} before, and is gone or has changed since; put it back, or leave"
            " found out to search anew"
        )

    # reading and writing

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        if not self.path.is_file():
            raise MahlstickError(
                f"{self.path}: no such library; make one with mahlstick library add FOLDER --into {self.path}"
            )
        # Open for writing, where that may be: what a writer that was killed left unfinished has to be taken back.
        with self._naming(), closing(sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=rw", uri=True)) as data:
            self._check_format(data)
            yield data

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MahlstickError(f"{self.path}: cannot be written ({error.strerror}); give another place") from error
        with self._naming(), closing(sqlite3.connect(self.path)) as data:
            if data.execute("PRAGMA schema_version").fetchone()[0] == 0:
                with data:
                    data.execute("BEGIN IMMEDIATE")
                    data.execute(f"PRAGMA application_id = {_APPLICATION}")
                    data.execute(f"PRAGMA user_version = {_FORMAT}")
                    for statement in filter(None, map(str.strip, _TABLES.split(";"))):
                        data.execute(statement)
            self._check_format(data)
            yield data

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """SQLite's errors as sentences."""
        try:
            yield
        except sqlite3.Error as error:
            raise MahlstickError(
                f"{self.path}: cannot be used as a library ({error}); give another file, or wait for what writes to it"
            ) from error

    def _check_format(self, data: sqlite3.Connection) -> None:
        application, version = (data.execute(f"PRAGMA {name}").fetchone()[0] for name in
                                ("application_id", "user_version"))  # fmt: skip
        if application != _APPLICATION:
            raise MahlstickError(f"{self.path}: is no library of mahlstick's; give another file")
        if version > _FORMAT:
            raise MahlstickError(f"{self.path}: was written by a newer mahlstick; update this one")

    def _facts(self, data: sqlite3.Connection, loaded: bool = True) -> dict[str, str]:
        """Which encoder the features are by, its fingerprint, and whether it ``reads`` words; of a new library, what
        they will be by.

        Raises ``MahlstickError`` where the encoder in use, if it is to be ``loaded``, is another one.
        """
        known = dict(data.execute("SELECT name, value FROM facts"))
        self._encoder = self._encoder or known.get("encoder", EMBEDDED)
        if known and not loaded:
            return known
        reads = str(_reads(self._encoder))  # which fetches what of a hub id is not here yet
        found = _encoder_print(self._encoder)
        if known and found != known["fingerprint"]:
            raise MahlstickError(
                f"{self.path}: its features are by {known['encoder']} ({known['fingerprint'][:19]}…), and"
                f" {self._encoder} is {found[:19]}… here; give that encoder, or add the pictures to a new library"
            )
        is_folder = self._encoder != EMBEDDED and _folder(self._encoder).exists()
        place = str(_folder(self._encoder).absolute()) if is_folder else self._encoder  # a name, a hub id
        return known or {"encoder": place, "fingerprint": found, "reads": reads}

    @cached_property
    def _towers(self) -> Towers:
        assert self._encoder is not None
        return Towers.load(self._encoder, self._device)

    def _file(self, name: str) -> Path:
        return self.path.absolute().parent / name

    def _name(self, file: Path) -> str:
        """Below the library's folder, so that both can be moved together, or absolute."""
        file, folder = file.absolute(), self.path.absolute().parent
        return (file.relative_to(folder) if file.is_relative_to(folder) else file).as_posix()

    def _read(
        self, data: sqlite3.Connection, file: Path, captions: list[str], report: Report, waiting: _Waiting
    ) -> None:
        """Let a picture wait to be encoded, unless it is known. Raises ``OSError`` or ``MahlstickError`` for none."""
        name, listed, stat = self._name(file), json.dumps(captions, ensure_ascii=False), file.stat()
        entry = {"path": name, "size": stat.st_size, "modified": stat.st_mtime_ns, "captions": listed}
        before = data.execute("SELECT size, modified, captions FROM pictures WHERE path = ?", (name,)).fetchone()
        as_it_was = before is not None and before[:2] == (stat.st_size, stat.st_mtime_ns)
        if as_it_was and (not captions or before[2] == listed):
            report.known += 1
            return
        entry["sha256"] = sha256 = _sha256(file)
        same = data.execute("SELECT path, captions FROM pictures WHERE sha256 = ?", (sha256,)).fetchone()
        if same is not None and not captions:
            entry["captions"] = listed = same[1]
        if sha256 in waiting or (same is not None and same[0] != name and _holds(self._file(same[0]), sha256)):
            with data:  # a copy, maybe in the place of a picture that is no more
                data.execute("DELETE FROM pictures WHERE path = ? AND sha256 <> ?", (name, sha256))
            report.known += 1
        elif same is not None and same[1] == listed:  # moved or touched, so that its features stay
            with data:
                data.execute("DELETE FROM pictures WHERE path = ? AND sha256 <> ?", (name, sha256))
                data.execute(
                    "UPDATE pictures SET path = :path, size = :size, modified = :modified WHERE sha256 = :sha256", entry
                )
            report.changed += same[0] != name
            report.known += same[0] == name
        else:
            waiting[sha256] = entry | {"picture": load_picture(file)}
            report.added += before is None and same is None
            report.changed += before is not None or same is not None

    def _write(self, data: sqlite3.Connection, waiting: _Waiting, facts: Mapping[str, str]) -> None:
        """Encode the pictures that wait, and write them in one transaction."""
        if not waiting:
            return
        entries = list(waiting.values())
        images = self._towers.images([entry.pop("picture") for entry in entries])
        for entry, image in zip(entries, images, strict=True):
            captions = json.loads(entry["captions"])
            reads = captions and self._towers.text is not None
            entry["image"] = _blob(image)
            entry["words"] = _blob(self._towers.texts(captions)) if reads else None
        with data:
            data.executemany("INSERT OR IGNORE INTO facts VALUES (?, ?)", facts.items())
            data.executemany(
                "INSERT OR REPLACE INTO pictures VALUES (:sha256, :path, :size, :modified, :captions, :image, :words)",
                entries,
            )

    # finding

    def _nearest(self, text: str | None, like: PictureSource | None = None) -> Iterator[Hit]:
        """All pictures with their similarities, the nearest first."""
        if (text is None or not text.strip()) and like is None:
            raise MahlstickError("there is nothing to search for: give words, or a picture to be like")
        with self._reading() as data:
            if data.execute("SELECT 1 FROM pictures").fetchone() is None:
                raise MahlstickError(f"{self.path}: is empty; fill it with mahlstick library add FOLDER")
            reads = self._facts(data, loaded=False)["reads"] == "True"
            looks = reads or like is not None
            self._facts(data, loaded=looks)
            features = ", image, words" if looks else ""
            rows = data.execute(
                f"SELECT path, sha256, captions, size, modified{features} FROM pictures ORDER BY sha256"
            ).fetchall()
        found: dict[str, Array] = {}
        if text is not None and text.strip():
            found |= self._by_words(text, rows, reads)
        if like is not None:
            found["like"] = (
                _features(row[5] for row in rows) @ self._towers.images([load_picture(like, name="like")])[0]
            )
        for i in np.argsort(-sum(_standard(values) for values in found.values()), kind="stable"):
            similarities = {name: float(values[i]) for name, values in found.items() if not np.isnan(values[i])}
            if similarities:
                yield Hit(**vars(self._entry(*rows[i][:5])), similarities=similarities)

    def _by_words(self, text: str, rows: list[Any], reads: bool) -> dict[str, Array]:
        """Similarities of words to looks, where the encoder reads, and to captions; NaN where there are none."""
        captions = [json.loads(row[2]) for row in rows]
        if not reads and not any(captions):
            raise MahlstickError(
                f"{self.path}: its pictures have no captions, and its encoder ({self._encoder}) reads no words; search"
                " with a picture, add captions, or make a library with a CLIP or a SigLIP"
            )
        if not reads:
            return {"caption": _word_similarities(text, captions)}
        query = self._towers.texts([text])[0]
        found = {"picture": _features(row[5] for row in rows) @ query}
        if any(captions):
            best = [(_features([row[6]]).reshape(-1, len(query)) @ query).max() if row[6] else np.nan for row in rows]
            found["caption"] = np.array(best)
        return found

    def _entry(self, name: str, sha256: str, captions: str, size: int, modified: int) -> Entry:
        return Entry(name, sha256, tuple(json.loads(captions)), self._file(name), size, modified)


_TOLD = {"missing": "is gone since it was added to the library", "changed": "has changed since it was added"}


def _features(blobs: Iterable[bytes]) -> Array:
    """Stored vectors as rows, float32."""
    parts = list(blobs)
    return np.frombuffer(b"".join(parts), np.float16).reshape(len(parts), -1).astype(np.float32)


def _blob(vectors: Array) -> bytes:
    """Vectors as they are stored: halves, which move a cosine by less than a thousandth."""
    return vectors.astype(np.float16).tobytes()


def _standard(values: Array) -> Array:
    """In standard deviations from the mean; 0 where there is no value."""
    spread = np.nanstd(values)
    return np.nan_to_num((values - np.nanmean(values)) / (spread if spread > 0 else 1.0))


def _word_similarities(text: str, captions: Sequence[Sequence[str]]) -> Array:
    """Cosines of the words of a text with those of each picture's best caption, rare words counting more (by the
    logarithm of how many captions there are for one that has it); NaN without a caption."""
    sets = [[set(_words(caption)) for caption in several] for several in captions]
    total = sum(len(several) for several in sets)
    held = Counter(word for several in sets for words in several for word in words)
    query = set(_words(text))

    def length(words: Iterable[str]) -> float:
        return math.sqrt(sum(math.log1p(total / max(held[word], 1)) ** 2 for word in words))

    whole = length(query)

    def cosine(words: set[str]) -> float:
        return length(query & words) ** 2 / (whole * length(words)) if whole and words else 0.0

    return np.array([max(map(cosine, several)) if several else np.nan for several in sets])


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _is_named(entry: Entry, name: str) -> bool:
    place = Path(name).expanduser().absolute()
    is_place = place == entry.file or place in entry.file.parents
    return is_place or entry.name == name or (len(name) >= 8 and entry.sha256.startswith(name))


def _holds(file: Path, sha256: str) -> bool:
    return file.is_file() and _sha256(file) == sha256


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# --- for requests and the command line


def look_up(spec: ImagePromptSpec) -> ImagePromptSpec:
    """An image prompt with the pictures that its words find, and which these are; any other as it is.

    One that says what was found gets the same again. Raises ``MahlstickError`` as `Library.references` and
    `Library.again`.
    """
    if spec.search is None or any(not isinstance(i, str) or i.startswith("data:") for i in spec.images):
        return spec
    library = Library(spec.library or LIBRARY)
    if spec.found:
        return spec.model_copy(update={"images": [str(library.again(each)) for each in spec.found]})
    hits = library.references(spec.search, spec.count, spec.least)
    found = [Found(file=hit.name, sha256=hit.sha256) for hit in hits]
    return spec.model_copy(update={"images": [str(hit.file) for hit in hits], "found": found})


def grid(hits: Sequence[Hit], cell: int = 200) -> Image.Image:
    """The pictures that were found and are still there, in rows, each row with its similarities."""
    shown = [hit for hit in hits if hit.state != "missing"]
    rows = [shown[start : start + _COLUMNS] for start in range(0, len(shown), _COLUMNS)]
    columns = [""] * min(_COLUMNS, len(shown))
    labelled = []
    for row in rows:
        pictures: list[Image.Image | None] = [load_picture(hit.file) for hit in row]
        similarities = " ".join(f"{hit.similarity:.2f}" for hit in row)
        labelled.append((similarities, pictures + [None] * (len(columns) - len(row))))
    return contact_sheet(columns, labelled, cell)
