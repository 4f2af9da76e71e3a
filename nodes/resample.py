"""Pictures, masks and latents as grids: to and from PIL, resampled, and laid over one another.

Grids are ``(batch, channels, height, width)`` here, whatever they hold. The behaviour is ComfyUI's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import EllipsisType

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mahlstick.errors import MahlstickError

#: An area of a grid, as its index.
Area = tuple[EllipsisType, slice, slice]


def to_picture(pixels: Tensor) -> Image.Image:
    """A PIL picture of ``(height, width)`` or ``(height, width, 3 or 4)`` in [0, 1]; fractions of a level are cut off.

    Cut off as ComfyUI does, so that a saved picture has its bytes; what came from 8 bits goes back unchanged.
    """
    levels = np.clip(255.0 * pixels.detach().cpu().float().numpy(), 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(levels))


def from_picture(picture: Image.Image) -> Tensor:
    """``(height, width)`` or ``(height, width, channels)``, float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255.0)


def resample(grid: Tensor, width: int, height: int, method: str, crop: str = "disabled") -> Tensor:
    """The grid at ``width`` x ``height``.

    ``crop`` "center" keeps the aspect and cuts what overhangs evenly; "disabled" stretches. ``method`` is one of
    torch's, "bislerp" or "lanczos", which goes through 8 bits and takes 1, 3 or 4 channels.
    """
    if width < 1 or height < 1:
        raise MahlstickError(f"nothing can be scaled to {width}x{height}; give a width and height of at least 1.")
    if crop == "center":
        grid = _of_aspect(grid, width / height)
    if method == "bislerp":
        return bislerp(grid, width, height)
    if method == "lanczos":
        return _lanczos(grid, width, height)
    return F.interpolate(grid, size=(height, width), mode=method)


def bislerp(grid: Tensor, width: int, height: int) -> Tensor:
    """Bilinear resampling that turns the vectors of channels on the sphere and mixes their lengths separately.

    Averages of latents are too short, and decode to grey; those on the sphere (Shoemake's slerp, 1985) are not.
    """
    across = _slerped(grid.float(), width, dim=3)
    return _slerped(across, height, dim=2).to(grid.dtype)


def not_empty(batch: Tensor) -> Tensor:
    """The batch. Raises ``MahlstickError`` where it has no items."""
    if not len(batch):
        raise MahlstickError("the batch is empty; give at least one picture, mask or latent.")
    return batch


def repeat_to(batch: Tensor, count: int) -> Tensor:
    """The batch with ``count`` items: cut, or started over."""
    times = math.ceil(count / len(not_empty(batch)))
    return batch.repeat(times, *[1] * (batch.ndim - 1))[:count] if times > 1 else batch[:count]


def paired(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both with as many items as the longer one has; the other is started over."""
    count = max(len(first), len(second))
    return repeat_to(first, count), repeat_to(second, count)


def resized_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """A MASK as ``(batch, 1, height, width)`` of the size (height, width)."""
    return F.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]), size=tuple(size), mode="bilinear")


def ramp(length: int, start: int, end: int) -> Tensor:
    """``(length,)`` weights that rise from 1/start to 1 over the first ``start``, and fall so over the last ``end``."""
    counted = torch.arange(1, length + 1, dtype=torch.float32)
    rising = (counted / max(start, 1)).clamp(max=1)
    return rising * (counted / max(end, 1)).clamp(max=1).flip(0)


def overlap(below: Tensor, above: Tensor, left: int, top: int) -> tuple[Area, Area]:
    """Where two grids meet when ``above`` lies at ``(left, top)`` on ``below``: the same area as an index of each."""

    def along(position: int, length: int, room: int) -> tuple[slice, slice]:
        first, last = max(0, position), max(0, min(room, position + length))
        first = min(first, last)
        return slice(first, last), slice(first - position, last - position)

    rows = along(top, above.shape[-2], below.shape[-2])
    columns = along(left, above.shape[-1], below.shape[-1])
    return (..., rows[0], columns[0]), (..., rows[1], columns[1])


def composite(below: Tensor, above: Tensor, left: int, top: int, weight: Tensor | None = None) -> Tensor:
    """``above`` laid on ``below`` at ``(left, top)``, as far as ``weight`` says; what overhangs is cut.

    ``weight`` has the height and width of ``above``; without it, ``above`` covers. ``above`` has as many items as
    ``below``, or is started over.
    """
    above = repeat_to(above, len(below))
    here, there = overlap(below, above, left, top)
    laid = below.clone()
    share = 1.0 if weight is None else repeat_to(weight, len(below))[there]
    laid[here] = share * above[there] + (1.0 - share) * below[here]
    return laid


def _of_aspect(grid: Tensor, aspect: float) -> Tensor:
    """The middle of the grid with the aspect, up to whole columns or rows, of which one stays."""
    height, width = grid.shape[-2:]
    narrower = aspect / (width / height)
    beside = min(max(0, round((width - width * narrower) / 2)), (width - 1) // 2)
    above = min(max(0, round((height - height / narrower) / 2)), (height - 1) // 2)
    return grid[..., above : height - above, beside : width - beside]


def _lanczos(grid: Tensor, width: int, height: int) -> Tensor:
    pictures = [to_picture(item.movedim(0, -1).squeeze(-1)) for item in grid]
    scaled = [from_picture(each.resize((width, height), Image.Resampling.LANCZOS)) for each in pictures]
    return torch.stack(scaled).reshape(len(grid), height, width, -1).movedim(-1, 1).to(grid)


def _slerped(grid: Tensor, length: int, dim: int) -> Tensor:
    """The grid with ``length`` places along ``dim``, each between its two neighbours of before."""
    before = grid.shape[dim]
    centre = (torch.arange(length, dtype=torch.float64, device=grid.device) + 0.5) * before / length - 0.5
    position = centre.clamp(0, before - 1)
    first = position.long()
    second = (first + 1).clamp(max=before - 1)
    shape = [1] * grid.ndim
    shape[dim] = length
    share = (position - first).to(grid.dtype).reshape(shape)
    return _slerp(grid.index_select(dim, first), grid.index_select(dim, second), share)


def _slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """From a to b by ``share``, vectors along dim 1; a where both point the same way, a mean where opposite ways."""
    length_a, length_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    unit_a, unit_b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    cosine = (unit_a * unit_b).sum(dim=1, keepdim=True)
    angle = cosine.clamp(-1, 1).acos()
    turned = (((1 - share) * angle).sin() * unit_a + (share * angle).sin() * unit_b) / angle.sin()
    between = turned * (length_a * (1 - share) + length_b * share)
    parallel = 1e-5
    between = torch.where(cosine > 1 - parallel, a, between)
    return torch.where(cosine < parallel - 1, a * (1 - share) + b * share, between)
