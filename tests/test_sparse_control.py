"""SparseCtrl: what diffusers' SparseControlNetModel computes, in both layouts and with both kinds of condition."""

from __future__ import annotations

import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SparseControlNetModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import mahlstick as ms
from benchmarks import tiny
from benchmarks.fidelity import error
from mahlstick.adapters import formats
from mahlstick.adapters.formats import sparse_control
from mahlstick.adapters.sparse_control import SparseControlNet

FRAMES, PLACES = 6, [0, 4]
TINY: dict[str, Any] = {
    "block_out_channels": (8, 16, 16, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": tiny.WIDTH,
    "conditioning_embedding_out_channels": (4, 6, 6, 8),
    "motion_max_seq_length": 8,
    "motion_num_attention_heads": 2,
}
VARIANTS = {
    "scribble": {"conditioning_channels": 3, "use_simplified_condition_embedding": False},
    "rgb": {"conditioning_channels": 4, "use_simplified_condition_embedding": True},
}


@cache
def reference(variant: str, **changes: Any) -> SparseControlNetModel:
    """diffusers' own net with random weights where a fresh one has zeros."""
    torch.manual_seed(5)
    return tiny.awake(SparseControlNetModel(**TINY | VARIANTS[variant] | changes))


def conditions(variant: str, n: int = len(PLACES)) -> Tensor:
    torch.manual_seed(7)
    return torch.randn(n, 4, 8, 8) if variant == "rgb" else torch.rand(n, 3, 64, 64)


def original(net: SparseControlNetModel) -> dict[str, Tensor]:
    """AnimateDiff's names, by the table of diffusers' conversion script, read backwards."""
    table = {".attn1.": ".attention_blocks.0.", ".pos_embed.": ".attention_blocks.0.pos_encoder.",
             ".norm1.": ".norms.0.", ".norm3.": ".ff_norm."}  # fmt: skip
    renamed = {}
    for name, value in net.state_dict().items():
        place, here, inside = name.partition(".motion_modules.")
        if here:
            number, _, inside = inside.partition(".")
            for theirs, old in table.items():
                inside = inside.replace(theirs, old)
            name = f"{place}.motion_modules.{number}.temporal_transformer.{inside}"
        renamed[name] = value
    return renamed


def assert_equal(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(dict(found.state_dict()), dict(wanted.state_dict()), rtol=0, atol=0)


def wanted_from(net: SparseControlNetModel, variant: str, clips: int, text: Tensor) -> list[Tensor]:
    """diffusers' residuals, whose clips are (clip, channels, frames, h, w)."""
    given = conditions(variant).to(net.dtype)
    whole = given.new_zeros(1, given.shape[1], FRAMES, *given.shape[2:])
    mask = torch.zeros_like(whole[:, :1])
    whole[:, :, PLACES], mask[:, :, PLACES] = given.transpose(0, 1)[None], 1
    noise = torch.randn(clips, 4, FRAMES, 8, 8, dtype=net.dtype)
    down, mid = net(noise, torch.tensor(401), text, whole, conditioning_mask=mask, return_dict=False)
    return [*down, mid]


def found_from(net: Any, variant: str, clips: int, text: Tensor) -> list[Tensor]:
    hint = net.encode_hint(conditions(variant), PLACES, FRAMES).repeat(clips, 1, 1, 1)
    noise = torch.randn(clips * FRAMES, 4, 8, 8, dtype=net.dtype)
    down, mid = net.residuals(noise, torch.tensor(401), text, hint, frames=FRAMES)
    return [*down, mid]


def text(clips: int) -> Tensor:
    torch.manual_seed(9)
    return torch.randn(clips, 7, tiny.WIDTH).repeat_interleave(FRAMES, dim=0)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("clips", [1, 2])
def test_diffusers_computes_the_same(variant: str, clips: int, tmp_path: Path) -> None:
    theirs = reference(variant)
    theirs.save_pretrained(tmp_path)
    net: Any = ms.load_adapter(tmp_path)
    assert isinstance(net, SparseControlNet) and isinstance(net, ms.ControlNet)
    assert net.takes_latents == (variant == "rgb") and net.hint_factor == (1 if variant == "rgb" else 8)
    found, wanted = found_from(net, variant, clips, text(clips)), wanted_from(theirs, variant, clips, text(clips))
    assert len(found) == len(wanted) == 13
    assert max(map(error, found, wanted)) < 1e-5


@torch.no_grad()
def test_heads_and_depths_of_levels(tmp_path: Path) -> None:
    """What diffusers lets every level have of its own, and its options for the condition."""
    theirs = reference(
        "scribble",
        motion_num_attention_heads=(1, 2, 4, 8),
        temporal_transformer_layers_per_block=(2, 1, 1, 1),
        transformer_layers_per_block=(1, 2, 1, 1),
        controlnet_conditioning_channel_order="bgr",
    )
    theirs.save_pretrained(tmp_path)
    net, words = ms.load_adapter(tmp_path).double(), text(1).double()
    found, wanted = found_from(net, "scribble", 1, words), wanted_from(theirs.double(), "scribble", 1, words)
    assert max(map(error, found, wanted)) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "prefix"), [("rgb", ""), ("scribble", "module."), ("scribble", "controlnet.module.")]
)
def test_the_published_layout(variant: str, prefix: str, tmp_path: Path) -> None:
    theirs = reference(variant)
    state = {f"{prefix}{name}": value for name, value in original(theirs).items()}
    torch.save(state, tmp_path / "sparsectrl.ckpt")
    info = ms.inspect(tmp_path / "sparsectrl.ckpt")
    assert (info.kind, info.layout) == ("sparse_controlnet", "original")
    told = {"heads": 2, "motion_num_attention_heads": 2, "norm_num_groups": 4}
    net: Any = ms.load_adapter(tmp_path / "sparsectrl.ckpt", **told)
    assert net.config["norm"] == "frame", "as it was trained"
    assert_equal(net, theirs)
    clip: Any = ms.load_adapter(tmp_path / "sparsectrl.ckpt", norm="clip", **told)
    wanted = wanted_from(theirs, variant, 1, text(1))
    found, other = (found_from(each, variant, 1, text(1)) for each in (clip, net))
    assert max(map(error, found, wanted)) < 1e-5 < 1e-3 < max(map(error, other, wanted))


