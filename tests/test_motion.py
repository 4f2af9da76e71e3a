"""Motion modules: what the original program and diffusers compute, on a plain 2-D UNet and its plain pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import mahlstick as ms
from benchmarks import tiny
from mahlstick.adapters import formats
from mahlstick.adapters.motion import places

GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens"
golden = pytest.mark.skipif(not GOLDENS.is_dir(), reason="the goldens of ../shared are not here")
FRAMES = 4


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def trained(unet: Any, **options: Any) -> ms.MotionAdapter:
    """A motion module away from its initial values."""
    torch.manual_seed(6)
    module = ms.MotionAdapter.from_unet(unet, max_frames=8, heads=2, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.requires_grad_(False)


# parity


@golden
@torch.no_grad()
@pytest.mark.parametrize(("frames", "output"), [(8, "eps_v2"), (4, "eps_v2_2x4")])
def test_the_original_program(frames: int, output: str) -> None:
    io = load_file(GOLDENS / "anim_io.safetensors")
    with safe_open(GOLDENS / "ipa_unet.safetensors", "pt") as file:
        unet = diffusers.UNet2DConditionModel(**json.loads(file.metadata()["config"])).eval()
    unet.load_state_dict(load_file(GOLDENS / "ipa_unet.safetensors"))
    module = ms.MotionAdapter.from_pretrained(GOLDENS / "anim_v2.safetensors")
    with ms.attach(unet, ms.Motion(module, frames=frames)):
        found = unet(io["x"], io["timestep"], io["text"]).sample
    assert relative(found, io[output]) < 1e-5
    with ms.attach(unet, ms.Motion(module, frames=frames, norm="clip")):
        other = unet(io["x"], io["timestep"], io["text"]).sample
    assert relative(other, io[output]) > 1e-3, "diffusers' normalisation is another"


def theirs(module: ms.MotionAdapter, folder: Path) -> diffusers.MotionAdapter:
    """The same weights in diffusers' class, through a saved folder."""
    return diffusers.MotionAdapter.from_pretrained(module.save_pretrained(folder)).eval()


def peer(kind: str, family: str, module: ms.MotionAdapter, folder: Path, **more: Any) -> Any:
    """diffusers' own video pipeline on the same parts."""
    parts = tiny.components(family)
    for name in ("safety_checker", "requires_safety_checker"):
        parts.pop(name, None)
    unet = parts["unet"]
    pipe = tiny.quiet(getattr(diffusers, kind)(**parts, motion_adapter=theirs(module, folder), **more))
    if family == "sdxl":  # diffusers 0.42 leaves these weights random when it copies the UNet
        pipe.unet.add_embedding.load_state_dict(unet.add_embedding.state_dict())
    return pipe


def latents(frames: int = FRAMES) -> Tensor:
    return torch.randn(frames, 4, 8, 8, generator=torch.Generator().manual_seed(3))


CALL: dict[str, Any] = {
    "num_inference_steps": 3,
    "guidance_scale": 5.0,
    "output_type": "latent",
}
SIZE = {"height": 64, "width": 64}


@pytest.mark.parametrize(("family", "kind"), [("sd1", "AnimateDiffPipeline"), ("sdxl", "AnimateDiffSDXLPipeline")])
def test_diffusers_text_to_video(family: str, kind: str, tmp_path: Path) -> None:
    pipe_class = {"sd1": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}[family]
    pipe = tiny.quiet(pipe_class(**tiny.components(family)))
    module = trained(pipe.unet)
    video = peer(kind, family, module, tmp_path)
    wanted = (
        video("fox", num_frames=FRAMES, latents=latents().transpose(0, 1)[None], **CALL, **SIZE)
        .frames[0]
        .transpose(0, 1)
    )
    plain = pipe("fox", num_images_per_prompt=FRAMES, latents=latents(), **CALL, **SIZE).images
    with ms.attach(pipe, ms.Motion(module)):
        found = pipe("fox", num_images_per_prompt=FRAMES, latents=latents(), **CALL, **SIZE).images
    assert relative(found, wanted) < 1e-4 < relative(plain, wanted)
    assert torch.equal(pipe("fox", num_images_per_prompt=FRAMES, latents=latents(), **CALL, **SIZE).images, plain)


