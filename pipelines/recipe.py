"""What made a picture, kept in the picture: the whole request, its input pictures, and which weights and versions."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from PIL import Image

import mahlstick
from mahlstick.errors import MahlstickError
from mahlstick.pipelines.load import adapter_path, embedded_folder, read_json
from mahlstick.pipelines.request import ControlSpec, ImagePromptSpec, Request, Spec

KEY = "mahlstick"
GRID_KEY = "mahlstick-grid"
SIZE_LIMIT = 48 * 2**20  # characters; Pillow reads at most 64 MiB of text from a PNG
_PACKAGES = ("torch", "diffusers", "transformers", "compel", "pillow")
_WEIGHTS = {".safetensors", ".bin", ".ckpt", ".pt", ".pth"}
_CONFIGS = {".json", ".txt", ".model"}


Locate = Callable[[str], str]  # a name in a request -> its path or hub id


class Recipe(Spec):
    """A request with nothing left open: seeds, size, input pictures as ``data:`` URLs, and what it ran on."""

    key: ClassVar[str] = KEY  # of the PNG's text chunk

    version: Literal[1] = 1
    request: Request
    index: int | None = None  # which of the request's pictures; None: all
    files: dict[str, str]  # base and adapters as the request names them -> their fingerprints
    versions: dict[str, str]
    device: str
    dtype: str
    threads: int

    def for_image(self, i: int) -> Recipe:
        """The recipe of picture ``i`` alone, with those that shared its batch, whose sums its last bits depend on."""
        request = self.request
        assert request.seeds is not None
        start = i - i % request.batch
        seeds = request.seeds[start : start + request.batch]
        part = request.model_copy(update={"seeds": seeds, "images": len(seeds)})
        return self.model_copy(update={"request": part, "index": i - start})

    def text(self) -> dict[str, str]:
        """PNG text chunks: the recipe itself, and ``parameters`` as other front ends show them."""
        return {self.key: self.to_json(indent=None), "parameters": self._parameters()}

    def _parameters(self) -> str:
        request = self.request
        assert request.seeds is not None
        negative = [f"Negative prompt: {request.negative_prompt}"] if request.negative_prompt else []
        facts = {
            "Steps": request.steps,
            "Sampler": request.scheduler or "the base's own",
            "CFG scale": f"{request.guidance:g}",
            "Seed": request.seeds[self.index or 0],
            "Size": f"{request.width}x{request.height}" if request.width else "as the input",
            "Model": Path(request.base).name,
            "Version": f"mahlstick {self.versions['mahlstick']}",
        }
        return "\n".join([request.prompt, *negative, ", ".join(f"{name}: {value}" for name, value in facts.items())])


def describe(request: Request, device: str, dtype: torch.dtype) -> Recipe:
    """The recipe of a request that is resolved, with pictures as objects.

    Raises :class:`MahlstickError` where the input pictures are too large to be kept.
    """
    kept = Request.from_json(in_memory_named(request).to_json())
    recipe = Recipe(
        request=kept,
        files={name: fingerprint(path) for name, path in _weights(kept)},
        versions=_versions(),
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )
    if len(recipe.to_json(indent=None)) > SIZE_LIMIT:
        raise MahlstickError(
            "image_prompts: the pictures are too large to keep in the recipe; give fewer or smaller ones"
        )
    return recipe


def _versions() -> dict[str, str]:
    return {"mahlstick": mahlstick.__version__, **{name: version(name) for name in _PACKAGES}}


def in_memory_named(request: Request) -> Request:
    """Adapters that were given as objects become ``<Class in memory>``: recorded, but not replayable."""

    def named(specs: list[Any]) -> list[Any]:
        return [spec.model_copy(update={"adapter": _named(spec.adapter)}) for spec in specs]

    return request.model_copy(
        update={"controls": named(request.controls), "image_prompts": named(request.image_prompts)}
    )


def _named(adapter: Any) -> str:
    return adapter if isinstance(adapter, str) else f"<{type(adapter).__name__} in memory>"


def is_in_memory(name: str) -> bool:
    """True for the name that an object got in a recipe."""
    return name.startswith("<") and name.endswith(" in memory>")


def _weights(request: Request) -> Iterator[tuple[str, Path]]:
    """(name in the request, where it lies) of everything with weights or configs that has a place."""
    places: list[tuple[Any, Locate]] = []
    if not is_in_memory(request.base):
        places += [(request.base, _as_path), (request.base_config, _as_path)]
    places += [(spec.adapter, adapter_path) for spec in (*request.controls, *request.image_prompts)]
    places += [(spec.image_encoder, _as_path) for spec in request.image_prompts]
    for name, locate in places:
        if name is not None and not is_in_memory(name):
            yield name, Path(locate(name)).expanduser()


def _as_path(name: str) -> str:
    return str(embedded_folder()) if name == "embedded" else name


def fingerprint(path: Path) -> str:
    """``sha256:…`` of a file, or of what is loaded from a folder; ``commit:…`` of a hub id's snapshot.

    Raises :class:`MahlstickError` where nothing is there.
    """
    if path.is_file():
        return f"sha256:{_digest(path, path.stat().st_mtime_ns, path.stat().st_size)}"
    if path.is_dir():
        total = hashlib.sha256()
        for file in sorted(_loaded_from(path)):
            digest = _digest(file, file.stat().st_mtime_ns, file.stat().st_size)
            total.update(f"{file.relative_to(path).as_posix()} {digest}\n".encode())
        return f"sha256:{total.hexdigest()}"
    return f"commit:{_snapshot(path.as_posix())}"


def _loaded_from(folder: Path) -> Iterator[Path]:
    """Configs and weights, of a base those of its components: variants, pickles beside safetensors and whatever else
    was downloaded along can be many times as large, and make no picture.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        yield from _chosen(folder)
        return
    yield index
    for name, classes in read_json(index).items():
        if isinstance(classes, list) and any(classes) and (folder / name).is_dir():
            yield from _chosen(folder / name)


