"""From a request to a clip in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import mahlstick as ms
from benchmarks import tiny
from mahlstick.pipelines.load import Loader
from mahlstick.pipelines.video import VideoWriter, read_video, video_comment, video_info
from tests.test_sparse_control import reference

STEPS = 2
FAST: dict[str, Any] = {"steps": STEPS, "seed": 3, "guidance": 4.0, "width": 64, "height": 64}


def pipeline(family: str = "sd1") -> Any:
    kind = {"sd1": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}[family]
    return tiny.quiet(kind(**tiny.components(family)))


def made(request: ms.VideoRequest, out: Path, pipe: Any, **more: Any) -> tuple[ms.Animation, list[Image.Image]]:
    animation = ms.animate(request, out, pipe=pipe, progress=False, **more)
    with read_video(animation.path) as frames:
        return animation, list(frames)


def pixels(frames: list[Image.Image]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(frame, dtype=np.float32) for frame in frames])


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Twelve frames of a square that moves, ten a second."""
    with VideoWriter(tmp_path / "clip.mp4", 10, (64, 64)) as writer:
        for frame in range(12):
            picture = Image.new("RGB", (64, 64), "navy")
            picture.paste("orange", (4 * frame, 20, 4 * frame + 16, 40))
            writer.write(picture)
    return tmp_path / "clip.mp4"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_it_is_what_the_stock_pipeline_makes(family: str, tmp_path: Path) -> None:
    pipe = pipeline(family)
    module = tiny.motion_adapter(pipe.unet)
    request = ms.VideoRequest(prompt="fox", frames=5, motion=module, **FAST)
    animation, found = made(request, tmp_path / "frames", pipe)
    assert len(found) == 5 and found[0].size == (64, 64) and animation.windows is None
    random = torch.Generator().manual_seed(3)
    latents = torch.stack([torch.randn(4, 8, 8, generator=random) for _ in range(5)])
    with ms.attach(pipe, ms.Motion(module)):
        stock = pipe("fox", num_images_per_prompt=5, latents=latents, num_inference_steps=STEPS, guidance_scale=4.0,
                     height=64, width=64).images  # fmt: skip
    assert np.abs(pixels(found) - pixels(stock)).max() <= 1


def test_a_long_clip_is_the_same_again_and_nothing_is_left(tmp_path: Path) -> None:
    pipe = pipeline()
    module, hooks = tiny.motion_adapter(pipe.unet), len(pipe.unet._forward_pre_hooks)
    parts = {name: id(part) for name, part in pipe.components.items()}
    animation, found = made(
        ms.VideoRequest(prompt="fox", frames=9, context=4, motion=module, **FAST), tmp_path / "long", pipe
    )
    assert len(found) == 9 and animation.windows == (4, 1)
    assert animation.figures.seam is not None and animation.figures.consistency is not None
    assert len(pipe.unet._forward_pre_hooks) == hooks and not pipe.unet._forward_hooks
    assert {name: id(part) for name, part in pipe.components.items()} == parts and "prepare_latents" not in vars(pipe)
    again, same = made(animation.request, tmp_path / "again", pipe)
    assert (pixels(same) == pixels(found)).all() and again.figures == animation.figures


def test_a_clip_follows_a_video_and_its_rate(clip: Path, tmp_path: Path) -> None:
    pipe = pipeline()
    net = ms.ControlNet.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 6, 6, 8))
    net.load_state_dict(tiny.controlnet("sd1").state_dict())
    control: dict[str, Any] = {"adapter": net, "annotator": "canny", "scale": 10}
    shared: dict[str, Any] = {"prompt": "fox", "motion": tiny.motion_adapter(pipe.unet), "context": 6, **FAST}
    request = ms.VideoRequest(controls=[control | {"image": str(clip)}], **shared)
    animation, found = made(request, tmp_path / "video", pipe)
    assert (animation.request.frames, animation.request.fps) == (12, 10)
    frames = list(read_video(clip))
    for name, image in (("still", frames[0]), ("list", frames)):
        other = ms.VideoRequest(controls=[control | {"image": image}], frames=12, fps=10, **shared)
        _, pictures = made(other, tmp_path / name, pipe)
        assert ((pixels(pictures) - pixels(found))[-1] != 0).any() == (name == "still"), "each frame has its own edges"


