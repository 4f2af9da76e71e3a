"""Tiny random Stable Diffusion pipelines and adapters, for the tests of requests, generation and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

import mahlstick as ms
from benchmarks.tiny import SIZE, WIDTH, components, quiet

SIDE = SIZE


def sd(**unet: Any) -> StableDiffusionPipeline:
    """Of the shape of Stable Diffusion 1.x, with an image encoder; ``unet`` changes the UNet's config."""
    return quiet(StableDiffusionPipeline(**components("sd1", **unet)))


def sdxl() -> StableDiffusionXLPipeline:
    """Of the shape of Stable Diffusion XL."""
    return quiet(StableDiffusionXLPipeline(**components("sdxl", "EulerDiscreteScheduler")))


def picture(width: int = SIDE, height: int = SIDE, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save_models(folder: Path) -> Path:
    """``base``, ``net``, ``ip`` and the pictures ``drawing.png`` and ``reference.png`` below ``folder``."""
    pipe = sd()
    pipe.save_pretrained(folder / "base")
    net = ms.ControlNet.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 32, 32))
    with torch.no_grad():
        for weight in net.parameters():
            weight += torch.randn_like(weight) * 0.05
    net.save_pretrained(folder / "net")
    ms.IPAdapter.from_unet(pipe.unet, tokens=2, feature_dim=WIDTH).save_pretrained(folder / "ip")
    picture(seed=1).save(folder / "drawing.png")
    picture(90, 40, seed=2).save(folder / "reference.png")
    return folder