def test_diffusers_with_a_controlnet(tmp_path: Path) -> None:
    pipe = tiny.quiet(diffusers.StableDiffusionPipeline(**tiny.components("sd1")))
    module, net = trained(pipe.unet), tiny.controlnet("sd1")
    video = peer("AnimateDiffControlNetPipeline", "sd1", module, tmp_path / "m", controlnet=net)
    frames = [tiny.picture(seed) for seed in range(FRAMES)]
    wanted = video(
        "fox", num_frames=FRAMES, latents=latents().transpose(0, 1)[None], conditioning_frames=frames,
        controlnet_conditioning_scale=0.7, **CALL, **SIZE,
    ).frames[0].transpose(0, 1)  # fmt: skip
    net.save_pretrained(tmp_path / "net")
    control = ms.Control(ms.ControlNet.from_pretrained(tmp_path / "net"), frames, scale=0.7)
    with ms.attach(pipe, ms.Motion(module), control):
        found = pipe("fox", num_images_per_prompt=FRAMES, latents=latents(), **CALL, **SIZE).images
    assert relative(found, wanted) < 1e-4


def test_diffusers_video_to_video(tmp_path: Path) -> None:
    parts = tiny.components("sd1")
    pipe = tiny.quiet(diffusers.StableDiffusionImg2ImgPipeline(**parts))
    module = trained(pipe.unet)
    video = peer("AnimateDiffVideoToVideoPipeline", "sd1", module, tmp_path)
    frames = [tiny.picture(seed) for seed in range(FRAMES)]
    call = CALL | {"strength": 0.7}
    start = latents()  # both add noise to encoded pictures, each in its own order: here both begin alike
    video.prepare_latents = lambda *args, **kwargs: start.transpose(0, 1)[None].clone()
    pipe.prepare_latents = lambda *args, **kwargs: start.clone()
    wanted = video(video=frames, prompt="fox", **call).frames[0].transpose(0, 1)
    with ms.attach(pipe, ms.Motion(module, frames=FRAMES)):
        found = pipe("fox", image=frames[0], num_images_per_prompt=FRAMES, **call).images
    assert relative(found, wanted) < 1e-4


# clips and windows


@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other() -> None:
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1", batch=2 * FRAMES)
    with ms.attach(unet, ms.Motion(trained(unet), frames=FRAMES)):
        both = unet(**inputs).sample
        for clip in range(2):
            rows = slice(clip * FRAMES, (clip + 1) * FRAMES)
            part = {"sample": inputs["sample"][rows], "encoder_hidden_states": inputs["encoder_hidden_states"][rows]}
            alone = unet(timestep=inputs["timestep"], **part).sample
            assert torch.allclose(alone, both[rows], atol=1e-5)


@torch.no_grad()
def test_rotary_positions_know_only_distances() -> None:
    """A constant clip stays constant, as it does not with a table; and frames in another order give other pictures."""
    unet = tiny.unet("sd1")
    inputs = tiny.unet_inputs("sd1", batch=1)
    still = {"sample": inputs["sample"].repeat(FRAMES, 1, 1, 1), "timestep": inputs["timestep"]}
    still["encoder_hidden_states"] = inputs["encoder_hidden_states"].repeat(FRAMES, 1, 1)
    for kind, constant in (("rotary", True), ("sinusoidal", False)):
        with ms.attach(unet, ms.Motion(trained(unet, positions=kind))):
            found = unet(**still).sample
        assert torch.allclose(found, found[:1].expand_as(found), atol=1e-5) == constant
    inputs, order = tiny.unet_inputs("sd1", batch=FRAMES), [2, 0, 3, 1]
    inputs["encoder_hidden_states"][:] = inputs["encoder_hidden_states"][:1]
    with ms.attach(unet, ms.Motion(trained(unet, positions="rotary"))):
        straight = unet(**inputs).sample
        mixed = unet(**inputs | {"sample": inputs["sample"][order]}).sample
    assert (straight[order] - mixed).abs().max() > 1e-3


def test_every_spatial_block_has_its_module() -> None:
    for family in tiny.FAMILIES:
        unet = tiny.unet(family)
        found = list(places(unet, ms.MotionAdapter.from_unet(unet, heads=2)))
        blocks = [*unet.down_blocks, *unet.up_blocks]
        assert len(found) == sum(len(block.resnets) for block in blocks) + 1
        assert len({id(place) for place, _ in found}) == len(found)


# files


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("mid_block", [True, False])
def test_layouts_round_trip(layout: str, mid_block: bool, tmp_path: Path) -> None:
    unet = tiny.unet("sd1")
    module = trained(unet, mid_block=mid_block)
    saved = module.save_pretrained(tmp_path / "module.safetensors", layout=layout)
    names = set(load_file(saved))
    assert all(("temporal_transformer" in name) == (layout == "original") for name in names)
    again = ms.load_adapter(saved)
    assert isinstance(again, ms.MotionAdapter)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in module.state_dict().items())
    assert again.config == module.config, "the metadata keep what shapes do not show"
    info = ms.inspect(saved)
    assert (info.kind, info.layout) == ("motion_adapter", layout)


