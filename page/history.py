"""The pictures of each session, on disk."""

from __future__ import annotations

import hashlib
import secrets
from functools import lru_cache
from pathlib import Path

from PIL import Image

from mahlstick.pictures import save_png
from mahlstick.pipelines.generate import Result
from mahlstick.pipelines.request import Request

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

    def keep(self, session: str, picture: Image.Image) -> Path:
        """Saves an input picture, so that scripts can name it; the same picture is kept once."""
        name = hashlib.sha256(f"{picture.mode}{picture.size}".encode() + picture.tobytes()).hexdigest()[:12]
        path = self.folder(session) / "inputs" / f"{name}.png"
        return path if path.is_file() else save_png(picture, path)

    def keep_request(self, session: str, request: Request) -> Path:
        """Writes the request as JSON beside the input pictures."""
        name = hashlib.sha256(request.to_json().encode()).hexdigest()[:12]
        return request.save(self.folder(session) / "inputs" / f"{name}.json")

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
