"""Checkpoint files: names, shapes and dtypes first, tensors only when asked for, writes that are whole or absent."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mahlstick.errors import MahlstickError

METADATA_KEY = "mahlstick"
DIFFUSERS_STEM = "diffusion_pytorch_model"

SUFFIXES = (".safetensors", ".bin", ".pth", ".ckpt", ".pt")
# The names that diffusers and accelerate give to the weights of a folder.
_FOLDER_STEMS = (DIFFUSERS_STEM, "model", "pytorch_model")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(/[^/]+)*")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its header is read, its tensors are not.

    ``tensors`` hold name, shape and dtype on PyTorch's meta device; ``metadata`` is the safetensors header's;
    ``config`` is the folder's config.json.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any] | None

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors on the CPU in their stored dtype; raises MahlstickError for NaN or infinite weights."""
        wanted = set(names)
        loaded: dict[str, Tensor] = {}
        for file in self.files:
            loaded |= _load_safetensors(file, wanted) if _is_safetensors(file) else _load_pickle(file, wanted)
        for name, value in loaded.items():
            if not _finite(value):
                raise MahlstickError(
                    f"{self.path} holds NaN or infinite weights in {name!r}: it is broken, get another copy of it."
                )
        return loaded


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the header of a file, a folder or a hub id (``owner/name`` or ``owner/name/path/of/file``).

    Raises MahlstickError if nothing is there or it is not a whole checkpoint.
    """
    found = _locate(path)
    folder = found if found.is_dir() else found.parent
    files = tuple(_files_of(found)) if found.is_dir() else (found,)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        header, notes = _read_header(file)
        tensors |= header
        metadata |= notes
    # A file's neighbouring config.json describes it only if the folder as a whole would be read as this file.
    own_folder = found.is_dir() or _choose(os.listdir(folder)) == [found.name]
    return Checkpoint(Path(path), files, tensors, metadata, _read_config(folder) if own_folder else None)


def _locate(path: str | os.PathLike[str]) -> Path:
    local = Path(path).expanduser()
    if local.exists():
        return local
    name = os.fspath(path)
    is_id = _HUB_ID.fullmatch(name) and not (name.count("/") == 1 and name.endswith(SUFFIXES))
    if not is_id:
        raise MahlstickError(f"{name} does not exist: give a checkpoint file, its folder or a hub id (owner/name).")
    return _download(name)


def _download(name: str) -> Path:
    """Fetch a file, or the config and weights of a folder, of a repository on the hub; from the cache when offline."""
    from huggingface_hub import HfApi, snapshot_download

    owner, repository, *inside = name.split("/", 2)
    repo_id, inner = f"{owner}/{repository}", "".join(inside)
    try:
        try:
            listing = [file.rfilename for file in HfApi().model_info(repo_id, timeout=10).siblings or ()]
        except Exception:
            cached = Path(snapshot_download(repo_id, local_files_only=True), inner)
            if not cached.exists():
                raise
            return cached
        return _fetch(repo_id, inner, listing)
    except MahlstickError:
        raise
    except Exception as error:  # The hub client's errors differ between its versions (requests, httpx).
        raise MahlstickError(
            f"{name} is neither a file nor a folder here, and the hub did not give it ({type(error).__name__}): "
            "check the spelling, or download it and give its path."
        ) from error


def _fetch(repo_id: str, inner: str, listing: list[str]) -> Path:
    from huggingface_hub import hf_hub_download

    if inner in listing:
        return Path(hf_hub_download(repo_id, inner))
    prefix = f"{inner}/" if inner else ""
    names = [file.removeprefix(prefix) for file in listing if file.startswith(prefix)]
    chosen = _choose(names)
    if len(chosen) != 1:
        held = _some(chosen) if chosen else "no weights"
        raise MahlstickError(f"{repo_id}/{inner} on the hub holds {held}: give {repo_id}/ and the path of one file.")
    weights = Path(hf_hub_download(repo_id, prefix + chosen[0]))
    beside = ["config.json"] if "config.json" in names else []
    for file in beside + (_shards(weights) if _is_index(chosen[0]) else []):
        hf_hub_download(repo_id, prefix + file)
    return weights.parent if _is_index(chosen[0]) else weights


def _choose(names: Iterable[str]) -> list[str]:
    """The one weight file, or shard index, to read among a folder's names; none or several if that is unclear.

    Shard index before file, safetensors before pickle, the plain name before variants such as fp16.
    """
    top = [name for name in names if "/" not in name]
    found = [name for name in top if _is_index(name) or (name.endswith(SUFFIXES) and not _is_shard(name))]
    stems = sorted({name.split(".")[0] for name in found})
    usual = [stem for stem in _FOLDER_STEMS if stem in stems]
    stem = (usual or stems)[0] if usual or len(stems) == 1 else None
    if stem is None:
        return sorted(found)
    return sorted((name for name in found if name.split(".")[0] == stem), key=_preference)[:1]


def _preference(name: str) -> tuple[bool, bool, bool]:
    parts = name.split(".")[1:]
    variant = any(f".{part}" not in SUFFIXES and part not in ("index", "json") for part in parts)
    return "safetensors" not in parts, variant, not _is_index(name)


def _is_index(name: str) -> bool:
    return ".index." in name and name.endswith(".json")


def _is_shard(name: str) -> bool:
    return re.search(r"-\d{5}-of-\d{5}", name) is not None


def _files_of(folder: Path) -> list[Path]:
    chosen = _choose(os.listdir(folder))
    if len(chosen) > 1:
        raise MahlstickError(f"{folder} holds several checkpoints ({_some(chosen)}): give the path of one of them.")
    if not chosen:
        below = sorted(sub.name for sub in folder.iterdir() if sub.is_dir() and _choose(os.listdir(sub)))
        way_out = f"give one of its subfolders ({_some(below)})" if below else f"looked for {', '.join(SUFFIXES)}"
        raise MahlstickError(f"{folder} is a folder without weights: {way_out}.")
    if not _is_index(chosen[0]):
        return [folder / chosen[0]]
    shards = [folder / name for name in _shards(folder / chosen[0])]
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise MahlstickError(f"{folder / chosen[0]} names weights that are not there ({_some(absent)}): get them too.")
    return shards


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MahlstickError(f"{index} is not an index of weights: get the folder again.") from error
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise MahlstickError(f"{index} names weights outside its own folder: it was refused.")
    return names


def _read_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MahlstickError(f"{path} is not valid JSON: get the folder again, or remove that file.") from error
    return config if isinstance(config, dict) else None


def _read_header(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    _refuse_what_is_no_checkpoint(file)
    if not _is_safetensors(file):
        return _flatten(file, _unpickle(file, "meta")), {}
    try:
        with safe_open(file, framework="pt") as handle:
            names = list(handle.keys())
            return {name: _meta(handle.get_slice(name)) for name in names}, handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(file) from error


def _meta(header: Any) -> Tensor:
    return torch.empty(header.get_shape(), dtype=_DTYPES.get(header.get_dtype(), torch.float32), device="meta")


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _is_safetensors(file: Path) -> bool:
    with file.open("rb") as handle:
        return handle.read(9)[8:] == b"{"


def _is_zip(file: Path) -> bool:
    with file.open("rb") as handle:
        return handle.read(4) == b"PK\x03\x04"


def _refuse_what_is_no_checkpoint(file: Path) -> None:
    try:
        with file.open("rb") as handle:
            start = handle.read(256)
    except OSError as error:
        raise MahlstickError(f"{file} cannot be read ({error.strerror}).") from error
    if not start:
        raise MahlstickError(f"{file} is empty: download it again.")
    if start.startswith(b"version https://git-lfs"):
        raise MahlstickError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` or download the file.")
    if start.lstrip().startswith(b"<") and start[8:9] != b"{":  # a header's length may begin with that byte too
        raise MahlstickError(f"{file} is a web page, not weights: download the file itself, not the page around it.")
    if start[8:9] != b"{" and start[:4] != b"PK\x03\x04" and start[:1] != b"\x80":
        raise MahlstickError(f"{file} is not a checkpoint: it is neither safetensors nor a PyTorch file.")


def _damaged(file: Path) -> MahlstickError:
    return MahlstickError(f"{file} is damaged or cut short ({file.stat().st_size:,} bytes): download it again.")


def _unpickle(file: Path, device: str) -> Any:
    try:
        if _is_zip(file) and file.suffix != ".safetensors":
            return torch.load(file, map_location=device, weights_only=True, mmap=True)
        with file.open("rb") as handle:  # Given a path, torch.load goes by its suffix.
            return torch.load(handle, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        raise MahlstickError(
            f"{file} was refused: it is a pickle that holds more than weights"
            f"{f' ({culprit[1]})' if culprit else ''} and could run code; get it as safetensors, or convert it where "
            "you trust it."
        ) from error
    except Exception as error:  # A damaged pickle can fail in any way.
        raise _damaged(file) from error


def _flatten(file: Path, value: Any) -> dict[str, Tensor]:
    """The tensors of nested dicts under dotted names, without a training checkpoint's outer ``state_dict``."""
    if isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
        value = value["state_dict"]
    flat: dict[str, Tensor] = {}

    def visit(prefix: str, node: Any) -> None:
        if isinstance(node, Tensor):
            flat[prefix] = node
        elif isinstance(node, Mapping):
            for key, child in node.items():
                visit(f"{prefix}.{key}" if prefix else str(key), child)

    visit("", value if isinstance(value, Mapping) else {})
    if not flat:
        raise MahlstickError(f"{file} holds no named tensors: it is not a checkpoint of weights.")
    return flat