def test_video_to_video(clip: Path, tmp_path: Path) -> None:
    pipe = pipeline()
    module = tiny.motion_adapter(pipe.unet)
    options = FAST | {"steps": 4}
    weak = ms.VideoRequest(prompt="fox", init=str(clip), strength=0.3, motion=module, context=6, **options)
    animation, found = made(weak, tmp_path / "out.mp4", pipe)
    assert (animation.request.frames, animation.request.fps) == (12, 10)
    info = video_info(tmp_path / "out.mp4")
    assert (info.frames, float(info.fps), info.width) == (12, 10, 64)
    _, other = made(weak.model_copy(update={"strength": 1.0}), tmp_path / "strong.mp4", pipe)
    assert np.abs(pixels(found) - pixels(other)).mean() > 1


@torch.no_grad()
def test_video_to_video_by_hand(clip: Path, tmp_path: Path) -> None:
    """Encode, noise to the step where the strength begins, denoise the clip, decode."""
    pipe = pipeline()
    module = tiny.motion_adapter(pipe.unet)
    options = FAST | {"steps": 4, "guidance": 1.0}
    request = ms.VideoRequest(prompt="fox", init=str(clip), frames=3, strength=0.5, motion=module, **options)
    _, found = made(request, tmp_path / "frames", pipe)
    frames = list(read_video(clip))[:3]
    latents = pipe.vae.encode(pipe.image_processor.preprocess(frames)).latent_dist.mode()
    scale, scheduler = pipe.vae.config.scaling_factor, tiny.scheduler()
    scheduler.set_timesteps(4)
    random = torch.Generator().manual_seed(3)
    noise = torch.stack([torch.randn(4, 8, 8, generator=random) for _ in range(3)])
    text = pipe.encode_prompt(["fox"] * 3, "cpu", 1, False)[0]
    x = scheduler.add_noise(latents * scale, noise, scheduler.timesteps[2:3])
    with ms.attach(pipe.unet, ms.Motion(module)):
        for t in scheduler.timesteps[2:]:
            x = scheduler.step(pipe.unet(x, t, text).sample, t, x).prev_sample
    wanted = pipe.image_processor.postprocess(pipe.vae.decode(x / scale).sample, "pil")
    assert np.abs(pixels(found) - pixels(wanted)).max() <= 1


def test_prompts_references_and_more_passes(clip: Path, tmp_path: Path) -> None:
    pipe = pipeline()
    ip = ms.IPAdapter.from_unet(pipe.unet, tokens=2, feature_dim=tiny.WIDTH)
    plain = ms.VideoRequest(prompt="fox", frames=8, fps=10, motion=tiny.motion_adapter(pipe.unet), context=4, **FAST)
    _, before = made(plain, tmp_path / "plain", pipe)
    for number, change in enumerate((
        {"prompts": {5: "owl"}},
        {"free_init": 1},
        {"free_noise": False},
        {"schedule": "looped"},
        {"context": None, "extend": "interpolate"},
        {"image_prompts": [{"adapter": ip, "images": [str(clip)]}]},
        {"image_prompts": [{"adapter": ip, "images": [tiny.picture()]}]},
    )):  # fmt: skip
        asked = ms.VideoRequest(**{name: getattr(plain, name) for name in plain.model_fields_set} | change)
        _, found = made(asked, tmp_path / str(number), pipe)
        assert np.abs(pixels(found) - pixels(before)).max() > 0, change


def test_the_file_carries_its_request(tmp_path: Path) -> None:
    """With which a sampler that draws noise of its own makes the same again; a base in memory cannot be written."""
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "base")
    folder = tiny.motion_adapter(pipe.unet).save_pretrained(tmp_path / "module")
    request = ms.VideoRequest(
        prompt="fox", base=str(tmp_path / "base"), frames=3, motion=str(folder), scheduler="euler_a", **FAST
    )
    animation, found = made(request, tmp_path / "clip.webp", None, device="cpu")
    kept = ms.VideoRequest.from_json(video_comment(tmp_path / "clip.webp") or "")
    assert kept == animation.request and kept.seed == 3 and kept.fps == 8
    _, again = made(kept, tmp_path / "again.webp", None, device="cpu")
    assert (pixels(again) == pixels(found)).all()
    made(kept, tmp_path / "memory.webp", pipe)
    assert video_comment(tmp_path / "memory.webp") is None


