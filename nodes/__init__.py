"""Workflows: ComfyUI's graphs on diffusers, as JSON, as Python, as a server.

Every node is here under its ComfyUI name and may be called from Python: ``nodes.EmptyLatentImage(width=512)`` returns
its outputs as a tuple. Names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Workflow": "comfy.script",
    "run": "runner",
    "saved": "runner",
    "serve": "server",
    "sigmas": "sampling.schedules",
    "sample": "sampling.samplers",
    "model_from_unet": "sampling.models",
    "model_from_pipeline": "sampling.models",
    "Folders": "folders",
    "node": "schema",
    "all_nodes": "builtin",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"mahlstick.nodes.{_HOMES[name]}"), name)
    if name[0].isupper():
        found = import_module("mahlstick.nodes.builtin").all_nodes().get(name)
        if found is not None:
            return found
    raise AttributeError(f"module 'mahlstick.nodes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*_HOMES, *import_module("mahlstick.nodes.builtin").all_nodes()})
