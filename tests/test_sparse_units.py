"""SparseCtrl as a unit: what diffusers' AnimateDiffSparseControlNetPipeline makes, on the plain pipeline."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import mahlstick as ms
from benchmarks import tiny
from benchmarks.fidelity import as_clip, clip_latents, diffusers_motion, error
from tests.test_sparse_control import FRAMES, PLACES, VARIANTS, conditions, reference

CALL: dict[str, Any] = {
    "num_inference_steps": 3,
    "guidance_scale": 5.0,
    "output_type": "latent",
    "height": tiny.SIZE,
    "width": tiny.SIZE,
}


@torch.no_grad()
def certain(vae: Any) -> Any:
    """A VAE whose encoder is sure of its latents, so that diffusers, which draws them, draws their mean."""
    vae = deepcopy(vae)
    vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0, -30
    return vae


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_pipeline(variant: str, tmp_path: Path) -> None:
    pipe = tiny.quiet(diffusers.StableDiffusionPipeline(**tiny.components("sd1") | {"vae": certain(tiny.vae())}))
    module, net = tiny.motion_adapter(pipe.unet), reference(variant)
    net.save_pretrained(tmp_path / "net")
    parts = tiny.components("sd1") | {"vae": certain(tiny.vae())}
    kept = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    video = tiny.quiet(
        diffusers.AnimateDiffSparseControlNetPipeline(**kept, motion_adapter=diffusers_motion(module), controlnet=net)
    )
    pictures = [tiny.picture(seed) for seed in range(len(PLACES))]
    wanted = video(
        "fox", num_frames=FRAMES, latents=as_clip(clip_latents(FRAMES)), conditioning_frames=pictures,
        controlnet_frame_indices=PLACES, controlnet_conditioning_scale=0.7, **CALL,
    ).frames[0].transpose(0, 1)  # fmt: skip
    call = CALL | {"num_images_per_prompt": FRAMES, "latents": clip_latents(FRAMES)}
    control = ms.Control(ms.load_adapter(tmp_path / "net"), pictures, scale=0.7, at=PLACES)
    with ms.attach(pipe, ms.Motion(module)):
        without = pipe("fox", **call).images
        with ms.attach(pipe, control):
            found = pipe("fox", **call).images
    assert error(found, wanted) < 1e-4 < 1e-2 < error(without, wanted)


@torch.no_grad()
def test_clips_of_a_batch_and_windows(tmp_path: Path) -> None:
    """Every clip has the pictures, and a window sees those that stand in it."""
    reference("scribble").save_pretrained(tmp_path)
    net: Any = ms.load_adapter(tmp_path)
    unet, given = tiny.unet("sd1"), conditions("scribble")
    inputs = tiny.unet_inputs("sd1", batch=2 * FRAMES)
    with ms.attach(unet, ms.Control(net, given, at=PLACES, frames=FRAMES)):
        both = unet(**inputs).sample
    for clip in range(2):
        rows = slice(clip * FRAMES, (clip + 1) * FRAMES)
        part = {name: inputs[name][rows] for name in ("sample", "encoder_hidden_states")}
        with ms.attach(unet, ms.Control(net, given, at=PLACES)):
            alone = unet(timestep=inputs["timestep"], **part).sample
        assert torch.allclose(alone, both[rows], atol=1e-5)

    module = tiny.motion_adapter(unet)
    motion = ms.Motion(module, context=4, overlap=0)
    eight = tiny.unet_inputs("sd1", batch=8)
    with ms.attach(unet, motion, ms.Control(net, given, at=[1, 6])):
        whole = unet(**eight).sample
    for window, place in ((0, 1), (1, 2)):
        rows = slice(4 * window, 4 * window + 4)
        part = {name: eight[name][rows] for name in ("sample", "encoder_hidden_states")}
        with ms.attach(unet, ms.Motion(module), ms.Control(net, given[window : window + 1], at=[place])):
            alone = unet(timestep=eight["timestep"], **part).sample
        assert torch.allclose(alone, whole[rows], atol=1e-5)


def test_what_does_not_fit(tmp_path: Path) -> None:
    reference("rgb").save_pretrained(tmp_path)
    net: Any = ms.load_adapter(tmp_path)
    unet = tiny.unet("sd1")
    with pytest.raises(ms.MahlstickError, match="takes latents: attach to a pipeline, whose VAE makes them, or give"):
        ms.attach(unet, ms.Control(net, tiny.picture(), at=[0]))
    inputs = tiny.unet_inputs("sd1", batch=FRAMES)
    with (
        ms.attach(unet, ms.Control(net, conditions("rgb"), at=[0, 6])),
        pytest.raises(ms.MahlstickError, match="frame 6 is not in a clip of 6"),
    ):
        unet(**inputs)
    with (
        ms.attach(unet, ms.Control(net, conditions("rgb"), at=[0, 1], frames=4)),
        pytest.raises(ms.MahlstickError, match="6 pictures are no clips of 4 frames"),
    ):
        unet(**inputs)
    plain = ms.ControlNet.from_unet(unet, conditioning_embedding_out_channels=(4, 6, 6, 8))
    with pytest.raises(ms.MahlstickError, match="at= is for a SparseCtrl encoder"):
        ms.attach(unet, ms.Control(plain, tiny.picture(), at=[0]))