def test_pictures_at_some_frames(tmp_path: Path) -> None:
    pipe = pipeline()
    reference("scribble").save_pretrained(tmp_path / "sparse")
    control: dict[str, Any] = {"adapter": str(tmp_path / "sparse"), "scale": 10}
    request: dict[str, Any] = {"prompt": "fox", "frames": 4, "motion": tiny.motion_adapter(pipe.unet), **FAST}
    found = {}
    for name, more in (("first", {}), ("zero", {"at": [0]}), ("last", {"at": [-1]})):
        asked = ms.VideoRequest(controls=[control | {"image": tiny.picture()} | more], **request)
        found[name] = pixels(made(asked, tmp_path / name, pipe)[1])
    assert (found["first"] == found["zero"]).all() and (found["first"] != found["last"]).any()
    with pytest.raises(ms.MahlstickError, match=r"controls\[0\]\.at: frame 4 is none of the clip's, which are 0 to 3"):
        ms.VideoRequest(controls=[control | {"image": tiny.picture(), "at": [4]}], **request)


# what goes wrong


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"frames": 10_000}, "frames: should be less than or equal to 8192, not 10000"),
        ({"frames": 1}, "frames: should be greater than or equal to 2, not 1"),
        ({"frames": 8, "prompts": {8: "owl"}}, "prompts: frame 8 is none of the clip's, which are 0 to 7"),
        ({"strength": 0.5}, "strength: tells how much of init is repainted"),
        ({"controls": [{"adapter": "x", "image": "a.png", "frame": 3}]}, r"controls\[0\].frame: is not a field"),
        ({"init": "a.mp4", "free_init": 1}, "free_init: is for clips from words alone"),
        ({"fps": 0}, "fps: should be greater than 0"),
    ],
)
def test_requests_that_cannot_be(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ms.MahlstickError, match=told):
        ms.VideoRequest(prompt="fox", **fields)


