"""Nodes of CONDITIONING: text as a model reads it, where and when it counts.

The options that they write are ComfyUI's; the sampling reads them (`mahlstick.nodes.sampling.conditions`).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from mahlstick.errors import MahlstickError
from mahlstick.nodes.schema import Socket, Widget, node
from mahlstick.nodes.text import encode
from mahlstick.nodes.values import Clip, ClipT, ConditioningT, MaskT

_LARGEST = 16384  # pixels along one side

Text = Annotated[str, Widget(multiline=True)]
Strength = Annotated[float, Widget(min=0.0, max=10.0, step=0.01)]
Fraction = Annotated[float, Widget(min=0.0, max=1.0, step=0.01)]
Percent = Annotated[float, Widget(min=0.0, max=1.0, step=0.001)]
Size = Annotated[int, Widget(min=0, max=_LARGEST)]
Extent = Annotated[int, Widget(min=64, max=_LARGEST, step=8)]
Position = Annotated[int, Widget(min=0, max=_LARGEST, step=8)]


@node("conditioning", display_name="CLIP Text Encode (Prompt)")
def CLIPTextEncode(
    *,
    text: Annotated[str, Widget(multiline=True, tooltip="The text to be encoded.")],
    clip: Annotated[Clip, Socket("CLIP", tooltip="The CLIP model used for encoding the text.")],
) -> ConditioningT:
    """What a model reads of a text. ``(word:1.2)`` weighs a word, ``embedding:name`` is a textual inversion."""
    states, pooled = encode(clip, text)
    return [[states, {"pooled_output": pooled}]]


@node("advanced/conditioning")
def CLIPTextEncodeSDXL(
    *,
    clip: ClipT,
    width: Size = 1024,
    height: Size = 1024,
    crop_w: Size = 0,
    crop_h: Size = 0,
    target_width: Size = 1024,
    target_height: Size = 1024,
    text_g: Text,
    text_l: Text,
) -> ConditioningT:
    """A text for each of Stable Diffusion XL's two encoders, with the size and crop of the picture that it should look
    as if it came from."""
    if len(clip.encoders) != 2:
        raise MahlstickError("CLIPTextEncodeSDXL needs the two text encoders of Stable Diffusion XL: use its clip.")
    states, pooled = encode(clip, text_l, text_g)
    sizes = {"width": width, "height": height, "crop_w": crop_w, "crop_h": crop_h}
    sizes |= {"target_width": target_width, "target_height": target_height}
    return [[states, {"pooled_output": pooled, **sizes}]]


@node("conditioning", display_name="CLIP Set Last Layer")
def CLIPSetLastLayer(*, clip: ClipT, stop_at_clip_layer: Annotated[int, Widget(min=-24, max=-1, step=1)] = -1) -> ClipT:
    """Read the text from an earlier layer of the encoder (clip skip): -1 is the last."""
    return replace(clip, layer=stop_at_clip_layer)


@node("conditioning", display_name="Conditioning (Combine)")
def ConditioningCombine(*, conditioning_1: ConditioningT, conditioning_2: ConditioningT) -> ConditioningT:
    """Both count: the model is asked under each, and the answers are averaged."""
    return [*conditioning_1, *conditioning_2]


@node("conditioning", display_name="Conditioning (Concat)")
def ConditioningConcat(*, conditioning_to: ConditioningT, conditioning_from: ConditioningT) -> ConditioningT:
    """One text behind the other, as if both were one long text."""
    other, _ = _first(conditioning_from)
    return [[torch.cat([text, other], dim=1), dict(options)] for text, options in conditioning_to]


@node("conditioning", display_name="Conditioning (Average)")
def ConditioningAverage(
    *, conditioning_to: ConditioningT, conditioning_from: ConditioningT, conditioning_to_strength: Fraction = 1.0
) -> ConditioningT:
    """A mixture of two texts, token by token."""
    other, other_options = _first(conditioning_from)
    share, pooled_from = conditioning_to_strength, other_options.get("pooled_output")
    averaged = []
    for text, options in conditioning_to:
        options = dict(options)
        if pooled_from is not None:
            pooled = options.get("pooled_output")
            pooled = pooled_from if pooled is None else pooled
            options["pooled_output"] = share * pooled + (1 - share) * pooled_from
        averaged.append([share * text + (1 - share) * _as_long(other, text.shape[1]), options])
    return averaged


@node("conditioning", display_name="Conditioning (Set Area)")
def ConditioningSetArea(
    *,
    conditioning: ConditioningT,
    width: Extent = 64,
    height: Extent = 64,
    x: Position = 0,
    y: Position = 0,
    strength: Strength = 1.0,
) -> ConditioningT:
    """Let a text count in a rectangle, in pixels."""
    area = (height // 8, width // 8, y // 8, x // 8)
    return _with(conditioning, area=area, strength=strength, set_area_to_bounds=False)


@node("conditioning", display_name="Conditioning (Set Area with Percentage)")
def ConditioningSetAreaPercentage(
    *,
    conditioning: ConditioningT,
    width: Fraction = 1.0,
    height: Fraction = 1.0,
    x: Fraction = 0.0,
    y: Fraction = 0.0,
    strength: Strength = 1.0,
) -> ConditioningT:
    """Let a text count in a rectangle, in fractions of the picture."""
    area = ("percentage", height, width, y, x)
    return _with(conditioning, area=area, strength=strength, set_area_to_bounds=False)


@node("conditioning")
def ConditioningSetAreaStrength(*, conditioning: ConditioningT, strength: Strength = 1.0) -> ConditioningT:
    """How much a text counts beside others."""
    return _with(conditioning, strength=strength)


@node("conditioning", display_name="Conditioning (Set Mask)")
def ConditioningSetMask(
    *,
    conditioning: ConditioningT,
    mask: MaskT,
    strength: Strength = 1.0,
    set_cond_area: Literal["default", "mask bounds"] = "default",
) -> ConditioningT:
    """Let a text count where the mask is white; with "mask bounds" the model sees only the rectangle around it."""
    mask = mask[None] if mask.ndim == 2 else mask
    return _with(conditioning, mask=mask, set_area_to_bounds=set_cond_area == "mask bounds", mask_strength=strength)


@node("advanced/conditioning")
def ConditioningZeroOut(*, conditioning: ConditioningT) -> ConditioningT:
    """Nothing in place of a text: zeros."""
    zeroed = []
    for text, options in conditioning:
        pooled = options.get("pooled_output")
        nothing = {} if pooled is None else {"pooled_output": torch.zeros_like(pooled)}
        zeroed.append([torch.zeros_like(text), {**options, **nothing}])
    return zeroed


@node("advanced/conditioning")
def ConditioningSetTimestepRange(
    *, conditioning: ConditioningT, start: Percent = 0.0, end: Percent = 1.0
) -> ConditioningT:
    """Let a text count in a part of the sampling: 0 is the noisiest, 1 the finished picture."""
    return _with(conditioning, start_percent=start, end_percent=end)


def _with(conditioning: list[Any], **values: Any) -> list[Any]:
    """Every entry with these options, in copies of its own."""
    return [[text, {**options, **values}] for text, options in conditioning]


def _first(conditioning: list[Any]) -> tuple[Tensor, dict[str, Any]]:
    if len(conditioning) > 1:
        warnings.warn("conditioning_from has several entries, of which only the first is used", stacklevel=2)
    text, options = conditioning[0]
    return text, options


def _as_long(text: Tensor, length: int) -> Tensor:
    """``(1, n, dim)`` with ``length`` tokens: cut, or filled up with zeros."""
    missing = max(0, length - text.shape[1])
    return torch.nn.functional.pad(text[:, :length], (0, 0, 0, missing))