def _load_safetensors(file: Path, wanted: set[str]) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys() if name in wanted}
    except (SafetensorError, OSError) as error:
        raise _damaged(file) from error


def _load_pickle(file: Path, wanted: set[str]) -> dict[str, Tensor]:
    return {name: value for name, value in _flatten(file, _unpickle(file, "cpu")).items() if name in wanted}


def _finite(value: Tensor) -> bool:
    if not value.is_floating_point() or not value.numel():
        return True
    # The extremes carry NaN along, and take no memory.
    extremes = torch.stack(torch.aminmax(value.float() if value.element_size() == 1 else value))
    return bool(torch.isfinite(extremes).all())


def _some(names: Iterable[str], limit: int = 4) -> str:
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def save_tensors(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Write a safetensors file whole or not at all, with our config in its metadata."""
    metadata = {"format": "pt", METADATA_KEY: json.dumps(config)}
    return _replace(path, lambda beside: save_file(_separate(tensors), beside, metadata=metadata))


def save_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all."""

    def write(beside: Path) -> None:
        beside.write_text(text, encoding="utf-8")

    return _replace(path, write)


def _replace(path: Path, write: Callable[[Path], None]) -> Path:
    if path.is_dir():
        raise MahlstickError(f"{path} is a folder: give the path of a file to write.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise MahlstickError(f"{path} cannot be written ({error.strerror}): choose another place.") from error
    try:
        write(scratch / path.name)
        os.replace(scratch / path.name, path)
    except (OSError, SafetensorError) as error:
        raise MahlstickError(f"{path} could not be written ({error}); nothing was changed.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def save_folder(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], class_name: str) -> Path:
    """Write diffusers' folder, config.json and weights; a new folder appears whole or not at all.

    Into a folder that exists, the two files are moved one by one, and older weights of the same name go.
    """
    if folder.exists() and not folder.is_dir():
        raise MahlstickError(f"{folder} is a file: give the path of a folder to write.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise MahlstickError(f"{folder} cannot be written ({error.strerror}): choose another place.") from error
    try:
        weights = f"{DIFFUSERS_STEM}.safetensors"
        save_tensors(scratch / "new" / weights, tensors, config)
        text = json.dumps({"_class_name": class_name, **config}, indent=2) + "\n"
        save_text(scratch / "new" / "config.json", text)
        if not folder.exists():
            os.replace(scratch / "new", folder)
            return folder
        for name in (weights, "config.json"):
            os.replace(scratch / "new" / name, folder / name)
        for old in folder.glob(f"{DIFFUSERS_STEM}*"):
            if old.name != weights:
                old.unlink()
    except OSError as error:
        raise MahlstickError(f"{folder} could not be written ({error.strerror}).") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, as safetensors needs them."""
    seen: set[int] = set()
    separate = {}
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        separate[name] = value
    return separate