@pytest.mark.parametrize(("variant", "layout"), [("rgb", "diffusers"), ("scribble", "original")])
def test_what_is_written_is_read_again(variant: str, layout: str, tmp_path: Path) -> None:
    reference(variant).save_pretrained(tmp_path / "theirs")
    net: Any = ms.load_adapter(tmp_path / "theirs", norm="frame")
    again: Any = ms.load_adapter(net.save_pretrained(tmp_path / "net.safetensors", layout=layout))
    assert json.loads(json.dumps(again.config)) == json.loads(json.dumps(net.config))
    assert_equal(again, net)
    if layout == "original":
        assert load_file(tmp_path / "net.safetensors").keys() == original(reference(variant)).keys()
    else:
        folder = net.save_pretrained(tmp_path / "folder")
        peer = SparseControlNetModel.from_pretrained(folder).state_dict()
        assert peer.keys() == net.state_dict().keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_config_from_shapes_is_the_published_one(variant: str) -> None:
    with torch.device("meta"):
        net = SparseControlNetModel(**VARIANTS[variant])
    found = sparse_control.config_of(net.state_dict(), {})
    known = inspect.signature(SparseControlNetModel.__init__).parameters
    assert sorted(found) == sorted({*known, "norm"} - {"self"})
    plain = {name: value for name, value in net.config.items() if not name.startswith("_")}
    assert json.loads(json.dumps(found | {"norm": None})) == json.loads(json.dumps(plain | {"norm": None}))


