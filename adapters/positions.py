"""Where a frame stands in time, and a patch of it in time, height and width: tables that are added, and rotations of
queries and keys; their extension to more frames than were trained; and which frames of a long clip are looked at."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mahlstick.errors import MahlstickError

Positions = Literal["sinusoidal", "learned", "rotary"]
Extension = Literal["none", "interpolate", "ntk", "repeat"]
BASE = 10_000.0


def sinusoidal(places: Tensor, dim: int, base: float = BASE) -> Tensor:
    """Places (…,) → (…, dim): sin(p / base^(2i/dim)) at 2i and cos of the same at 2i + 1 (1706.03762, 3.5)."""
    angles = places[..., None].float() * _frequencies(dim, base).to(places.device)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :dim]


def _frequencies(dim: int, base: float) -> Tensor:
    """1 / base^(2i/dim), (⌈dim/2⌉,)."""
    return torch.exp(torch.arange(0, dim, 2).float() * (-math.log(base) / dim))


def extend(table: Tensor, frames: int, how: Extension = "none") -> Tensor:
    """A table (1, L, dim) for ``frames`` frames: (1, frames, dim). Up to L frames it is the table's beginning.

    - ``interpolate``: the L places are spread over the frames, linearly between neighbours (2306.15595, for tables).
    - ``ntk``: for sinusoidal tables, of a base so much higher that the slowest wave turns as far over the frames as it
      did over L, while the fastest stays as it was (the NTK-aware scaling of rotary positions, 2309.00071, eq. 14).
    - ``repeat``: from the beginning again after L frames.

    Raises ``MahlstickError`` for more frames and ``none``.
    """
    length, dim = table.shape[1], table.shape[2]
    if frames <= length:
        return table[:, :frames]
    if how == "interpolate":
        return F.interpolate(table.float().mT, size=frames, mode="linear", align_corners=True).mT.to(table.dtype)
    if how == "ntk":
        base = ntk_base(dim, (frames - 1) / (length - 1)) if length > 1 else BASE
        return sinusoidal(torch.arange(frames, device=table.device), dim, base)[None].to(table.dtype)
    if how == "repeat":
        return table.repeat(1, -(-frames // length), 1)[:, :frames]
    raise too_many(frames, length)


def too_many(frames: int, length: int) -> MahlstickError:
    """What to say of more frames than a table has places."""
    return MahlstickError(
        f"{frames} frames are more than the {length} that this motion module was trained on: ask for at most {length}, "
        "or give extend='interpolate'."
    )


def ntk_base(dim: int, ratio: float) -> float:
    """b′ = b · ratio^(dim / (dim − 2)): the base that slows the slowest wave by ``ratio`` and the fastest not."""
    return float(BASE * ratio ** (dim / (dim - 2))) if dim > 2 else BASE


def rotate(x: Tensor, places: Tensor, base: float = BASE) -> Tensor:
    """Rotary positions (2104.09864, eq. 34): x (…, L, d) with even d, each pair (x₂ᵢ, x₂ᵢ₊₁) turned by place · θᵢ,
    θᵢ = base^(−2i/d). Products of turned queries and keys depend on the difference of their places alone."""
    angles = places.float()[..., None] * _frequencies(x.shape[-1], base).to(x.device)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def rotate_2d(x: Tensor, places: Tensor, base: float = BASE) -> Tensor:
    """Rotary positions in height and width: x (…, L, d) with d a multiple of 4, places (L, 2).

    Half of the channels turn by the row and half by the column, with all frequencies each: those of Qwen2-VL's vision
    tower (2409.12191, 2.1).

    Raises ``MahlstickError`` for another d.
    """
    if x.shape[-1] % 4:
        raise MahlstickError(f"rotary positions in two axes need a multiple of 4 channels; got {x.shape[-1]}.")
    parts = zip(x.chunk(2, dim=-1), places.unbind(-1), strict=True)
    return torch.cat([rotate(part, at, base) for part, at in parts], dim=-1)


def rotate_3d(x: Tensor, places: Tensor, base: float = BASE) -> Tensor:
    """Rotary positions in time, height and width: x (…, L, d) with even d of at least 6, places (L, 3).

    Each coordinate turns a part of the channels of its own, with all frequencies of `rotate`: time the first, height
    and width behind it ⌊d/6⌋ pairs each, and time what is left. Qwen2-VL (2409.12191, 2.1) takes rotary positions
    apart like this, but deals out one set of frequencies, 16, 24 and 24 pairs of it; parts of equal width with
    frequencies of their own are Wan's (2503.20314, in its published code). Raises ``MahlstickError`` for another d.
    """
    space = x.shape[-1] // 6 * 2
    if not space or x.shape[-1] % 2:
        raise MahlstickError(f"rotary positions in three axes need an even width of at least 6; got {x.shape[-1]}.")
    parts = x.split([x.shape[-1] - 2 * space, space, space], dim=-1)
    return torch.cat([rotate(part, at, base) for part, at in zip(parts, places.unbind(-1), strict=True)], dim=-1)


def places_2d(height: int, width: int) -> Tensor:
    """Row and column of every patch of a picture, row by row: (height · width, 2)."""
    return torch.cartesian_prod(torch.arange(height), torch.arange(width))


def sincos_2d(places: Tensor, dim: int) -> Tensor:
    """Rows and columns (…, 2), which need not be whole, → (…, dim): `sinusoidal` of the row and of the column, half of
    the channels each (2111.06377, A.1)."""
    half = dim // 4 * 2
    rows, columns = places.unbind(-1)
    return torch.cat([sinusoidal(rows, dim - half), sinusoidal(columns, half)], dim=-1)


def places_3d(frames: int, height: int, width: int) -> Tensor:
    """Time, height and width of every patch of a clip, row by row and frame by frame: (frames · height · width, 3)."""
    return torch.cartesian_prod(*(torch.arange(count) for count in (frames, height, width)))


def sincos_3d(frames: int, height: int, width: int, dim: int, class_token: bool = True) -> Tensor:
    """A sine-cosine table of time, height and width, (1 + frames · height · width, dim): what a learned table begins as
    (2111.06377, A.1, in two axes; InternVideo2, 2403.15377, in three).

    The channels are `sinusoidal` of time, of height and of width, in this order. Height and width have three eighths
    each (rounded down to even) and time the rest, a quarter, as in InternVideo2's published code. First stands the
    class token, which is nowhere: zero. Raises ``MahlstickError`` for fewer than 6 channels or an empty clip.
    """
    space = dim * 3 // 16 * 2
    if not space or min(frames, height, width) < 1:
        raise MahlstickError(
            "positions in time, height and width need at least 6 channels, one frame and one patch; "
            f"got {dim} channels and {frames} frames of {height} x {width} patches."
        )
    axes = zip(places_3d(frames, height, width).unbind(-1), (dim - 2 * space, space, space), strict=True)
    table = torch.cat([sinusoidal(at, part) for at, part in axes], dim=-1)
    return torch.cat([table.new_zeros(1, dim), table]) if class_token else table


def extend_3d(table: Tensor, length: int, frames: int) -> Tensor:
    """A table (1, 1 + length · space, dim) with a class token in front for ``frames`` frames.

    The class token's row stays. The others are interpolated along time alone, see `extend`: up to ``length`` frames
    they are the table's beginning.
    """
    by_frame = table[:, 1:].unflatten(1, (length, -1))
    extended = extend(by_frame.flatten(2), frames, "interpolate").unflatten(2, by_frame.shape[2:])
    return torch.cat([table[:, :1], extended.flatten(1, 2)], dim=1)


def sample_sparsely(count: int, frames: int) -> list[int]:
    """Which ``frames`` of a clip of ``count`` frames are looked at: the middle one of each of as many equal segments
    (the segments of Temporal Segment Networks, 1608.00859, 3.1). A shorter clip repeats frames.

    Where the middle lies between two frames, it is the later one. Raises ``MahlstickError`` for an empty clip.
    """
    if count < 1 or frames < 1:
        raise MahlstickError(f"{frames} frames cannot be taken of a clip of {count}: both must be at least 1.")
    return [(2 * i + 1) * count // (2 * frames) for i in range(frames)]
