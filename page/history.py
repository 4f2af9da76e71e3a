"""The pictures of each session, on disk."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from functools import lru_cache
from pathlib import Path

from PIL import Image

from mahlstick.pictures import load_picture, save_png
from mahlstick.pipelines.generate import Result
from mahlstick.pipelines.recipe import read_recipe
from mahlstick.pipelines.request import Request, open_picture

SHOWN = 60  # pictures


class History:
    """A folder with a folder for each session, whose name nobody finds who does not know the session's id."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @staticmethod
    def new_session() -> str:
        """An id that cannot be guessed. The browser keeps it."""
        return secrets.token_urlsafe(24)

    def folder(self, session: str) -> Path:
        """Where the session's pictures are, whatever the id holds."""
        return self.root / hashlib.sha256(session.encode()).hexdigest()[:32]

    def add(self, session: str, result: Result) -> list[Path]:
        """Saves the pictures with their recipes."""
        return result.save(self.folder(session))

    def next(self, session: str, kind: str, suffix: str) -> Path:
        """The name for one more of what is no single picture, such as a clip."""
        folder = self.folder(session) / kind
        taken = [int(path.stem) for path in folder.glob("*") if path.stem.isdecimal()]
        return folder / f"{max(taken, default=0) + 1:04d}{suffix}"

    def others(self, session: str, kind: str) -> list[Path]:
        """Those, the newest first."""
        found = [path for path in (self.folder(session) / kind).glob("*") if path.stem.isdecimal()]
        return sorted(found, reverse=True)[:SHOWN]

    def results(self, session: str) -> Path:
        """Where the folders are of what a session trained."""
        return self.folder(session) / "training"

    def keep_video(self, path: Path) -> Path:
        """Keeps a video that came in, where a clip's recipe may name it: outside of what its session made, under a name
        that nobody finds who has not the video or the clip."""
        with path.open("rb") as file:
            name = hashlib.file_digest(file, "sha256").hexdigest()[:32]
        kept = self.videos / f"{name}{path.suffix.lower()}"
        if not kept.is_file():
            self.videos.mkdir(parents=True, exist_ok=True)
            part = kept.with_name(f".{secrets.token_hex(8)}.part")
            shutil.copyfile(path, part)
            part.replace(kept)
        return kept

    @property
    def videos(self) -> Path:
        """Where :meth:`keep_video` keeps them."""
        return self.root / "videos"

    def inputs(self, session: str) -> Path:
        """Where the pictures are that a session's pictures were made from."""
        return self.folder(session) / "inputs"

    def keep(self, session: str, picture: Image.Image) -> Path:
        """Saves an input picture, so that scripts can name it; the same picture is kept once."""
        name = hashlib.sha256(f"{picture.mode}{picture.size}".encode() + picture.tobytes()).hexdigest()[:12]
        path = self.inputs(session) / f"{name}.png"
        return path if path.is_file() else save_png(picture, path)

    def keep_request(self, session: str, request: Request) -> Path:
        """Writes the request as JSON beside the input pictures."""
        name = hashlib.sha256(request.to_json().encode()).hexdigest()[:12]
        return request.save(self.inputs(session) / f"{name}.json")

    def overlaid(self, path: Path) -> Path:
        """The picture under the controls that it followed, each as strong as it; itself where there were none."""
        target = path.parent / "overlays" / path.name
        if target.is_file():
            return target
        controls = read_recipe(path).request.controls
        if not controls:
            return path
        laid = load_picture(path)
        for i, spec in enumerate(controls):
            laid = Image.blend(laid, open_picture(spec.image, "control").resize(laid.size), 1 / (i + 2))
        return save_png(laid, target)

    def pictures(self, session: str, words: str = "") -> list[Path]:
        """The newest first, those whose prompt holds all words."""
        found = sorted(self.folder(session).glob("*.png"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        wanted = words.lower().split()
        matching = (path for path in reversed(found) if all(word in _prompt(path) for word in wanted))
        return [path for path, _ in zip(matching, range(SHOWN), strict=False)]


@lru_cache(maxsize=4096)
def _prompt(path: Path) -> str:
    """What the picture was made from, as other front ends show it, in small letters."""
    with Image.open(path) as picture:
        return str(picture.info.get("parameters", "")).lower()
