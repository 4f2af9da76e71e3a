"""Motion modules on a plain 2-D UNet: clips, positions and files. Parity is with the other fidelity cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mahlstick as ms
from benchmarks import tiny
from benchmarks.fidelity import GOLDENS, golden_unet
from mahlstick.adapters import formats
from mahlstick.adapters.motion import places

FRAMES = 4


@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other() -> None:
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1", batch=2 * FRAMES)
    with ms.attach(unet, ms.Motion(tiny.motion_adapter(unet), frames=FRAMES)):
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
        with ms.attach(unet, ms.Motion(tiny.motion_adapter(unet, positions=kind))):
            found = unet(**still).sample
        assert torch.allclose(found, found[:1].expand_as(found), atol=1e-5) == constant
    inputs, order = tiny.unet_inputs("sd1", batch=FRAMES), [2, 0, 3, 1]
    inputs["encoder_hidden_states"][:] = inputs["encoder_hidden_states"][:1]
    with ms.attach(unet, ms.Motion(tiny.motion_adapter(unet, positions="rotary"))):
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


@torch.no_grad()
@pytest.mark.skipif(not GOLDENS.is_dir(), reason="the goldens of ../shared are not here")
def test_a_published_module_is_normalised_frame_by_frame() -> None:
    io, unet = load_file(GOLDENS / "anim_io.safetensors"), golden_unet()
    module = ms.MotionAdapter.from_pretrained(GOLDENS / "anim_v2.safetensors")
    with ms.attach(unet, ms.Motion(module, norm="clip")):
        found = unet(io["x"], io["timestep"], io["text"]).sample
    assert (found - io["eps_v2"]).abs().max() / io["eps_v2"].abs().max() > 1e-3, "diffusers' normalisation is another"


# files


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("mid_block", [True, False])
def test_layouts_round_trip(layout: str, mid_block: bool, tmp_path: Path) -> None:
    unet = tiny.unet("sd1")
    module = tiny.motion_adapter(unet, mid_block=mid_block)
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
    module = tiny.motion_adapter(tiny.unet("sd1"))
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
    module = tiny.motion_adapter(sd1)
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
    module = tiny.motion_adapter(tiny.unet("sd1"))
    saved = module.save_pretrained(tmp_path / "m.safetensors")
    with pytest.raises(ms.MahlstickError, match="is a motion module, not a ControlNet: load it with MotionAdapter"):
        ms.ControlNet.from_pretrained(saved)
    assert formats.inspect(saved).note == "a motion module: load it with MotionAdapter.from_pretrained"
