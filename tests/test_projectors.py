"""A video as an image prompt: the projector that reads a clip, its files, and its features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mahlstick as ms
from benchmarks import tiny
from mahlstick.adapters import positions
from mahlstick.adapters.projectors import Video

FRAMES, GRID = 3, 4
SIZES: dict[str, Any] = {"tokens": 5, "depth": 2, "heads": 2, "head_dim": 8, "frames": FRAMES, "grid": GRID}


def projector(**sizes: Any) -> Video:
    torch.manual_seed(3)
    return Video(tiny.WIDTH, 24, **SIZES | sizes).eval()


def adapter(unet: Any, **sizes: Any) -> ms.IPAdapter:
    torch.manual_seed(3)
    return ms.IPAdapter.from_unet(unet, "video", feature_dim=tiny.WIDTH, **SIZES | sizes)


def clip(batch: int = 1, frames: int = FRAMES, length: int = GRID**2, seed: int = 0) -> Tensor:
    return torch.randn(batch, frames, length, tiny.WIDTH, generator=torch.Generator().manual_seed(seed))


# what it computes


@torch.no_grad()
def test_a_clip_becomes_tokens_with_or_without_the_encoders_class_token() -> None:
    video, features = projector(), clip(batch=2, length=GRID**2 + 1)
    assert video(features).shape == (2, 5, 24)
    assert torch.equal(video(features), video(features[:, :, 1:]))


def test_its_positions_begin_as_the_table_of_three_axes() -> None:
    assert torch.equal(projector().positions[0], positions.sincos_3d(FRAMES, GRID, GRID, 16))


@torch.no_grad()
def test_the_order_of_frames_and_patches_shows_by_the_positions_alone() -> None:
    video, features = projector(), clip()
    mixed = features[:, [2, 0, 1]], features[:, :, torch.randperm(GRID**2)]
    for other in mixed:
        assert (video(features) - video(other)).abs().max() > 1e-3
    video.positions.zero_()
    for other in mixed:
        assert torch.allclose(video(features), video(other), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_another_number_of_frames_has_the_table_extended_along_time(frames: int) -> None:
    video, other = projector(), projector(frames=frames)
    table = positions.extend_3d(video.positions, FRAMES, frames)
    other.load_state_dict(video.state_dict() | {"positions": table})
    assert torch.equal(video(clip(frames=frames)), other(clip(frames=frames)))


def test_gradients_reach_every_parameter() -> None:
    video = projector()
    video(clip(frames=FRAMES)).square().mean().backward()
    assert not [name for name, p in video.named_parameters() if p.grad is None or not p.grad.abs().any()]
    video.zero_grad()
    video(clip(frames=2 * FRAMES)).square().mean().backward()
    assert video.positions.grad is not None and video.positions.grad.abs().sum(dim=-1).all(), "the table's every row"


# the adapter


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_on_a_unet(family: str) -> None:
    unet, inputs = tiny.unet(family), tiny.unet_inputs(family)
    ip = adapter(unet)
    assert ip.tokens(clip()).shape == (1, 5, unet.config.cross_attention_dim)
    plain, seen = unet(**inputs).sample, []
    for seed in (0, 1):
        with ms.attach(unet, ms.ImagePrompt(ip, features=clip(seed=seed))):
            seen.append(unet(**inputs).sample)
    assert (seen[0] - plain).abs().max() > 1e-4
    assert (seen[0] - seen[1]).abs().max() > 1e-6
    assert torch.equal(unet(**inputs).sample, plain)


def test_frames_of_one_clip_are_encoded() -> None:
    ip, encoder = adapter(tiny.unet("sd1")), (tiny.image_encoder(), tiny.feature_extractor())
    frames = [tiny.picture(seed) for seed in range(FRAMES)]
    found, nothing = ip.features(frames, encoder)
    assert found.shape == nothing.shape == (1, FRAMES, GRID**2 + 1, tiny.WIDTH)
    single = ms.IPAdapter.from_unet(tiny.unet("sd1"), "mlp", feature_dim=tiny.WIDTH)
    each, none = single.features(frames, encoder)
    assert torch.equal(found[0], each)
    assert torch.equal(nothing, none.expand_as(each)[None])
    assert torch.isfinite(ip.tokens(found)).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 16, tiny.WIDTH), r"\(video\) takes features of shape \(batch, frames, length, 32\); got \(1, 16, 32\)"),
        ((1, 3, 16, 7), r"\(batch, frames, length, 32\); got \(1, 3, 16, 7\)"),
        ((1, 3, 25, tiny.WIDTH), r"4 x 4 patches \(16 features, or one more with a class token\); got 25"),
    ],
)
def test_features_of_another_shape_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ms.MahlstickError, match=message):
        adapter(tiny.unet("sd1")).tokens(torch.zeros(shape))


def test_what_cannot_be_built_is_refused() -> None:
    unet = tiny.unet("sd1")
    for sizes in ({"frames": 0}, {"grid": 0}, {"heads": 1, "head_dim": 4}):
        with pytest.raises(ms.MahlstickError, match="at least 6 channels, one frame and one patch"):
            adapter(unet, **sizes)
    with pytest.raises(ms.MahlstickError, match="projector must be one of linear, resampler, mlp, video"):
        ms.IPAdapter.from_unet(unet, "movie")  # type: ignore[arg-type]


# files


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_saved_and_loaded_it_is_the_same(family: str, tmp_path: Path) -> None:
    ip = adapter(tiny.unet(family))
    file = ip.save_pretrained(tmp_path / "any name.safetensors")
    info = ms.inspect(file)
    assert (info.kind, info.config) == ("ip_adapter", ip.config)
    assert info.config["projector"] == "video"
    again = ms.load_adapter(file)
    assert isinstance(again, ms.IPAdapter) and again.config == ip.config
    assert torch.equal(again.tokens(clip(frames=5)), ip.tokens(clip(frames=5)))


def test_what_the_file_cannot_tell_is_asked_for(tmp_path: Path) -> None:
    ip = adapter(tiny.unet("sd1"))
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(ip.save_pretrained(tmp_path / "ip")), bare)  # without metadata
    config = ms.inspect(bare).config
    told = [name for name, value in ip.config.items() if config[name] == value]
    assert {*ip.config} - {*told} == {"heads", "head_dim", "frames", "grid"}
    with pytest.raises(ms.MahlstickError, match=r"heads of its video projector \(16 channels\): give heads="):
        ms.IPAdapter.from_pretrained(bare, frames=FRAMES)
    for frames in ({}, {"frames": 5}, {"frames": 0}, {"frames": "three"}):
        with pytest.raises(ms.MahlstickError, match="for how many frames its positions are: give frames="):
            ms.IPAdapter.from_pretrained(bare, heads=2, **frames)
    assert ms.IPAdapter.from_pretrained(bare, heads=2, frames=FRAMES).config == ip.config
    usual = adapter(tiny.unet("sd1"), frames=8, head_dim=64)
    save_file(load_file(usual.save_pretrained(tmp_path / "usual")), bare)
    assert ms.IPAdapter.from_pretrained(bare).config == usual.config, "what is usual goes without saying"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("image_proj.positions"), r"its projector lacks image_proj\.positions"),
        (lambda s: s.pop("image_proj.class_token"), r"1 missing \(image_proj\.class_token\)"),
        (lambda s: s.pop("image_proj.blocks.1.norm3.bias"), r"1 missing \(image_proj\.blocks\.1\.norm3\.bias\)"),
        (lambda s: s.update({"image_proj.positions": torch.zeros(49)}), "weights of too few dimensions"),
        (lambda s: s.update({"image_proj.pool.layers.1.0.norm1.bias": torch.zeros(16)}), "1 unexpected"),
    ],
)
def test_a_file_with_a_fault(change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path) -> None:
    ip = adapter(tiny.unet("sd1"))
    state = load_file(ip.save_pretrained(tmp_path / "ip"))
    change(state)
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(ms.MahlstickError, match=rf"broken\.safetensors cannot be read: .*{message}"):
        ms.IPAdapter.from_pretrained(tmp_path / "broken.safetensors", heads=2, frames=FRAMES)


def test_a_video_is_an_image_prompt() -> None:
    """Of a long clip it sees the frames in the middle of equal parts; other adapters are told to take pictures."""
    pipe = tiny.quiet(diffusers.StableDiffusionPipeline(**tiny.components("sd1")))
    ip = adapter(pipe.unet, frames=4)
    clip = [tiny.picture(seed, 32) for seed in range(20)]
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "height": 64, "width": 64}

    def made(*units: ms.ImagePrompt) -> Any:
        with ms.attach(pipe, *units):
            return pipe("fox", generator=torch.Generator().manual_seed(1), **call).images

    found = made(ms.ImagePrompt(ip, video=clip))
    assert (found == made(ms.ImagePrompt(ip, video=[clip[i] for i in positions.sample_sparsely(20, 4)]))).all()
    assert (found != made(ms.ImagePrompt(ip, video=clip[::-1]))).any()
    with pytest.raises(ms.MahlstickError, match="takes video=, every other one images="):
        ms.attach(pipe, ms.ImagePrompt(ip, clip))
    linear = ms.IPAdapter.from_unet(pipe.unet, tokens=2, feature_dim=tiny.WIDTH)
    with pytest.raises(ms.MahlstickError, match="this one's is linear"):
        ms.attach(pipe, ms.ImagePrompt(linear, video=clip))
