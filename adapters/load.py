"""Load an adapter of whichever kind a file holds."""

from __future__ import annotations

import os
from typing import Any

import torch

from mahlstick.adapters.base import Adapter
from mahlstick.adapters.controlnet import ControlNet
from mahlstick.adapters.formats import inspect, read
from mahlstick.adapters.ip_adapter import IPAdapter
from mahlstick.adapters.motion import MotionAdapter
from mahlstick.adapters.qformer import ImageText
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


def load_qformer(path: str | os.PathLike[str], **config: Any) -> ImageText:
    """Load a Q-Former with the heads that its file has: one of ``mahlstick train qformer``, or the Q-Former inside a
    BLIP-2 or InstructBLIP of transformers. ``config`` is what a file cannot tell (``heads=``).

    Raises MahlstickError for anything else.
    """
    settings, state = read(path, "qformer", **config)
    with torch.device("meta"):
        net = ImageText(settings)
    net.load_state_dict(state, strict=True, assign=True)
    return net.eval().requires_grad_(True)
