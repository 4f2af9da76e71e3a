"""Motion LoRA: low-rank changes of a motion module, such as a movement of the camera (2307.04725, section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

import torch
from torch import Tensor

from mahlstick.adapters import formats
from mahlstick.errors import MahlstickError


@torch.no_grad()
def merged(weights: Mapping[str, Tensor], path: str | PathLike[str], scale: float) -> dict[str, Tensor]:
    """Copies of a motion module's ``weights``, each that the motion LoRA in ``path`` changes as

    W + scale · (α / rank) · up @ down; α is the rank where the file does not tell it.

    Raises MahlstickError if the file is no motion LoRA, if a key of it applies to nothing here, or if shapes differ.
    """
    changes = formats.read_motion_lora(path)
    strange = [change.key for name, change in changes.items() if name not in weights]
    if strange:
        raise MahlstickError(
            f"{path}: {len(strange)} of its {len(changes)} changes apply to nothing in this motion module, "
            f"{strange[0]} first: use the module that it was made for."
        )
    for name, change in changes.items():
        if change.shape != weights[name].shape:
            raise MahlstickError(
                f"{path}: {change.key} changes a weight {change.shape}, and this motion module's is "
                f"{tuple(weights[name].shape)}: use the module that it was made for."
            )
    return {
        name: (weight + scale * changes[name].product().to(weight.device)).to(weight.dtype)
        if name in changes
        else weight.clone()
        for name, weight in weights.items()
    }
