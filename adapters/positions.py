"""Where a frame stands in time: tables that are added, and rotations of queries and keys; and their extension to more
frames than were trained."""

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
