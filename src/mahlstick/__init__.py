"""mahlstick: ControlNet and IP-Adapter as units that clip onto any Stable Diffusion pipeline.

The public names load on first use, so that ``import mahlstick`` stays free of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mahlstick.errors import MahlstickError

if TYPE_CHECKING:
    from mahlstick.adapters.base import Adapter as Adapter
    from mahlstick.adapters.base import Attachment as Attachment
    from mahlstick.adapters.controlnet import ControlNet as ControlNet
    from mahlstick.adapters.formats import inspect as inspect
    from mahlstick.adapters.ip_adapter import IPAdapter as IPAdapter
    from mahlstick.adapters.load import load_adapter as load_adapter
    from mahlstick.adapters.motion import MotionAdapter as MotionAdapter
    from mahlstick.adapters.receptive import receptive_fields as receptive_fields
    from mahlstick.pipelines.animate import Animation as Animation
    from mahlstick.pipelines.animate import animate as animate
    from mahlstick.pipelines.attach import attach as attach
    from mahlstick.pipelines.compare import Comparison as Comparison
    from mahlstick.pipelines.compare import compare as compare
    from mahlstick.pipelines.generate import Result as Result
    from mahlstick.pipelines.generate import generate as generate
    from mahlstick.pipelines.generate import replay as replay
    from mahlstick.pipelines.library import Library as Library
    from mahlstick.pipelines.load import load_pipeline as load_pipeline
    from mahlstick.pipelines.request import Request as Request
    from mahlstick.pipelines.request import VideoRequest as VideoRequest
    from mahlstick.pipelines.units import Control as Control
    from mahlstick.pipelines.units import ImagePrompt as ImagePrompt
    from mahlstick.pipelines.units import Motion as Motion
    from mahlstick.pipelines.units import PromptTravel as PromptTravel

__version__ = "0.1.0"

_HOMES = {
    "ControlNet": "adapters.controlnet",
    "IPAdapter": "adapters.ip_adapter",
    "MotionAdapter": "adapters.motion",
    "Adapter": "adapters.base",
    "Attachment": "adapters.base",
    "load_adapter": "adapters.load",
    "inspect": "adapters.formats",
    "receptive_fields": "adapters.receptive",
    "Control": "pipelines.units",
    "ImagePrompt": "pipelines.units",
    "Motion": "pipelines.units",
    "PromptTravel": "pipelines.units",
    "attach": "pipelines.attach",
    "Library": "pipelines.library",
    "load_pipeline": "pipelines.load",
    "Request": "pipelines.request",
    "Result": "pipelines.generate",
    "generate": "pipelines.generate",
    "VideoRequest": "pipelines.request",
    "Animation": "pipelines.animate",
    "animate": "pipelines.animate",
    "Comparison": "pipelines.compare",
    "compare": "pipelines.compare",
    "replay": "pipelines.generate",
}

__all__ = ["MahlstickError", "__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'mahlstick' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mahlstick.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
