"""Every task with every number of controls and image prompts, with motion and without, whole and in windows.

A fresh motion module adds nothing, so that with it each combination makes the pictures that it makes without: bit for
bit where the clip is made whole, and up to rounding where windows of it meet. Each picture has a control picture and a
reference of its own, so that a window that saw another's would show.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import mahlstick as ms
from benchmarks import tiny
from mahlstick.pipelines.load import for_task

FRAMES = 4
SHALLOW: dict[str, Any] = {"layers_per_block": 1, "transformer_layers_per_block": 1}
WHOLE: dict[str, Any] = {"context": FRAMES}
WINDOWS: dict[str, Any] = {"context": 3, "overlap": 1}


@cache
def pipeline(family: str, task: Any) -> Any:
    if task != "text":
        return tiny.quiet(for_task(pipeline(family, "text"), task))
    kind = {"sd1": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}[family]
    return tiny.quiet(kind(**tiny.components(family, **SHALLOW)))


@cache
def nets(family: str) -> list[ms.ControlNet]:
    unet, found = pipeline(family, "text").unet, []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(tiny.awake(ms.ControlNet.from_unet(unet, conditioning_embedding_out_channels=(4, 6, 6, 8))))
    return found


def made(family: str, task: str, *units: Any) -> Tensor:
    pipe = pipeline(family, task)
    call: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 4.0, "output_type": "latent"}
    if task == "text":
        call |= {"height": 64, "width": 64}
    else:
        call |= {"image": tiny.picture(), "strength": 1.0}
    if task == "inpaint":
        call |= {"mask_image": tiny.half_mask(), "height": 64, "width": 64}
    with ms.attach(pipe, *units):
        images: Tensor = pipe(
            "fox", num_images_per_prompt=FRAMES, generator=torch.Generator().manual_seed(1), **call
        ).images
    return images


@pytest.mark.parametrize("references", [0, 1])
@pytest.mark.parametrize("controls", [0, 1, 2])
@pytest.mark.parametrize("task", ["text", "img2img", "inpaint"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_combination(family: str, task: str, controls: int, references: int) -> None:
    unet = pipeline(family, "text").unet
    units: list[Any] = [
        ms.Control(net, [tiny.picture(10 * i + seed) for seed in range(FRAMES)], scale=0.7, mode=mode)
        for i, (net, mode) in enumerate(zip(nets(family)[:controls], ("balanced", "control"), strict=False))
    ]
    if references:
        torch.manual_seed(4)
        ip = ms.IPAdapter.from_unet(unet, tokens=2, feature_dim=tiny.WIDTH)
        units.append(ms.ImagePrompt(ip, [tiny.picture(90 + seed, 32) for seed in range(FRAMES)], mask=tiny.half_mask()))
    fresh = ms.MotionAdapter.from_unet(unet, max_frames=8, heads=2)
    off = made(family, task, *units)
    assert torch.equal(made(family, task, ms.Motion(fresh, **WHOLE), *units), off)
    assert torch.allclose(made(family, task, *units, ms.Motion(fresh, **WINDOWS)), off, atol=1e-4)
    moved = made(family, task, *units, ms.Motion(tiny.motion_adapter(unet), **WINDOWS))
    assert moved.isfinite().all() and (moved - off).abs().max() > 1e-3
