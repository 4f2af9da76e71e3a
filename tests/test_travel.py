"""Prompts that change over a clip."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mahlstick as ms
from benchmarks import tiny
from mahlstick.adapters.travel import between

FRAMES = 7


def pipeline(family: str) -> Any:
    kind = {"sd1": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}[family]
    return tiny.quiet(kind(**tiny.components(family)))


def made(pipe: Any, prompt: Any, *units: Any, **more: Any) -> Tensor:
    latents = torch.randn(FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {"num_inference_steps": 1, "guidance_scale": 5.0, "output_type": "latent", "height": 64, "width": 64}
    with ms.attach(pipe, *units):
        images: Tensor = pipe(prompt, num_images_per_prompt=FRAMES, latents=latents, **call | more).images
    return images


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_at_its_frame_a_prompt_is_the_text(family: str, guidance: float) -> None:
    pipe = pipeline(family)
    travel = ms.PromptTravel({1: "fox", 5: "owl"})
    found = made(pipe, "anything", travel, guidance_scale=guidance)
    fox, owl = (made(pipe, text, guidance_scale=guidance) for text in ("fox", "owl"))
    for frames, wanted in (([0, 1], fox), ([5, 6], owl)):
        assert torch.allclose(found[frames], wanted[frames], atol=1e-5)
    for wanted in (fox, owl):
        assert (found[3] - wanted[3]).abs().max() > 1e-4, "between them it is neither"


def test_a_control_and_windows_see_the_frames_own_text() -> None:
    pipe = pipeline("sd1")
    net = ms.ControlNet.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 6, 6, 8))
    net.load_state_dict(tiny.controlnet("sd1").state_dict())
    control = ms.Control(net, tiny.picture())
    found = made(pipe, "anything", control, ms.PromptTravel({0: "fox", 3: "owl"}))
    assert torch.allclose(found[3:], made(pipe, "owl", control)[3:], atol=1e-5)
    motion = ms.Motion(tiny.motion_adapter(pipe.unet), context=4, overlap=2)
    same = made(pipe, "fox", motion, control, ms.PromptTravel({0: "fox"}))
    assert torch.allclose(same, made(pipe, "fox", motion, control), atol=1e-5)
    before = made(pipe, "fox", ms.PromptTravel({0: "fox", 6: "owl"}), motion, control)
    after = made(pipe, "fox", motion, control, ms.PromptTravel({0: "fox", 6: "owl"}))
    assert torch.allclose(before, after, atol=1e-6), "the order of units does not matter"


def test_long_prompts_go_with_short_ones() -> None:
    """Words beyond the encoder's window make longer text; the shorter is repeated, which attention does not notice."""
    pipe = pipeline("sd1")
    long = "a fox and an owl and a bear " * 12
    found = made(pipe, "anything", ms.PromptTravel({0: long, 5: long}), negative_prompt=None)
    assert found.isfinite().all()
    short = made(pipe, "anything", ms.PromptTravel({0: "fox"}))
    assert (found - short).abs().max() > 1e-4


def test_behind_a_motion_module_with_one_row_of_text() -> None:
    """Attached before it or after, on SDXL too, with arguments by position, and after a call that failed."""
    unet = pipeline("sdxl").unet
    pipe, inputs = pipeline("sdxl"), tiny.unet_inputs("sdxl", batch=FRAMES)
    one = {name: value[:1] for name, value in inputs["added_cond_kwargs"].items()}
    text = inputs["encoder_hidden_states"][:1]
    motion, travel = ms.Motion(tiny.motion_adapter(unet), context=4), ms.PromptTravel({0: "fox", 5: "owl"})
    found = []
    for units in ((motion, travel), (travel, motion)):
        with torch.no_grad(), ms.attach(pipe, *units, guidance=None):
            pipe._guidance_scale = 1.0
            handle = pipe.unet.mid_block.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                pipe.unet(inputs["sample"], 401, text, added_cond_kwargs=one)
            handle.remove()
            found.append(pipe.unet(inputs["sample"], 401, text, added_cond_kwargs=one).sample)
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_weights_and_their_absence() -> None:
    pipe = pipeline("sd1")
    heavy = made(pipe, "anything", ms.PromptTravel({0: "a (fox:1.6)"}))
    plain = made(pipe, "anything", ms.PromptTravel({0: "a fox"}))
    assert (heavy - plain).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("prompts", "told"),
    [({}, "has no prompts"), ({7: "fox"}, "frame 7 must be .* the clip has 7 frames"), ({-1: "fox"}, "frame -1 must")],
)
def test_what_is_no_travel(prompts: dict[int, str], told: str) -> None:
    pipe = pipeline("sd1")
    with pytest.raises(ms.MahlstickError, match=told):
        ms.attach(pipe, ms.PromptTravel(prompts, frames=FRAMES))
    with pytest.raises(ms.MahlstickError, match="needs the text encoder"):
        ms.attach(pipe.unet, ms.PromptTravel({0: "fox"}))


@given(st.sets(st.integers(0, 50), min_size=1, max_size=6))
def test_mixtures_are_linear(keys: set[int]) -> None:
    rising = sorted(keys)
    values = torch.tensor([[float(key)] for key in rising])
    found = between(values, rising, range(60))[:, 0]
    wanted = torch.arange(60.0).clamp(rising[0], rising[-1])
    assert torch.allclose(found, wanted, atol=1e-4), "of a straight line it is the line"
