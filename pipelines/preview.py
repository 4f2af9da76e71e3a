"""Latents as a small picture at next to no cost: how a run looks before it is done.

An autoencoder's latents are nearly a linear picture of the colours. The matrix differs from family to family; it is
fitted by least squares on one picture that the autoencoder encodes.
"""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIDE = 32  # latents along one side of the picture that is encoded: 1024 equations

_FITTED: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()


def preview(latents: Tensor, autoencoder: Any) -> Image.Image:
    """The first of ``latents`` ``(batch, channels, h, w)`` as a picture of ``w × h`` pixels.

    ``latents`` are as the autoencoder gives them, without its scaling factor. The first call for an autoencoder fits
    its matrix, which takes one encoding of a small picture.
    """
    if autoencoder not in _FITTED:
        _FITTED[autoencoder] = fit(autoencoder)
    colours = _FITTED[autoencoder]
    first = latents[0].detach().to("cpu", torch.float32)
    rgb = torch.einsum("chw,cr->hwr", first, colours[:-1]) + colours[-1]
    return Image.fromarray((rgb.clamp(0, 1) * 255).round().byte().numpy())


@torch.no_grad()
def fit(autoencoder: Any) -> Tensor:
    """The matrix ``(channels + 1, 3)`` from latents, and a constant, to colours in [0, 1]."""
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, SIDE // 4, SIDE // 4, generator=generator)
    picture = F.interpolate(coarse * 2 - 0.5, size=(SIDE * factor, SIDE * factor), mode="bicubic").clamp(0, 1)
    kept = autoencoder.dtype
    try:
        torch.nn.Module.to(autoencoder, torch.float32)  # in halves SDXL's overflows; diffusers' own `to` warns
        latents = autoencoder.encode((picture * 2 - 1).to(autoencoder.device)).latent_dist.mode()[0].flatten(1).T.cpu()
    finally:
        torch.nn.Module.to(autoencoder, kept)
    wanted = F.interpolate(picture, size=(SIDE, SIDE), mode="area")[0].flatten(1).T
    known = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
    return cast(Tensor, torch.linalg.lstsq(known, wanted).solution)
