"""ComfyUI's ``folder_paths`` for node packs, over :mod:`mahlstick.nodes.folders`.

Packs may add kinds of models of their own. Those that mahlstick knows lie where its folders say.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders
from mahlstick.nodes.files import check_file, chosen_file, new_files

supported_pt_extensions = {".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"}

#: The kinds that packs added: their folders, and the endings of their files.
folder_names_and_paths: dict[str, tuple[list[str], set[str]]] = {}


def __getattr__(name: str) -> Any:
    if name == "models_dir":
        return str(folders.current().models)
    if name == "base_path":
        return str(folders.current().models.parent)
    raise AttributeError(f"mahlstick's folder_paths has no {name!r}")


def get_input_directory() -> str:
    return str(folders.current().input)


def get_output_directory() -> str:
    return str(folders.current().output)


def get_temp_directory() -> str:
    return str(folders.current().temp)


def get_directory_by_type(type_name: str) -> str | None:
    return str(getattr(folders.current(), type_name)) if type_name in ("input", "output", "temp") else None


def add_model_folder_path(folder_name: str, full_folder_path: str, is_default: bool = False) -> None:
    paths, _ = folder_names_and_paths.setdefault(folder_name, ([], supported_pt_extensions))
    if full_folder_path not in paths:
        paths.insert(0 if is_default else len(paths), full_folder_path)


def get_folder_paths(folder_name: str) -> list[str]:
    if folder_name in folders.KINDS:
        return [str(folders.current().models / each) for each in folders.KINDS[folder_name]]
    return list(_added(folder_name)[0])


def get_filename_list(folder_name: str) -> list[str]:
    if folder_name in folders.KINDS:
        return folders.listed(folder_name)
    paths, endings = _added(folder_name)
    files = [
        (path, Path(root) / name)
        for path in paths
        for root, _, names in os.walk(path, followlinks=True)
        for name in names
    ]
    return sorted(
        {str(file.relative_to(path)) for path, file in files if not endings or file.suffix.lower() in endings}
    )


def get_full_path(folder_name: str, filename: str) -> str | None:
    found = [Path(path) / filename for path in get_folder_paths(folder_name)]
    return next((str(path) for path in found if path.exists()), None)


def get_full_path_or_raise(folder_name: str, filename: str) -> str:
    path = get_full_path(folder_name, filename)
    if path is None:
        raise FileNotFoundError(f"{filename}: no such file in {', '.join(get_folder_paths(folder_name))}")
    return path


def get_annotated_filepath(name: str) -> str:
    """The file that a workflow names, as in ``fox.png`` or ``fox.png [output]``."""
    return str(chosen_file(name))


def exists_annotated_filepath(name: str) -> bool:
    return check_file(name) is True


def get_save_image_path(
    filename_prefix: str, output_dir: str, image_width: int = 0, image_height: int = 0
) -> tuple[str, str, int, str, str]:
    """Where to write the next picture: folder, name and number, the folder below ``output_dir``, and the prefix."""
    (path,) = new_files(Path(output_dir), filename_prefix, "", size_wh=(image_width, image_height))
    path.parent.mkdir(parents=True, exist_ok=True)
    name, number = path.name.removesuffix("_").rsplit("_", 1)
    below = os.path.relpath(path.parent, Path(output_dir).expanduser().resolve())
    return str(path.parent), name, int(number), "" if below == "." else below, filename_prefix


def _added(kind: str) -> tuple[list[str], set[str]]:
    if kind not in folder_names_and_paths:
        raise MahlstickError(f"{kind}: no such kind of model; there are {', '.join(folders.KINDS)}.")
    return folder_names_and_paths[kind]