class NoLoader(Loader):
    """One that must not be asked for a base."""

    def pipeline(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a base was loaded")


def test_bad_files_are_told_before_a_base_is_loaded(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(clip.read_bytes()[:-600])
    (tmp_path / "text.mp4").write_text("no video")
    tiny.picture().save(tmp_path / "one.png")
    module = tiny.motion_adapter(tiny.unet("sd1"))
    tiny.unet("sd1").save_pretrained(tmp_path / "base" / "unet")
    wrong = tmp_path / "sdxl"
    tiny.motion_adapter(tiny.unet("sdxl")).save_pretrained(wrong)
    out = tmp_path / "out.mp4"
    for fields, told in (
        ({"init": str(tmp_path / "text.mp4")}, "text.mp4"),
        ({"init": str(tmp_path / "broken.mp4")}, "broken.mp4"),
        ({"init": str(tmp_path / "missing.mp4")}, "missing.mp4.* does not exist|no such file.*missing.mp4"),
        ({"init": str(tmp_path / "one.png")}, "one.png is no video"),
        ({"controls": [{"adapter": "x", "image": str(tmp_path / "none.png")}]}, r"controls\[0\]: .*none.png"),
        ({"controls": [{"adapter": "x", "image": [tiny.picture()] * 3}], "frames": 4}, "3 pictures for 4 frames"),
        ({"controls": [{"adapter": "x", "image": tiny.picture(), "annotator": "fog"}]}, "fog"),
        ({"image_prompts": [{"images": [str(tmp_path / "none.png")]}]}, r"image_prompts\[0\]: .*none.png"),
        ({"image_prompts": [{"images": [str(clip)]}], "frames": 40}, "has 10 frames at 8 a second, and 40 are asked"),
        ({"image_prompts": [{"images": [str(clip), tiny.picture()]}]}, r"image_prompts\[0\]: a video is a reference"),
        ({"motion_loras": [{"path": str(tmp_path / "one.png")}]}, "one.png"),
        ({"init": str(clip), "fps": 0.5}, "has 1 frames at 0.5 a second, and 2 are asked for"),
        ({"context": 4, "overlap": 4}, "overlap must be a whole number from 0 to 3"),
        ({"init": str(clip), "frames": 40}, "has 12 frames at 10 a second, and 40 are asked for"),
        ({"init": str(clip), "prompts": {12: "owl"}}, "frame 12 is none of the clip's, which are 0 to 11"),
        ({"motion": str(wrong)}, "this motion module was made for"),
        ({"motion": str(tmp_path / "nothing")}, "nothing"),
    ):
        request = ms.VideoRequest(
            **{"prompt": "fox", "motion": module, "base": str(tmp_path / "base"), **FAST, **fields}
        )
        with pytest.raises(ms.MahlstickError, match=told):
            ms.animate(request, out, loader=NoLoader(), progress=False)
        assert not out.exists()
    request = ms.VideoRequest(prompt="fox", frames=4, motion=module, **FAST)
    for target in (tmp_path / "out.avi", tmp_path / "text.mp4" / "out.mp4"):
        with pytest.raises(ms.MahlstickError):
            ms.animate(request, target, loader=NoLoader(), progress=False)


def test_a_number_that_only_the_module_refuses(tmp_path: Path) -> None:
    pipe = pipeline()
    request = ms.VideoRequest(prompt="fox", frames=12, motion=tiny.motion_adapter(pipe.unet), context=9, **FAST)
    with pytest.raises(ms.MahlstickError, match="motion: 9 frames are more than the 8"):
        ms.animate(request, tmp_path / "out.mp4", pipe=pipe, progress=False)
    assert not pipe.unet._forward_pre_hooks


def test_a_run_that_is_stopped_leaves_no_file(tmp_path: Path) -> None:
    pipe = pipeline()
    request = ms.VideoRequest(prompt="fox", frames=4, motion=tiny.motion_adapter(pipe.unet), **FAST)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ms.animate(request, tmp_path / "out.mp4", pipe=pipe, progress=False, callback=stop)
    assert not list(tmp_path.iterdir()) and not pipe.unet._forward_pre_hooks


# the command line


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mahlstick.cli import main

    base = tmp_path / "base"
    pipe = pipeline()
    pipe.save_pretrained(base)
    module = tiny.motion_adapter(pipe.unet).save_pretrained(tmp_path / "module")
    out = tmp_path / "clip.webp"
    command = ["animate", "-p", "fox", "--base", str(base), "--motion", str(module), "--frames", "6", "--context", "4",
               "--prompt-at", "3=owl", "--steps", "2", "--seed", "1", "--size", "64x64", "--device", "cpu"]  # fmt: skip
    assert main([*command, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "6 frames, 8 a second, seed 1, in windows of 4 that share 1" in told and "seam" in told
    assert video_info(out).frames == 6
    assert main(["animate", "--request", str(out), "--out", str(tmp_path / "b.mp4"), "--json", "--device", "cpu"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["frames"], facts["seed"], facts["windows"]) == (6, 1, [4, 1])
    for wrong, said in (
        (["--prompt-at", "owl"], "--prompt-at owl: give FRAME=PROMPT"),
        (["--prompt-at", "9=owl"], "prompts: frame 9 is none of the clip's"),
        (["--out", "clip.avi"], "clip.avi"),
        (["--request", str(module)], "--request"),
    ):
        assert main([*command, *wrong]) == 2
        assert said in capsys.readouterr().err


def test_a_motion_lora_from_the_command(tmp_path: Path) -> None:
    unet = tiny.unet("sd1")
    save_file({"a.b.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    request = ms.VideoRequest(
        prompt="fox",
        frames=4,
        motion=tiny.motion_adapter(unet),
        motion_loras=[{"path": str(tmp_path / "lora.safetensors")}],
        **FAST,
    )
    with pytest.raises(ms.MahlstickError, match=r"lora\.safetensors"):
        ms.animate(request, tmp_path / "out.mp4", pipe=pipeline(), progress=False)
