"""Motion LoRA files: low-rank changes of a motion module's weights, in AnimateDiff's layout and in diffusers'."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mahlstick.adapters.formats import motion
from mahlstick.errors import MahlstickError

# The layer, and which part of its pair: to_q_lora.down.weight (AnimateDiff), to_q.lora.down.weight and
# to_q.lora_A.weight (diffusers), to_q.lora_down.weight and to_q.alpha.
_PART = re.compile(r"(.+?)(?:[._]lora)?[._](down|up|A|B|alpha)(?:\.weight)?")
_HALVES = {"A": "down", "B": "up"}
# Where diffusers' save_lora_weights puts peft's config.
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Change:
    """What is added to a weight (out, in): factor · up @ down (LoRA, arXiv 2106.09685, section 4.1).

    ``down`` is (rank, in), ``up`` (out, rank), ``factor`` α / rank; ``key`` is the name of ``down`` in the file.
    """

    key: str
    down: Tensor
    up: Tensor
    factor: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def product(self) -> Tensor:
        """The change in full, in float32."""
        return self.factor * (self.up.float() @ self.down.float())


def changes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Change]:
    """The change of each weight, by the weight's name in diffusers' MotionAdapter.

    Weights of other layers keep the file's names. Raises MahlstickError for keys that are no part of a pair and for
    halves that do not go together.
    """
    pairs: dict[str, dict[str, str]] = {}
    for key in tensors:
        found = _PART.fullmatch(motion.diffusers_name(key) or key)
        if found is None:
            raise MahlstickError(f"{key} is no part of a low-rank pair")
        layer = re.sub(r"\.to_out$", ".to_out.0", found[1].replace(".processor.", "."))
        pairs.setdefault(f"{layer}.weight", {})[_HALVES.get(found[2], found[2])] = key
    alpha = _alpha(metadata)
    return {name: _change(tensors, keys, alpha) for name, keys in pairs.items()}


def _change(tensors: Mapping[str, Tensor], keys: Mapping[str, str], alpha: float | None) -> Change:
    if "down" not in keys or "up" not in keys:
        raise MahlstickError(f"{next(iter(keys.values()))} has no other half")
    down, up = tensors[keys["down"]], tensors[keys["up"]]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise MahlstickError(
            f"{keys['down']} {tuple(down.shape)} and {keys['up']} {tuple(up.shape)} are no low-rank pair"
        )
    alpha = float(tensors[keys["alpha"]]) if "alpha" in keys else alpha
    return Change(keys["down"], down, up, 1.0 if alpha is None else alpha / down.shape[0])


def _alpha(metadata: Mapping[str, str]) -> float | None:
    """α for every layer, where peft's config is there and tells it."""
    config = json.loads(metadata.get(_METADATA, "{}"))
    for field in ("alpha_pattern", "use_rslora"):
        if config.get(f"unet.{field}"):
            raise MahlstickError(f"its config has {field}, which is not supported: save it without")
    return config.get("unet.lora_alpha")