def test_a_published_file_tells_heads_and_norm_by_its_layout(tmp_path: Path) -> None:
    module = trained(tiny.unet("sd1"))
    state = load_file(module.save_pretrained(tmp_path / "m.safetensors", layout="original"))
    save_file({f"module.{name}": value for name, value in state.items()}, tmp_path / "v1.safetensors")
    found = ms.MotionAdapter.from_pretrained(tmp_path / "v1.safetensors", heads=2, motion_norm_num_groups=4)
    assert found.config["norm"] == "frame" and found.config["motion_max_seq_length"] == 8
    assert found.config["motion_num_attention_heads"] == 2
    with pytest.raises(
        ms.MahlstickError, match=r"32 groups do not divide its .* channels: give motion_norm_num_groups="
    ):
        ms.MotionAdapter.from_pretrained(tmp_path / "v1.safetensors", heads=2)
    torch.save({"state_dict": state}, tmp_path / "v1.ckpt")
    again = ms.MotionAdapter.from_pretrained(tmp_path / "v1.ckpt", heads=2, motion_norm_num_groups=4)
    assert again.state_dict().keys() == module.state_dict().keys()
    second = next(name for name in state if "attention_blocks.1.pos_encoder" in name)
    state[second] = state[second] + 1
    save_file(state, tmp_path / "two.safetensors")
    with pytest.raises(ms.MahlstickError, match=r"attention_blocks\.1\.pos_encoder\.pe differs from the first"):
        ms.MotionAdapter.from_pretrained(tmp_path / "two.safetensors", heads=2, motion_norm_num_groups=4)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    sd1, sdxl = tiny.unet("sd1"), tiny.unet("sdxl")
    module = trained(sd1)
    with pytest.raises(ms.MahlstickError, match=r"this motion module was made for .* \(channels .*\), the UNet is"):
        ms.attach(sdxl, ms.Motion(module))
    inputs = tiny.unet_inputs("sd1", batch=3)
    with ms.attach(sd1, ms.Motion(module, frames=2)), pytest.raises(ms.MahlstickError, match="no clips of 2 frames"):
        sd1(**inputs)
    many = tiny.unet_inputs("sd1", batch=9)
    for extend in ("interpolate", "ntk", "repeat"):
        with torch.no_grad(), ms.attach(sd1, ms.Motion(module, extend=extend)):
            assert sd1(**many).sample.isfinite().all()
    for wrong, told in (
        ({"frames": 0}, "frames must be a whole number"),
        ({"norm": "batch"}, "norm must be one of frame, clip"),
        ({"extend": "stretch"}, "extend must be one of"),
    ):
        with pytest.raises(ms.MahlstickError, match=told):
            ms.attach(sd1, ms.Motion(module, **wrong))
    with pytest.raises(ms.MahlstickError, match="Motion takes a MotionAdapter; got ControlNet"):
        ms.attach(sd1, ms.Motion(ms.ControlNet.from_unet(sd1, conditioning_embedding_out_channels=(4, 6, 6, 8))))
    three = torch.ones(3, 1, 8, 8)
    four = tiny.unet_inputs("sd1", batch=4)
    with (
        ms.attach(sd1, ms.Motion(module, mask=three)),
        pytest.raises(ms.MahlstickError, match="3 masks for 4 pictures"),
    ):
        sd1(**four)
    learned = ms.MotionAdapter.from_unet(sd1, heads=2, positions="learned")
    with pytest.raises(ms.MahlstickError, match="is for sinusoidal positions"):
        ms.attach(sd1, ms.Motion(learned, extend="ntk"))
    for heads in (0, (2, 3)):
        with pytest.raises(ms.MahlstickError, match="no whole number of at least 1: give heads="):
            ms.MotionAdapter.from_unet(sd1, heads=heads)
    with pytest.raises(ms.MahlstickError, match="5 heads do not divide"):
        ms.MotionAdapter.from_unet(sd1, heads=5)
    with pytest.raises(ms.MahlstickError, match="positions must be one of"):
        ms.MotionAdapter.from_unet(sd1, positions="alibi")


def test_kinds_know_the_motion_module(tmp_path: Path) -> None:
    module = trained(tiny.unet("sd1"))
    saved = module.save_pretrained(tmp_path / "m.safetensors")
    with pytest.raises(ms.MahlstickError, match="is a motion module, not a ControlNet: load it with MotionAdapter"):
        ms.ControlNet.from_pretrained(saved)
    assert formats.inspect(saved).note == "a motion module: load it with MotionAdapter.from_pretrained"
