"""Load an adapter of whichever kind a file holds."""

from __future__ import annotations

import os
from typing import Any

from mahlstick.adapters.base import Adapter
from mahlstick.adapters.controlnet import ControlNet
from mahlstick.adapters.formats import inspect
from mahlstick.adapters.ip_adapter import IPAdapter
from mahlstick.adapters.motion import MotionAdapter
from mahlstick.adapters.sparse_control import SparseControlNet
from mahlstick.errors import MahlstickError

_CLASSES: dict[str, type[Adapter]] = {
    "controlnet": ControlNet,
    "sparse_controlnet": SparseControlNet,
    "ip_adapter": IPAdapter,
    "motion_adapter": MotionAdapter,
}


def load_adapter(path: str | os.PathLike[str], **config: Any) -> Adapter:
    """Load a file, folder or hub id as the adapter that its keys make it.

    ``config`` goes to that class's ``from_pretrained``. Raises MahlstickError if it is no adapter.
    """
    info = inspect(path)
    if info.kind not in _CLASSES:
        raise MahlstickError(f"{path} is {info.note}.")
    return _CLASSES[info.kind].from_pretrained(path, **config)
