"""Drawings as RGBA, the colours not multiplied by alpha: read, tinted, moved, and turned into lines."""

from __future__ import annotations

import io
import random
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 44),
    "orange": (245, 130, 30),
    "yellow": (250, 205, 45),
    "green": (50, 165, 65),
    "blue": (40, 115, 225),
    "purple": (135, 70, 205),
    "pink": (245, 120, 175),
    "brown": (130, 80, 45),
}
GREYS = ("black", "grey", "white")


def shrink(picture: Image.Image, size: int) -> np.ndarray:
    """An RGBA picture as (size, size, 4) uint8; Pillow weighs colours by alpha, so no fringe appears."""
    return np.asarray(picture.convert("RGBA").resize((size, size), Image.Resampling.BOX, reducing_gap=None))


def rasterise(icon: dict[str, Any], width: float, height: float, size: int) -> np.ndarray:
    """An iconify icon as (size, size, 4) uint8; the drawing's ``currentColor`` is black."""
    import resvg_py

    w, h = icon.get("width", width), icon.get("height", height)
    body = icon["body"].replace("currentColor", "#000")
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {names} viewBox="0 0 {w} {h}">{body}</svg>'
    data = resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size)
    return shrink(Image.open(io.BytesIO(bytes(data))), size)


def colour_of(rgba: np.ndarray) -> str:
    """A picture's dominant colour, by vote of its opaque pixels; (H, W, 4) uint8 → one of COLOURS or GREYS."""
    hsv = cv2.cvtColor(np.ascontiguousarray(rgba[..., :3]), cv2.COLOR_RGB2HSV)[rgba[..., 3] > 127].astype(int)
    if not len(hsv):
        return "white"
    hue, saturation, value = hsv[:, 0] * 2, hsv[:, 1], hsv[:, 2]
    bins = np.select(
        [
            value < 60,
            (saturation < 45) & (value > 200),
            saturation < 45,
            ((hue < 45) | (hue >= 340)) & (value < 170) & (saturation < 200),
            (hue < 12) | (hue >= 345),
            hue < 38,
            hue < 68,
            hue < 165,
            hue < 255,
            hue < 300,
        ],
        ["black", "white", "grey", "brown", "red", "orange", "yellow", "green", "blue", "purple"],
        default="pink",
    )
    names, votes = np.unique(bins, return_counts=True)
    return str(names[votes.argmax()])


def on_white(rgba: Tensor) -> Tensor:
    """(B, 4, H, W) uint8 → (B, 3, H, W) float in [−1, 1], composed over white."""
    x = rgba.float() / 255
    rgb, alpha = x[:, :3], x[:, 3:]
    return (rgb * alpha + 1 - alpha) * 2 - 1


def recolour(rgba: Tensor, colour: str) -> Tensor:
    """The same pictures in one colour: lightness kept (compressed), hue replaced. (B, 4, H, W) uint8 → the same.

    This is what lets words such as "red" combine with any concept: the colour never comes with the drawing's own hue.
    """
    rgb = rgba[:, :3].float() / 255
    target = torch.tensor(COLOURS[colour]).float().view(1, 3, 1, 1) / 255
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    lightness = 0.12 + 0.62 * (rgb * weights).sum(1, keepdim=True)
    dark = target * (2 * lightness).clamp(max=1)
    tinted = dark + (1 - target) * (2 * lightness - 1).clamp(min=0)
    mixed = (0.88 * tinted + 0.12 * rgb).clamp(0, 1) * 255
    return torch.cat([mixed.round().to(torch.uint8), rgba[:, 3:]], 1)


def warp(rgba: Tensor, rng: random.Random, mirror: bool = True) -> Tensor:
    """One picture (4, H, W) uint8 under a random turn, scale and shift, half of the time mirrored, where that is
    allowed: a drawing not seen before."""
    size = rgba.shape[-1]
    angle, scale = rng.uniform(-18, 18), rng.uniform(0.72, 1.05)
    stretch = rng.uniform(0.85, 1.15)
    matrix = cv2.getRotationMatrix2D((size / 2 - 0.5, size / 2 - 0.5), angle, scale)
    matrix[:, 0] *= stretch
    shift = 5 * size / 64
    matrix[:, 2] += [(1 - stretch) * size / 2 + rng.uniform(-shift, shift), rng.uniform(-shift, shift)]
    x = rgba.permute(1, 2, 0).numpy().astype(np.float32)
    x[..., :3] *= x[..., 3:] / 255
    x = cv2.warpAffine(x, matrix, (size, size), flags=cv2.INTER_AREA)
    x[..., :3] *= 255 / np.maximum(x[..., 3:], 1)
    out = torch.from_numpy(x.clip(0, 255).round().astype(np.uint8)).permute(2, 0, 1)
    return out.flip(-1) if rng.random() < 0.5 and mirror else out


def edges(rgb: np.ndarray, low: int = 60, high: int = 140) -> np.ndarray:
    """Canny edges, white on black: (H, W, 3) uint8 → (H, W) uint8 of 0 and 255, lines one pixel wide."""
    return cv2.Canny(np.ascontiguousarray(rgb), low, high, L2gradient=True)


def to_uint8(x: Tensor) -> np.ndarray:
    """One picture (3, H, W) in [−1, 1] → (H, W, 3) uint8."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def line_art(rgba: Tensor, rng: random.Random | None = None) -> Tensor:
    """White lines on black for one picture: (4, H, W) uint8 → (3, H, W) float in [0, 1].

    Without ``rng`` the plain, reproducible drawing: Canny edges of the picture and of its contour. With ``rng`` what a
    user may bring instead: other thresholds, contours alone, thicker, softer, broken or faint lines.
    """
    rgb = to_uint8(on_white(rgba[None])[0])
    contour = cv2.Canny(np.ascontiguousarray(rgba[3].numpy()), 100, 200)
    if rng is None:
        lines = np.maximum(edges(rgb), contour)
        return torch.from_numpy(lines).float().div(255).expand(3, -1, -1)
    low = rng.randint(25, 110)
    lines = contour if rng.random() < 0.1 else np.maximum(edges(rgb, low, low * 2 + 20), contour)
    if rng.random() < 0.35:
        lines = cv2.dilate(lines, np.ones((rng.choice((2, 2, 3, 4)),) * 2, np.uint8))
    x = lines.astype(np.float32) / 255
    if rng.random() < 0.15:  # broken lines
        hole = cv2.resize(
            np.random.RandomState(rng.randrange(2**31)).rand(8, 8), lines.shape[::-1], interpolation=cv2.INTER_LINEAR
        )
        x = x * (hole > 0.3)
    if rng.random() < 0.4:
        x = cv2.GaussianBlur(x, (0, 0), rng.uniform(0.35, 0.8))
        x = x / max(float(x.max()), 1e-3)
    return torch.from_numpy(np.clip(x * rng.uniform(0.8, 1.1), 0, 1).astype(np.float32)).expand(3, -1, -1)
