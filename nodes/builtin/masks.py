"""Nodes for masks: made, converted, grown, feathered, combined. Names and behaviour are ComfyUI's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mahlstick.errors import MahlstickError
from mahlstick.nodes.builtin.images import MAX_SIDE, ShownSide, Side, preview
from mahlstick.nodes.files import PngText, Prompt
from mahlstick.nodes.resample import overlap, paired, ramp
from mahlstick.nodes.schema import Returned, Widget, node
from mahlstick.nodes.values import ImageT, MaskT


@node("image/mask", display_name="Convert Mask to Image")
def MaskToImage(*, mask: MaskT) -> ImageT:
    """Grey pictures, white where the mask is 1."""
    return _grey(mask)


@node("image/mask", display_name="Convert Image to Mask")
def ImageToMask(*, image: ImageT, channel: Literal["red", "green", "blue", "alpha"]) -> MaskT:
    """One channel of the pictures as a mask."""
    index = ("red", "green", "blue", "alpha").index(channel)
    if index >= image.shape[-1]:
        raise MahlstickError(f"the pictures have no channel {channel}; choose red, green or blue.")
    return image[..., index]


@node("image/mask", display_name="Convert Image Color to Mask")
def ImageColorToMask(*, image: ImageT, color: Annotated[int, Widget(min=0, max=0xFFFFFF, step=1)] = 0) -> MaskT:
    """1 where the pictures have a colour, given as 0xRRGGBB."""
    levels = (image[..., :3].clamp(0, 1) * 255).round().int()
    wanted = torch.tensor([color >> 16 & 255, color >> 8 & 255, color & 255], dtype=torch.int32)
    return (levels == wanted).all(dim=-1).float()


@node("image/mask", display_name="Create Solid Mask")
def SolidMask(
    *,
    value: Annotated[float, Widget(min=0.0, max=1.0, step=0.01)] = 1.0,
    width: ShownSide = 512,
    height: ShownSide = 512,
) -> MaskT:
    """A mask of one value."""
    return torch.full((1, height, width), value)


@node("image/mask", display_name="Invert Mask")
def InvertMask(*, mask: MaskT) -> MaskT:
    """1 - mask."""
    return 1.0 - mask


@node("image/mask", display_name="Crop Mask")
def CropMask(*, mask: MaskT, x: Side = 0, y: Side = 0, width: ShownSide = 512, height: ShownSide = 512) -> MaskT:
    """The part of the mask that begins at (x, y); at its edge it is smaller."""
    return _batch(mask)[:, y : y + height, x : x + width]


@node("image/mask", display_name="Combine Masks")
def MaskComposite(
    *,
    destination: MaskT,
    source: MaskT,
    x: Side = 0,
    y: Side = 0,
    operation: Literal["multiply", "add", "subtract", "and", "or", "xor"],
) -> MaskT:
    """Combines the source, laid at (x, y), with the destination there. ``and``, ``or`` and ``xor`` round first."""
    below, above = paired(_batch(destination), _batch(source))
    below = below.clone()
    here, there = overlap(below, above, x, y)
    below[here] = _OPERATIONS[operation](below[here], above[there]).to(below)
    return below.clamp(0, 1)


_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multiply": torch.mul,
    "add": torch.add,
    "subtract": torch.sub,
    "and": lambda below, above: below.round().logical_and(above.round()),
    "or": lambda below, above: below.round().logical_or(above.round()),
    "xor": lambda below, above: below.round().logical_xor(above.round()),
}


@node("image/mask", display_name="Feather Mask")
def FeatherMask(*, mask: MaskT, left: Side = 0, top: Side = 0, right: Side = 0, bottom: Side = 0) -> MaskT:
    """Lets the mask fade towards its edges, in a straight line over so many pixels."""
    height, width = mask.shape[-2:]
    down = ramp(height, min(top, height), min(bottom, height))
    across = ramp(width, min(left, width), min(right, width))
    return _batch(mask) * down[:, None] * across


@node("image/mask", display_name="Grow Mask")
def GrowMask(
    *,
    mask: MaskT,
    expand: Annotated[int, Widget(min=-MAX_SIDE, max=MAX_SIDE, step=1)] = 0,
    tapered_corners: bool = True,
) -> MaskT:
    """Grows the mask by so many pixels, or shrinks it by a negative number.

    With tapered corners a point grows to a diamond, otherwise to a square (grey dilation and erosion).
    """
    sign = -1.0 if expand < 0 else 1.0
    grown = sign * _batch(mask)[:, None]
    for _ in range(min(abs(expand), sum(mask.shape[-2:]))):  # further than that nothing changes any more
        down, across = F.max_pool2d(grown, (3, 1), 1, (1, 0)), F.max_pool2d(grown, (1, 3), 1, (0, 1))
        grown = torch.maximum(down, across) if tapered_corners else F.max_pool2d(down, (1, 3), 1, (0, 1))
    return sign * grown[:, 0]


@node("image/mask", display_name="Threshold Mask")
def ThresholdMask(*, mask: MaskT, value: Annotated[float, Widget(min=0.0, max=1.0, step=0.01)] = 0.5) -> MaskT:
    """1 where the mask is above the value, otherwise 0."""
    return (mask > value).float()


@node("image/mask", display_name="Preview Mask", is_output=True, outputs=("mask",))
def MaskPreview(*, mask: MaskT, prompt: Prompt = None, extra_pnginfo: PngText = None) -> MaskT | Returned:
    """Shows the mask as grey pictures; they are kept in the temporary folder."""
    return Returned((mask,), ui=preview(_grey(mask), prompt, extra_pnginfo))


def _grey(mask: Tensor) -> Tensor:
    return _batch(mask)[..., None].expand(-1, -1, -1, 3)


def _batch(mask: Tensor) -> Tensor:
    """``(batch, height, width)``, also of a single ``(height, width)``."""
    return mask.reshape(-1, *mask.shape[-2:])
