"""Nodes that load ControlNets and apply them to conditionings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from mahlstick.adapters.controlnet import ControlNet
from mahlstick.adapters.load import load_adapter
from mahlstick.adapters.sparse_control import SparseControlNet
from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders
from mahlstick.nodes.schema import Widget, node
from mahlstick.nodes.values import ConditioningT, ControlHint, ControlNetT, ImageT, ModelT, VaeT
from mahlstick.pipelines.load import adapter_path, embedded_adapters

_EMBEDDED = "embedded:"


def _names() -> list[str]:
    embedded = [name for name, path in embedded_adapters().items() if path.name.startswith("controlnet-")]
    return [*folders.listed("controlnet"), *(_EMBEDDED + name for name in embedded)]


def _path(name: str) -> Path:
    return Path(adapter_path(name)) if name.startswith(_EMBEDDED) else folders.find("controlnet", name)


def _stamp(control_net_name: str | None) -> str | None:
    return control_net_name and folders.stamp(_path(control_net_name))


NetNameT = Annotated[str, Widget(choices=_names)]
StrengthT = Annotated[float, Widget(min=0.0, max=10.0, step=0.01)]
PercentT = Annotated[float, Widget(min=0.0, max=1.0, step=0.001)]


@node("loaders", display_name="Load ControlNet Model", fingerprint=_stamp)
def ControlNetLoader(*, control_net_name: NetNameT) -> ControlNetT:
    """Loads a ControlNet in any published layout."""
    return checked(load_adapter(_path(control_net_name)))


@node("loaders", display_name="Load ControlNet Model (diff)", fingerprint=_stamp)
def DiffControlNetLoader(*, model: ModelT, control_net_name: NetNameT) -> ControlNetT:
    """Loads a ControlNet whose file may hold only the differences from the model it was made for."""
    return checked(load_adapter(_path(control_net_name), base=model.unet))


@node("conditioning/controlnet", display_name="Apply ControlNet (OLD)")
def ControlNetApply(
    *, conditioning: ConditioningT, control_net: ControlNetT, image: ImageT, strength: StrengthT = 1.0
) -> ConditioningT:
    """Lets a ControlNet follow the picture wherever this conditioning acts, and with it the negative."""
    if strength == 0:
        return conditioning
    hint = ControlHint(checked(control_net), image, strength)
    return _with_hint(conditioning, hint, shared=True)


@node("conditioning/controlnet", display_name="Apply ControlNet", outputs=("positive", "negative"))
def ControlNetApplyAdvanced(
    *,
    positive: ConditioningT,
    negative: ConditioningT,
    control_net: ControlNetT,
    image: ImageT,
    strength: StrengthT = 1.0,
    start_percent: PercentT = 0.0,
    end_percent: PercentT = 1.0,
    vae: VaeT | None = None,
) -> tuple[ConditioningT, ConditioningT]:
    """Lets a ControlNet follow the picture during a part of the sampling. The VAE is there for workflows that give
    one: nets of Stable Diffusion see the picture itself."""
    if strength == 0 or start_percent >= end_percent:
        return positive, negative
    hint = ControlHint(checked(control_net), image, strength, start_percent, end_percent)
    return _with_hint(positive, hint, shared=False), _with_hint(negative, hint, shared=False)


def _with_hint(conditioning: Sequence[tuple[Any, Mapping[str, Any]]], hint: ControlHint, shared: bool) -> list[Any]:
    return [
        [text, {**options, "control": (*options.get("control", ()), hint), "control_apply_to_uncond": shared}]
        for text, options in conditioning
    ]


def checked(control_net: Any) -> ControlNet:
    """The ControlNet itself, of the kind that acts on a conditioning. Raises ``MahlstickError`` for anything else."""
    if not isinstance(control_net, ControlNet):
        raise MahlstickError(f"control_net must be a ControlNet; got {type(control_net).__name__}.")
    if isinstance(control_net, SparseControlNet):
        raise MahlstickError("control_net is a SparseCtrl encoder; that goes into Apply SparseCtrl.")
    return control_net
