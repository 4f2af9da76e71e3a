"""What a person may choose from: the embedded models, and those in one folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mahlstick.adapters import formats
from mahlstick.errors import MahlstickError
from mahlstick.pipelines.load import embedded_adapters, read_json
from mahlstick.pipelines.request import Request

Choice = tuple[str, str]  # what is shown, what is meant

_WEIGHTS = (".safetensors", ".ckpt", ".bin", ".pth", ".pt")


class Models:
    """Base models and adapters by kind. Files are recognised by their headers, never by their names."""

    def __init__(self, folder: Path | None) -> None:
        self.bases: list[Choice] = [("embedded", "embedded")]
        self.nets: list[Choice] = []
        self.image_prompts: list[Choice] = []
        for name, path in embedded_adapters().items():
            self._add(name, name, path)
        for path in _candidates(folder) if folder is not None else ():
            self._add(path.relative_to(folder).as_posix(), str(path), path)  # type: ignore[arg-type]

    def _add(self, shown: str, meant: str, path: Path) -> None:
        kind = _kind(path)
        lists = {"base": self.bases, "controlnet": self.nets, "ip_adapter": self.image_prompts}
        if kind in lists:
            lists[kind].append((shown, meant))

    def check(self, request: Request) -> None:
        """Raises :class:`MahlstickError` where a request names weights that are not offered here."""
        adapters = [("controls", spec.adapter, self.nets) for spec in request.controls]
        adapters += [("image_prompts", spec.adapter, self.image_prompts) for spec in request.image_prompts]
        for field, given, offered in [("base", request.base, self.bases), *adapters]:
            if given not in [meant for _, meant in offered]:
                names = ", ".join(shown for shown, _ in offered) or "none"
                raise MahlstickError(f"{field}: {given} is not offered on this page; choose one of: {names}")


def _candidates(folder: Path) -> Iterator[Path]:
    """Files of weights and folders of diffusers, without what is inside such a folder."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_file():
            if path.suffix in _WEIGHTS:
                yield path
        elif (path / "model_index.json").is_file() or (path / "config.json").is_file():
            yield path
        elif path.is_dir():
            yield from _candidates(path)


def _kind(path: Path) -> str | None:
    """None for what is no model of ours."""
    if (path / "model_index.json").is_file():
        return "base" if "unet" in read_json(path / "model_index.json") else None
    try:
        return formats.inspect(path).kind
    except MahlstickError:
        return None
