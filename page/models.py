"""What a person may choose from: the embedded models, and those in one folder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from mahlstick.adapters import formats
from mahlstick.errors import MahlstickError
from mahlstick.pipelines.load import embedded_adapters, read_json
from mahlstick.pipelines.request import Request, VideoRequest

Choice = tuple[str, str]  # what is shown, what is meant

_WEIGHTS = (".safetensors", ".ckpt", ".bin", ".pth", ".pt")


class Models:
    """Base models and adapters by kind. Files are recognised by their headers, never by their names."""

    def __init__(self, folder: Path | None, results: Path | None = None, library: Path | None = None) -> None:
        """``results`` holds a folder for each thing that a session trained; ``library`` has pictures to be found."""
        self.folder, self.library = folder, library
        self.bases: list[Choice] = [("embedded", "embedded")]
        self.nets: list[Choice] = []
        self.image_prompts: list[Choice] = []
        self.motions: list[Choice] = []
        for name, path in embedded_adapters().items():
            self._add(name, name, path)
        for name, path in [*weights(folder).items(), *trained(results).items()]:
            self._add(name, str(path), path)

    def of(self, results: Path) -> Models:
        """What is there now, and what a session trained."""
        return Models(self.folder, results, self.library)

    def _add(self, shown: str, meant: str, path: Path) -> None:
        kind = _kind(path)
        lists = {
            "base": self.bases,
            "controlnet": self.nets,
            "ip_adapter": self.image_prompts,
            "motion_adapter": self.motions,
        }
        if kind in lists:
            lists[kind].append((shown, meant))

    def check(self, request: Request | VideoRequest) -> None:
        """Raises :class:`MahlstickError` where a request names weights that are not offered."""
        adapters = [("controls", spec.adapter, self.nets) for spec in request.controls]
        adapters += [("image_prompts", spec.adapter, self.image_prompts) for spec in request.image_prompts]
        if isinstance(request, VideoRequest):
            adapters.append(("motion", request.motion, self.motions))
        for field, given, offered in [("base", request.base, self.bases), *adapters]:
            if given not in [meant for _, meant in offered]:
                names = ", ".join(shown for shown, _ in offered) or "none"
                raise MahlstickError(f"{field}: {given} is not offered on this page; choose one of: {names}")
        for field, given in _elsewhere(request, str(self.library) if self.library is not None else None):
            raise MahlstickError(f"{field}: {given} is not offered on this page; leave it out")


def _elsewhere(request: Request | VideoRequest, library: str | None) -> Iterator[tuple[str, str]]:
    """Fields that name files of the server, or of a hub, beside the models and the library, and what they name."""
    named = [("base_config", request.base_config)]
    named += [(f"controls[{i}].options.model", spec.options.get("model")) for i, spec in enumerate(request.controls)]
    for i, spec in enumerate(request.image_prompts):
        is_ours = library is not None and spec.library == library
        fields = ("image_encoder",) if is_ours else ("image_encoder", "search", "library")
        named += [(f"image_prompts[{i}].{field}", getattr(spec, field)) for field in fields]
    yield from ((field, given) for field, given in named if given is not None)


def weights(folder: Path | None) -> dict[str, Path]:
    """Whatever below a folder may be a model or other weights, by its path there."""
    found = _candidates(folder) if folder is not None else ()
    return {path.relative_to(folder).as_posix(): path for path in found}  # type: ignore[arg-type]


def trained(results: Path | None) -> dict[str, Path]:
    """The result of each run, by its name: the run's folder, or the file of weights in it."""
    runs = sorted(results.iterdir()) if results is not None and results.is_dir() else []
    found: dict[str, Path] = {}
    for run in runs:
        if _is_model(run):
            found[run.name] = run
        elif files := sorted(path for path in run.glob("*") if path.suffix in _WEIGHTS):
            found[run.name] = files[0]
    return found


def _candidates(folder: Path) -> Iterator[Path]:
    """Files of weights and folders of diffusers, without what is inside such a folder."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_file():
            if path.suffix in _WEIGHTS:
                yield path
        elif _is_model(path):
            yield path
        elif path.is_dir():
            yield from _candidates(path)


def _is_model(folder: Path) -> bool:
    return (folder / "model_index.json").is_file() or (folder / "config.json").is_file()


def _kind(path: Path) -> str | None:
    """None for what is no model of ours."""
    return _kind_at(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4096)
def _kind_at(path: Path, changed: int) -> str | None:
    if (path / "model_index.json").is_file():
        return "base" if "unet" in read_json(path / "model_index.json") else None
    try:
        return formats.inspect(path).kind
    except MahlstickError:
        return None