def _chosen(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if file.is_file()]
    weights = [file for file in files if file.suffix in _WEIGHTS]
    weights = [file for file in weights if file.suffix == ".safetensors"] or weights
    weights = [file for file in weights if "." not in file.stem] or weights  # model.fp16.safetensors is a variant
    return [file for file in files if file.suffix in _CONFIGS] + weights


@lru_cache(maxsize=1024)
def _digest(path: Path, mtime_ns: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _snapshot(name: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download("/".join(name.split("/")[:2]), local_files_only=True)).name
    except Exception as error:  # the hub client's errors differ between its versions
        raise MahlstickError(f"{name}: no such file, folder or downloaded model") from error


R = TypeVar("R", bound=Recipe)


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a PNG. Raises :class:`MahlstickError` where there is none, or it cannot be read."""
    return read_as(Recipe, path)


def read_as(kind: type[R], path: str | os.PathLike[str]) -> R:
    """The recipe of this kind in a PNG. Raises :class:`MahlstickError` where there is none, or it cannot be read."""
    try:
        with Image.open(path) as picture:
            picture.load()
            texts = getattr(picture, "text", {})
    except FileNotFoundError:
        raise MahlstickError(f"{path}: no such file; give a PNG that mahlstick saved") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MahlstickError(f"{path}: not a readable picture; give a PNG that mahlstick saved") from error
    text = texts.get(kind.key)
    if text is None and texts.keys() & {KEY, GRID_KEY}:
        held, wanted = ("a grid of pictures", "one of them") if kind.key == KEY else ("one picture", "a grid")
        raise MahlstickError(f"{path}: is {held}; give {wanted}")
    if text is None:
        raise MahlstickError(
            f"{path}: holds no recipe; only a PNG that mahlstick saved, and nothing edited since, has one"
        )
    try:
        return kind.from_json(text)
    except MahlstickError as error:
        raise MahlstickError(f"{path}: its recipe cannot be read ({error})") from error


def found_again(recipe: Recipe, source: str, folder: str | os.PathLike[str] | None, pipe_given: bool) -> Request:
    """The recipe's request with every weight in its place, checked against its fingerprint.

    Where a file has moved, ``folder`` is searched by file name. Raises :class:`MahlstickError` for weights that are
    missing, have changed, or lived only in memory.
    """
    request = recipe.request
    if is_in_memory(request.base) and not pipe_given:
        raise MahlstickError(f"{source}: was made with a pipeline passed as an object; give it again as pipe=")
    for spec in (*request.controls, *request.image_prompts):
        if is_in_memory(spec.adapter):
            raise MahlstickError(
                f"{source}: was made with {spec.adapter[1:-1]}; save adapters to a file to replay them"
            )

    def place(name: Any, locate: Locate) -> Any:
        if name is None:
            return None
        if name not in recipe.files:
            raise MahlstickError(f"{source}: its recipe has no fingerprint of {name}; it was edited, so make it anew")
        return _find(name, recipe.files[name], source, folder, locate)

    def control(spec: ControlSpec) -> ControlSpec:
        return spec.model_copy(update={"adapter": place(spec.adapter, adapter_path)})

    def image_prompt(spec: ImagePromptSpec) -> ImagePromptSpec:
        found = {"adapter": place(spec.adapter, adapter_path), "image_encoder": place(spec.image_encoder, _as_path)}
        return spec.model_copy(update=found)

    update: dict[str, Any] = {
        "controls": [control(spec) for spec in request.controls],
        "image_prompts": [image_prompt(spec) for spec in request.image_prompts],
    }
    if not pipe_given:
        update["base"] = place(request.base, _as_path)
        update["base_config"] = place(request.base_config, _as_path)
    return request.model_copy(update=update)


def _find(name: str, expected: str, source: str, folder: str | os.PathLike[str] | None, locate: Locate) -> str:
    """``name``, or a file or folder of its name below ``folder``, whichever has the expected fingerprint."""
    changed = False
    candidates = [name, *(str(path) for path in Path(folder).rglob(Path(name).name))] if folder else [name]
    for candidate in candidates:
        try:
            if fingerprint(Path(locate(candidate)).expanduser()) == expected:
                return candidate
            changed = True
        except MahlstickError:
            continue
    if changed:
        raise MahlstickError(
            f"{source}: {name} has changed since ({expected[:19]}… was used); give its folder as weights"
        )
    raise MahlstickError(f"{source}: {name} is not there ({expected[:19]}… was used); give its folder as weights")


def differences(recipe: Recipe) -> list[str]:
    """What differs here from where the recipe was made, so that the last bits may too."""
    here = _versions()
    return [
        f"{name} {made} then, {here.get(name, 'none')} now"
        for name, made in recipe.versions.items()
        if here.get(name) != made
    ]
