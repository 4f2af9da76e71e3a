"""Base models: the embedded one, a diffusers folder, a hub id or a single checkpoint file, as diffusers pipelines."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch

from mahlstick.adapters import formats
from mahlstick.adapters.base import Adapter
from mahlstick.adapters.load import load_adapter
from mahlstick.errors import MahlstickError

Task = Literal["text", "img2img", "inpaint"]

_AUTO_CLASSES = {
    "text": "AutoPipelineForText2Image",
    "img2img": "AutoPipelineForImage2Image",
    "inpaint": "AutoPipelineForInpainting",
}
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
_NO_UNET = "has no UNet; give a Stable Diffusion 1, 2 or XL"
_SINGLE_FILES = (".safetensors", ".ckpt")
_SHORT_NAME = re.compile(r"[\w-]+")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def embedded_folder() -> Path:
    """Where the embedded model lies. Raises :class:`MahlstickError` where the installation lacks it."""
    folder = Path(str(files("mahlstick.assets"))) / "embedded"
    if not (folder / "model_index.json").is_file():
        raise MahlstickError(f"embedded: {folder} is missing; install mahlstick with its assets, or give another base")
    return folder


def text_tower(folder: Path) -> Path | None:
    """The folder of the text encoder that learned with a folder's image encoder, where it has one: beside it, as
    ``mahlstick train clip`` writes the two; of a pipeline, whose own text encoder serves its UNet, in ``clip``."""
    within = folder / "clip" if (folder / "model_index.json").is_file() else folder
    return within / "text_encoder" if (within / "text_encoder").is_dir() else None


def embedded_adapters() -> dict[str, Path]:
    """The adapters that come with the embedded model, by name: the folders ``controlnet-NAME``, or
    ``controlnet-NAME+NAME`` for one net that knows several controls, ``ip-adapter`` or what begins with it, and
    ``motion``."""
    folder = Path(str(files("mahlstick.assets"))) / "embedded"
    nets = sorted(folder.glob("controlnet-*"))
    found = {name: path for path in nets for name in path.name.removeprefix("controlnet-").split("+")}
    others = [*folder.glob("ip-adapter*"), *folder.glob("motion*")]
    return found | {path.name: path for path in sorted(others)}


def choose_device(device: str | None = None) -> str:
    """The device by name, or the best that is there. Raises :class:`MahlstickError` for one that is not."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MahlstickError(f"device {device!r} is not available here; use --device cpu or leave it out") from error
    return device


