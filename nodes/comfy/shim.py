"""What third-party node packs import of ComfyUI, as far as mahlstick has it.

The modules stand in ``sys.modules`` only within :func:`installed`, that is while a pack is loaded or one of its nodes
is at work: names such as ``nodes`` and ``comfy`` belong to others too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from threading import Lock
from types import ModuleType
from typing import Any

from mahlstick.nodes import progress
from mahlstick.nodes.comfy import folder_paths, graph_utils

#: The first names of ComfyUI's own modules, whether or not they are here.
COMFY = {
    *("comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview"),
    *("node_helpers", "nodes", "server"),
}


@contextmanager
def installed() -> Iterator[None]:
    """Within the block ComfyUI's modules can be imported, by everyone in this process."""
    _shelf.enter()
    try:
        yield
    finally:
        _shelf.leave()


class _Shelf:
    """The modules while somebody needs them, counted: nodes may run side by side."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0
        self._others: dict[str, ModuleType] = {}

    def enter(self) -> None:
        with self._lock:
            if not self._users:
                self._others = {name: sys.modules[name] for name in modules() if name in sys.modules}
                sys.modules.update(modules())
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                for name in modules():
                    del sys.modules[name]
                sys.modules.update(self._others)


_shelf = _Shelf()


@cache
def modules() -> dict[str, ModuleType]:
    """ComfyUI's modules by name."""
    nodes = _module("nodes", MAX_RESOLUTION=16384, NODE_CLASS_MAPPINGS={}, NODE_DISPLAY_NAME_MAPPINGS={})
    utils = _module("comfy.utils", ProgressBar=ProgressBar, common_upscale=common_upscale)
    management = _module(
        "comfy.model_management",
        InterruptProcessingException=progress.Interrupted,
        get_torch_device=get_torch_device,
        intermediate_device=get_torch_device,
        soft_empty_cache=soft_empty_cache,
        throw_exception_if_processing_interrupted=throw_exception_if_processing_interrupted,
    )
    return {
        "folder_paths": folder_paths,
        "nodes": nodes,
        "comfy": _module("comfy", __path__=[], utils=utils, model_management=management),
        "comfy.utils": utils,
        "comfy.model_management": management,
        "comfy_execution": _module("comfy_execution", __path__=[], graph=graph_utils, graph_utils=graph_utils),
        "comfy_execution.graph": graph_utils,
        "comfy_execution.graph_utils": graph_utils,
    }


class ProgressBar:
    """How a node tells of its progress."""

    def __init__(self, total: int, node_id: str | None = None) -> None:
        self.total, self.current = total, 0

    def update(self, value: int) -> None:
        self.update_absolute(self.current + value)

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        """``preview`` is a PIL picture, or ComfyUI's tuple of format, picture and size."""
        self.total = self.total if total is None else total
        self.current = min(value, self.total)
        _last.set((self.current, self.total))
        progress.report(self.current, self.total, preview[1] if isinstance(preview, tuple) else preview)


_last: ContextVar[tuple[int, int]] = ContextVar("last", default=(0, 1))


def throw_exception_if_processing_interrupted() -> None:
    """Raises where the run was stopped. Progress is how that is asked for, so it is told again."""
    progress.report(*_last.get())


def common_upscale(samples: Any, width: int, height: int, upscale_method: str, crop: str) -> Any:
    """``(batch, channels, height, width)`` at another size."""
    from mahlstick.nodes.resample import resample

    return resample(samples, width, height, upscale_method, crop)


def get_torch_device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def soft_empty_cache(force: bool = False) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module