@torch.no_grad()
def test_the_noise_does_not_count_and_frames_without_a_picture_do(tmp_path: Path) -> None:
    reference("scribble").save_pretrained(tmp_path)
    net: Any = ms.load_adapter(tmp_path)
    given = conditions("scribble")
    hint = net.encode_hint(given, [0, -2], FRAMES)
    assert torch.equal(hint, net.encode_hint(given.flip(0), [4, 0], FRAMES)), "the frame counts, not the order"
    black = net.encode_hint(torch.cat([given, torch.zeros_like(given[:1])]), [0, 4, 1], FRAMES)
    assert torch.equal(black[2], hint[2]) and not torch.equal(black[1], hint[1]), "a black picture is one"
    one, two = (net.residuals(torch.randn(FRAMES, 4, 8, 8), 3, text(1), hint)[1] for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, net.residuals(torch.zeros(FRAMES, 4, 8, 8), 3, text(1), black)[1])
    every = conditions("scribble", FRAMES)
    mid = net(torch.zeros(FRAMES, 4, 8, 8), 3, text(1), every)[1]
    assert torch.equal(mid, net.residuals(torch.zeros(FRAMES, 4, 8, 8), 3, text(1), net.encode_hint(every))[1])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    reference("scribble").save_pretrained(tmp_path / "scribble")
    reference("rgb").save_pretrained(tmp_path / "rgb")
    net: Any = ms.load_adapter(tmp_path / "scribble")
    given = conditions("scribble")
    for places, told in (
        ([0], r"2 control pictures cannot stand at 1 frames: give a frame for each"),
        ([0, 6], r"frame 6 is not in a clip of 6: the first is 0, the last 5 or -1"),
        ([0, -7], r"frame -7 is not in a clip of 6"),
        ([5, -1], r"two control pictures stand at one frame of 6 \(5, -1\)"),
    ):
        with pytest.raises(ms.MahlstickError, match=told):
            net.encode_hint(given, places, FRAMES)
    with pytest.raises(ms.MahlstickError, match=r"takes control pictures \(n, 3, H, W\); got \(2, 4, 8, 8\)"):
        net.encode_hint(conditions("rgb"), PLACES, FRAMES)
    latents: Any = ms.load_adapter(tmp_path / "rgb")
    with pytest.raises(ms.MahlstickError, match=r"takes latents \(n, 4, H, W\); got \(2, 3, 64, 64\)"):
        latents.encode_hint(given, PLACES, FRAMES)
    hint = net.encode_hint(given, PLACES, 9)
    with pytest.raises(ms.MahlstickError, match=r"9 frames are more than the 8 .*: make the clip in windows"):
        net.residuals(torch.zeros(9, 4, 8, 8), 3, text(2)[:9], hint)
    with pytest.raises(ms.MahlstickError, match="is a SparseCtrl encoder, not a ControlNet: load it with load_adapter"):
        ms.ControlNet.from_pretrained(tmp_path / "rgb")
    with pytest.raises(ms.MahlstickError, match="is not made from a UNet"):
        SparseControlNet.from_unet(tiny.unet("sd1"))
    with pytest.raises(ms.MahlstickError, match=r"this SparseCtrl encoder was made for .*, the UNet is SDXL"):
        formats.require_fit("sparse_controlnet", net.config, tiny.unet("sdxl").config)
    formats.require_fit("sparse_controlnet", net.config, tiny.unet("sd1").config)
    with pytest.raises(ms.MahlstickError, match=r"3 heads of the motion modules do not divide its .* channels: give"):
        ms.load_adapter(tmp_path / "rgb", motion_num_attention_heads=3)
    state = load_file(tmp_path / "rgb" / "diffusion_pytorch_model.safetensors")
    state.pop("down_blocks.1.motion_modules.1.proj_out.weight")
    save_file(state, tmp_path / "rgb" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ms.MahlstickError, match=r"1 missing \(down_blocks\.1\.motion_modules\.1\.proj_out\.weight\)"):
        ms.load_adapter(tmp_path / "rgb")