def choose_dtype(dtype: str | torch.dtype | None, device: str) -> torch.dtype:
    """The dtype by name; left open, float32 on a CPU and float16 elsewhere."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return torch.float32 if device == "cpu" else torch.float16
    if dtype not in _DTYPES:
        raise MahlstickError(f"dtype {dtype!r} is unknown; use float32, float16 or bfloat16")
    return _DTYPES[dtype]


def load_pipeline(
    source: Any = "embedded",
    *,
    task: Task = "text",
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    config: str | None = None,
    **kwargs: Any,
) -> Any:
    """A diffusers pipeline for ``task``.

    Args:
        source: ``"embedded"``, a diffusers folder, a hub id, a single .safetensors or .ckpt file, or a pipeline, which
            passes through (moved only where ``dtype`` or ``device`` is given).
        task: other than the pipeline's own, diffusers' auto pipelines convert it; the modules are shared.
        dtype: left open, float32 on a CPU and float16 elsewhere.
        device: left open, the best there is.
        config: folder or hub id with the configs of a single file; left open, diffusers gets them from the hub.
        kwargs: for diffusers' ``from_pretrained`` or ``from_single_file``.

    Raises :class:`MahlstickError` where there is nothing to load, it is broken, or it has no UNet that takes units.
    """
    if isinstance(source, str | os.PathLike):
        device = choose_device(device)
        arguments = {"dtype": choose_dtype(dtype, device), **kwargs}
        pipe = _load(os.fspath(source), config, arguments).to(device)
    else:
        pipe = source
        if device is not None:
            pipe = pipe.to(choose_device(device))
        if dtype is not None:
            pipe = pipe.to(choose_dtype(dtype, "cpu"))
    if not hasattr(pipe, "unet"):
        raise MahlstickError(
            f"{_name(source)}: a {type(pipe).__name__} has no UNet; give a Stable Diffusion 1, 2 or XL"
        )
    return for_task(pipe, task)


def for_task(pipe: Any, task: Task) -> Any:
    """``pipe`` itself where its class does ``task``, else a pipeline of the class that does, over the same modules."""
    import diffusers

    if task_of(pipe) == task:
        return pipe
    # The pipeline classes edit their scheduler's config in place, so the two must not share one.
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    try:
        return getattr(diffusers, _AUTO_CLASSES[task]).from_pipe(pipe, scheduler=scheduler)
    except (ValueError, KeyError) as error:
        raise MahlstickError(f"{type(pipe).__name__} has no counterpart for {task}; load another base") from error


def task_of(pipe: Any) -> Task:
    """What the pipeline's class does, by diffusers' naming."""
    name = type(pipe).__name__
    return "inpaint" if "Inpaint" in name else "img2img" if "Img2Img" in name else "text"


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else "pipe"


def _load(source: str, config: str | None, arguments: dict[str, Any]) -> Any:
    path = embedded_folder() if source == "embedded" else Path(source).expanduser()
    if path.is_file():
        return _load_single_file(path, config, arguments)
    if path.is_dir():
        _check_folder(path)
    elif not _HUB_ID.fullmatch(source) or source.endswith(_SINGLE_FILES):
        raise MahlstickError(
            f"{source}: no such file or folder; give 'embedded', a diffusers folder, a hub id (owner/name) or a"
            " .safetensors file"
        )
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(str(path) if path.is_dir() else source, **arguments)
    except Exception as error:  # diffusers, transformers, the hub's client and safetensors each have their own
        raise _failure(source, error, hub=not path.is_dir()) from error


def _failure(source: str, error: Exception, hub: bool) -> MahlstickError:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if hub and "RepositoryNotFoundError" in kinds:
        return MahlstickError(f"{source}: neither a folder here nor a model on the hub; check the name")
    if hub and not kinds & {"SafetensorError", "KeyError", "TypeError"}:
        return MahlstickError(
            f"{source}: not a folder here, and the hub did not give it; check the name and the connection, or give a"
            " local folder"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return MahlstickError(f"{source}: cannot be loaded ({reason[:200]}); download it again or check its files")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a model's JSON file. Raises :class:`MahlstickError` where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise MahlstickError(f"{path}: not valid JSON; download the model again") from error
    if not isinstance(found, dict):
        raise MahlstickError(f"{path}: holds a {type(found).__name__}, not an object; download the model again")
    return found


def _check_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise MahlstickError(f"{folder}: no model_index.json in it; give the top folder of a diffusers model")
    components = read_json(index)
    if "unet" not in components:
        kind = components.get("_class_name", "model without a class name")
        raise MahlstickError(f"{folder}: a {kind} {_NO_UNET}")


def _load_single_file(path: Path, config: str | None, arguments: dict[str, Any]) -> Any:
    import diffusers

    info = formats.inspect(path)
    if info.kind != "base":
        raise MahlstickError(f"{path}: is a {info.kind}, not a base model; give a whole Stable Diffusion file")
    pipeline_class = getattr(
        diffusers, "StableDiffusionXLPipeline" if info.base == "sdxl" else "StableDiffusionPipeline"
    )
    try:
        return pipeline_class.from_single_file(str(path), config=config, **arguments)
    except Exception as error:  # as in _load
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if config is None and not kinds & {"SafetensorError", "UnpicklingError", "SingleFileComponentError"}:
            raise MahlstickError(
                f"{path}: its configs and tokenizer come from the hub, which did not answer; give config=FOLDER"
                " (--base-config), a diffusers folder of the same family"
            ) from error
        raise _failure(str(path), error, hub=False) from error


def unet_config(source: str) -> Mapping[str, Any] | None:
    """The UNet's config of a base in a local folder, without loading a tensor; None where only loading tells."""
    folder = embedded_folder() if source == "embedded" else Path(source).expanduser()
    path = folder / "unet" / "config.json"
    return read_json(path) if path.is_file() else None


def adapter_path(name: str) -> str:
    """``"lineart"`` or ``"embedded:lineart"`` -> the embedded adapter's path; a path or hub id stays what it is."""
    short = name.removeprefix("embedded:")
    if short == name and not _SHORT_NAME.fullmatch(name):
        return name
    known = embedded_adapters()
    if short in known:
        return str(known[short])
    if short == name and Path(name).exists():
        return name
    raise MahlstickError(
        f"{name}: neither a file or folder nor an embedded adapter (those are {', '.join(known) or 'not installed'})"
    )


class Loader:
    """Keeps what was loaded, for as long as you keep the loader: the last bases and adapters, bounded in number.

    A file that changed on disk is loaded again.
    """

    def __init__(self, bases: int = 1, adapters: int = 8) -> None:
        self._pipeline = lru_cache(maxsize=bases)(self._load_pipeline)
        self._adapter = lru_cache(maxsize=adapters)(self._load_adapter)

    def pipeline(
        self,
        source: str,
        *,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        config: str | None = None,
    ) -> Any:
        """:func:`load_pipeline` for text, kept."""
        return self._pipeline(source, device, dtype, config, _stamp(source))

    def adapter(
        self,
        source: str,
        *,
        image_encoder: str | None = None,
        dtype: torch.dtype | None = None,
        base: Any = None,
    ) -> Adapter:
        """:func:`mahlstick.load_adapter`, kept.

        A file that holds differences from ``base``, a UNet, is read each time: to keep it would keep that UNet.
        """
        if formats.inspect(source).layout == "original difference":
            return load_adapter(source, dtype=dtype, base=base)
        return self._adapter(source, image_encoder, dtype, _stamp(source))

    def forget(self) -> None:
        """Let go of all of them."""
        self._pipeline.cache_clear()
        self._adapter.cache_clear()

    @staticmethod
    def _load_pipeline(source: str, device: Any, dtype: Any, config: str | None, stamp: object) -> Any:
        return load_pipeline(source, device=device, dtype=dtype, config=config)

    @staticmethod
    def _load_adapter(source: str, image_encoder: str | None, dtype: Any, stamp: object) -> Adapter:
        config = {"image_encoder": image_encoder} if image_encoder else {}
        return load_adapter(source, dtype=dtype, **config)


def _stamp(source: str) -> tuple[tuple[str, int, int], ...]:
    path = Path(source).expanduser()
    found = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in found)
