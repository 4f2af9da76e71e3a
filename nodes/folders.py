"""Where models, inputs and outputs lie: ComfyUI's folder layout, below folders that the user names.

``models/checkpoints``, ``models/loras``, ``models/controlnet`` and so on; a ComfyUI's own ``models`` folder serves as
it is. What comes with mahlstick is there under its name (``embedded``) without any folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mahlstick.errors import MahlstickError

#: ComfyUI's name of a kind of model, and the folders below ``models`` where it looks for it.
KINDS: dict[str, tuple[str, ...]] = {
    "checkpoints": ("checkpoints",),
    "diffusion_models": ("diffusion_models", "unet"),
    "vae": ("vae",),
    "clip": ("text_encoders", "clip"),
    "loras": ("loras",),
    "controlnet": ("controlnet", "t2i_adapter"),
    "clip_vision": ("clip_vision",),
    "ipadapter": ("ipadapter",),
    "animatediff_models": ("animatediff_models",),
    "animatediff_motion_lora": ("animatediff_motion_lora",),
    "embeddings": ("embeddings",),
    "upscale_models": ("upscale_models",),
}
_OWN = ("input", "output", "temp")
_ANNOTATED = re.compile(r"(.+) \[(input|output|temp)\]", re.DOTALL)
_WEIGHTS = {".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin"}


@dataclass(frozen=True)
class Folders:
    """The folders of one run. Names in workflows are paths relative to these, and stay inside them."""

    models: Path = field(default_factory=lambda: Path("models"))
    input: Path = field(default_factory=lambda: Path("input"))
    output: Path = field(default_factory=lambda: Path("output"))
    temp: Path = field(default_factory=lambda: Path("temp"))


_current: ContextVar[Folders] = ContextVar("folders")


def current() -> Folders:
    """The folders of this run; left unset, those below the working folder."""
    return _current.get(Folders())


@contextmanager
def using(folders: Folders) -> Iterator[Folders]:
    """Within the block these folders are the current ones."""
    token = _current.set(folders)
    try:
        yield folders
    finally:
        _current.reset(token)


def inside(root: Path, name: str, *, follow: bool = False) -> Path:
    """The path ``name`` below ``root``. Raises ``MahlstickError`` where it leads outside.

    A link may lead outside only with ``follow``.
    """
    base = root.expanduser().resolve()
    path = Path(os.path.normpath(base / name))
    if not name or "\0" in name or not (path if follow else path.resolve()).is_relative_to(base):
        raise MahlstickError(f"{name!r} leads outside {root}; give a name below it.")
    return path


def located(filename: str, subfolder: str = "", kind: str = "input") -> Path:
    """The path of a file below the ``input``, ``output`` or ``temp`` folder, whether it is there or not.

    Its name may say itself in which: ``cat.png [output]``. Raises ``MahlstickError`` where it leads outside.
    """
    annotated = _ANNOTATED.fullmatch(filename)
    if annotated:
        filename, kind = annotated.groups()
    if not filename:
        raise MahlstickError("filename is missing; name the file.")
    return inside(own(kind), os.path.join(subfolder, filename))


def own(kind: str) -> Path:
    """The ``input``, ``output`` or ``temp`` folder."""
    if kind not in _OWN:
        raise MahlstickError(f"{kind!r} is no folder; use {', '.join(_OWN)}.")
    return Path(getattr(current(), kind))


def shown_files(shown: Mapping[str, Any]) -> list[Path]:
    """The files below our folders that a node showed:
    ``{"images": [{"filename": …, "subfolder": …, "type": …}]}``."""
    entries = [entry for value in shown.values() if isinstance(value, list | tuple) for entry in value]
    found = []
    for entry in entries:
        if isinstance(entry, Mapping) and isinstance(entry.get("filename"), str):
            with suppress(MahlstickError):  # nodes of packs may show anything
                subfolder, kind = str(entry.get("subfolder") or ""), entry.get("type", "output")
                found.append(located(entry["filename"], subfolder, kind))
    return found


def shown_stamp(shown: Mapping[str, Any]) -> str:
    """What changes when the files that a node showed do: their paths, sizes and dates."""
    return "|".join(f"{path}|{stamp(path)}" for path in shown_files(shown))


def listed(kind: str) -> list[str]:
    """The names of the models of a kind, sorted: files, and folders in diffusers' layout."""
    found: set[str] = set()
    for root in _roots(kind):
        for folder, subfolders, files in os.walk(root, followlinks=True):
            path = Path(folder)
            here = path.relative_to(root)
            whole = [name for name in subfolders if _is_model(path / name)]
            subfolders[:] = [name for name in subfolders if name not in whole and not _is_passed_by(path / name)]
            found |= {(here / name).as_posix() for name in [*whole, *files] if name in whole or _is_weights(name)}
    return sorted(found)


def find(kind: str, name: str) -> Path:
    """The path of a model by its name in workflows. Raises ``MahlstickError`` where there is none."""
    for root in _roots(kind):
        path = inside(root, name, follow=True)  # models often lie on another disk
        if path.exists():
            return path
    raise MahlstickError(
        f"{name}: no such model below {current().models / KINDS[kind][0]}; put it there, or choose another."
    )


def stamp(path: Path) -> str:
    """What changes when the file or folder does: names, sizes and dates."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return "|".join(f"{each.name}:{each.stat().st_size}:{each.stat().st_mtime_ns}" for each in files if each.is_file())


def _roots(kind: str) -> list[Path]:
    return [current().models / folder for folder in KINDS[kind]]


def _is_model(path: Path) -> bool:
    return (path / "model_index.json").is_file() or (path / "config.json").is_file()


def _is_passed_by(folder: Path) -> bool:
    """Whether it is hidden, or a link back to a folder that it lies in."""
    leads_back = folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())
    return folder.name.startswith(".") or leads_back


def _is_weights(name: str) -> bool:
    return Path(name).suffix.lower() in _WEIGHTS and not name.startswith(".")
