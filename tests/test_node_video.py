"""VideoHelperSuite's nodes and ComfyUI's for videos: what is written is read again, and nothing outside its folders."""

from __future__ import annotations

import json
import math
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mahlstick as ms
from benchmarks import tiny
from mahlstick.nodes import folders
from mahlstick.nodes.builtin import video
from mahlstick.nodes.schema import Returned, catalogue
from mahlstick.nodes.values import Vae
from mahlstick.pipelines.video import video_comment, video_info

NODES = catalogue(video)
FRAMES, RATE = 6, 12.0
FORMATS = ("image/gif", "image/webp", "video/ffmpeg-gif", "video/h264-mp4", "video/webm")
WORKFLOW: dict[str, Any] = {
    "prompt": {"1": {"class_type": "VHS_VideoCombine"}},
    "extra_pnginfo": {"workflow": {"id": 1}},
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path) -> Iterator[Path]:
    """What is written is at once what may be read."""
    (tmp_path / "shared").mkdir()
    with folders.using(folders.Folders(input=tmp_path / "shared", output=tmp_path / "shared", temp=tmp_path / "temp")):
        yield tmp_path


def run(kind: str, /, **inputs: Any) -> Any:
    """A node's outputs."""
    return NODES[kind](**inputs)


def shown(kind: str, **inputs: Any) -> dict[str, Any]:
    """The file that a node tells the page of."""
    returned = NODES[kind].function(**inputs)
    assert isinstance(returned, Returned) and returned.ui is not None
    return next(iter(returned.ui.values()))[0]


def clip(frames: int = FRAMES, width: int = 32, height: int = 24) -> Tensor:
    """A bright square that walks from left to right."""
    images = torch.full((frames, height, width, 3), 0.2)
    for place, image in enumerate(images):
        image[8:16, 4 * place : 4 * place + 8, :] = torch.tensor([0.9, 0.6, 0.3])
    return images


def tone(seconds: float = 2.0, rate: int = 48000) -> dict[str, Any]:
    wave = torch.sin(torch.arange(int(seconds * rate)) * 2 * math.pi * 440 / rate) * 0.5
    return {"waveform": wave.repeat(1, 2, 1), "sample_rate": rate}


def combined(**inputs: Any) -> dict[str, Any]:
    return shown("VHS_VideoCombine", **{"images": clip(), "frame_rate": RATE, "format": "video/h264-mp4"} | inputs)


# there and back


@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back(format: str, home: Path) -> None:
    entry = combined(format=format, filename_prefix="clips/walk", **WORKFLOW)
    assert entry | {"format": format, "frame_rate": RATE, "type": "output", "subfolder": "clips"} == entry
    path = home / "shared" / "clips" / entry["filename"]
    assert json.loads(video_comment(path) or "") == {"prompt": WORKFLOW["prompt"], **WORKFLOW["extra_pnginfo"]}
    still = Image.open(path.with_name(entry["workflow"]))
    assert still.size == (32, 24) and json.loads(still.text["workflow"]) == {"id": 1}  # type: ignore[attr-defined]

    images, count, audio, info = run("VHS_LoadVideo", video=f"clips/{entry['filename']}", format="None")
    assert images.shape == (FRAMES, 24, 32, 3) and count == FRAMES and audio is None
    assert (images - clip()).abs().mean() < 0.03
    assert info["source_fps"] == info["loaded_fps"] == pytest.approx(RATE, rel=0.02)
    assert run("VHS_VideoInfoSource", video_info=info)[1:] == (FRAMES, pytest.approx(0.5, rel=0.02), 32, 24)


def test_sound_goes_along(home: Path) -> None:
    entry = combined(images=clip(24), audio=tone())
    images, _, audio, _ = run("VHS_LoadVideo", video=entry["filename"], skip_first_frames=6, frame_load_cap=12)
    assert len(images) == 12 and audio["sample_rate"] == 48000
    assert audio["waveform"].shape == (1, 2, 48000), "of a second from half a second on"
    spectrum = torch.fft.rfft(audio["waveform"][0, 0]).abs()
    assert spectrum.argmax() == pytest.approx(440, abs=3)
    sound, seconds = run("VHS_LoadAudioUpload", audio=entry["filename"], start_time=0.5, duration=0.25)
    assert seconds == pytest.approx(0.25) and sound["waveform"].shape[-1] == 12000
    combined(filename_prefix="silent")
    with wave.open(str(home / "shared" / "empty.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
    for name in ("silent_00001_.mp4", "empty.wav"):
        with pytest.raises(ms.MahlstickError, match="has no sound"):
            run("VHS_LoadAudio", audio_file=f"input/{name}")
    path = home / "shared" / entry["filename"]
    middle, length = path.stat().st_size // 2, path.stat().st_size // 8
    path.write_bytes(path.read_bytes()[:middle] + bytes(length) + path.read_bytes()[middle + length :])
    with pytest.raises(ms.MahlstickError, match="sound is damaged"):
        run("VHS_LoadAudio", audio_file=entry["filename"])


def test_frames_are_taken_by_time_and_number() -> None:
    name = combined(images=clip(12, 48), format="image/webp")["filename"]
    whole = run("VHS_LoadVideo", video=name, format="None")[0]
    every = {"skip_first_frames": 1, "select_every_nth": 3, "frame_load_cap": 2}
    images, count, _, info = run("VHS_LoadVideoPath", video=f' "input/{name}" ', format="None", **every)
    assert count == 2 and torch.equal(images, whole[[1, 4]])
    assert run("VHS_VideoInfoLoaded", video_info=info)[:2] == (pytest.approx(RATE / 3, rel=0.02), 2)
    halved = run("VHS_LoadVideo", video=name, force_rate=6, format="None")[0]
    assert torch.equal(halved, whole[::2])


@pytest.mark.parametrize(
    ("wanted", "format", "size"),
    [((0, 0), "None", (24, 32)), ((0, 0), "AnimateDiff", (24, 32)), ((20, 0), "None", (15, 20)),
     ((0, 12), "None", (12, 16)), ((20, 20), "AnimateDiff", (24, 24)), ((3, 3), "AnimateDiff", (8, 8))],
)  # fmt: skip
def test_sizes(wanted: tuple[int, int], format: str, size: tuple[int, int]) -> None:
    name = combined()["filename"]
    images = run("VHS_LoadVideo", video=name, custom_width=wanted[0], custom_height=wanted[1], format=format)[0]
    assert images.shape == (FRAMES, *size, 3)


def test_there_and_back_again(home: Path) -> None:
    once = combined(images=clip(4), pingpong=True)
    twice = combined(images=clip(4), pingpong=True, loop_count=1)
    assert once["filename"] != twice["filename"]
    images = run("VHS_LoadVideo", video=twice["filename"], format="None")[0]
    assert len(images) == 12
    for place, frame in enumerate([0, 1, 2, 3, 2, 1] * 2):
        assert (images[place] - clip()[frame]).abs().mean() < 0.05
    with pytest.raises(ms.MahlstickError, match="loop_count"):
        combined(format="image/gif", loop_count=1)


def test_latents_are_decoded(home: Path) -> None:
    samples = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    entry = combined(images={"samples": samples}, vae=Vae(tiny.vae()), format="image/webp", save_output=False)
    assert entry["type"] == "temp"
    info = video_info(home / "temp" / entry["filename"])
    assert (info.frames, info.width, info.height) == (5, tiny.SIZE, tiny.SIZE)
    with torch.no_grad():
        wanted = tiny.vae().decode(samples[:1]).sample[0].movedim(0, -1) / 2 + 0.5
    first = torch.from_numpy(np.array(Image.open(home / "temp" / entry["workflow"]))) / 255
    torch.testing.assert_close(first, wanted.clamp(0, 1), atol=1 / 254, rtol=0)
    with pytest.raises(ms.MahlstickError, match="connect the VAE"):
        combined(images={"samples": samples})


def test_names_go_on_and_are_told() -> None:
    first, second = combined(), combined(format="image/gif", save_metadata=False, **WORKFLOW)
    assert (first["filename"], second["filename"]) == ("AnimateDiff_00001_.mp4", "AnimateDiff_00002_.gif")
    ((saved, names),) = run("VHS_VideoCombine", images=clip(2), format="image/gif")
    assert saved and [Path(name).name for name in names] == ["AnimateDiff_00003_.png", "AnimateDiff_00003_.gif"]
    assert run("VHS_SelectFilename", filenames=(saved, names)) == (names[1],)
    assert video_comment(Path(names[1]).with_name(second["filename"])) is None


# folders of pictures


def test_pictures_of_a_folder(home: Path) -> None:
    frames = home / "shared" / "frames"
    frames.mkdir()
    for place in range(4):
        picture = Image.new("RGBA", (8, 8) if place else (16, 12), (0, 50 * place, 0, 255))
        picture.paste((0, 50 * place, 0, 0), (0, 0, 4, 8))
        picture.convert("RGB" if place == 2 else "RGBA").save(frames / f"{place}.png")
    images, masks, count = run("VHS_LoadImages", directory="frames", skip_first_images=1, image_load_cap=2)
    assert images.shape == (2, 8, 8, 3) and masks.shape == (2, 8, 8) and count == 2
    assert images[:, 0, 0, 1].mul(255).round().tolist() == [50, 100]
    assert masks[0].mean(0).tolist() == [1] * 4 + [0] * 4 and not masks[1].any()
    assert images.shape[1:3] == run("VHS_LoadImagesPath", directory="input/frames")[0].shape[1:3], "of most"
    with pytest.raises(ms.MahlstickError, match="no picture behind"):
        run("VHS_LoadImages", directory="frames", skip_first_images=4)


# ComfyUI's own


def test_videos_of_comfyui(home: Path) -> None:
    (made,) = run("CreateVideo", images=clip(), fps=RATE, audio=tone(0.5))
    saved = shown("SaveVideo", video=made, **WORKFLOW)
    path = home / "shared" / "video" / saved["filename"]
    assert saved["subfolder"] == "video" and json.loads(video_comment(path) or "")["workflow"] == {"id": 1}
    (loaded,) = run("LoadVideo", file=f"video/{saved['filename']}")
    images, audio, fps = run("GetVideoComponents", video=loaded)
    assert images.shape == clip().shape and fps == RATE and audio["sample_rate"] == 48000
    webm = shown("SaveWEBM", images=clip(), fps=RATE)
    assert video_info(home / "shared" / webm["filename"]).frames == FRAMES


# parts of batches


def test_parts_of_batches() -> None:
    images = clip()
    latents = {"samples": torch.randn(FRAMES, 4, 3, 3), "noise_mask": torch.rand(FRAMES, 3, 3)}
    latents |= {"batch_index": [5, 4, 3, 2, 1, 0], "other": [1]}
    first, count, second, rest = run("VHS_SplitImages", images=images, split_index=-2)
    assert (count, rest) == (4, 2) and torch.equal(torch.cat([first, second]), images)
    head, count, tail, _ = run("VHS_SplitLatents", latents=latents, split_index=2)
    assert count == 2 and torch.equal(tail["noise_mask"], latents["noise_mask"][2:]) and head["other"] == [1]
    assert (head["batch_index"], tail["batch_index"]) == ([5, 4], [3, 2, 1, 0])
    assert run("VHS_GetImageCount", images=images) == run("VHS_GetLatentCount", latents=latents) == (FRAMES,)
    assert torch.equal(run("VHS_DuplicateImages", images=images, multiply_by=2)[0], torch.cat([images, images]))
    doubled, count = run("VHS_DuplicateLatents", latents=latents, multiply_by=2)
    assert count == 2 * FRAMES and torch.equal(doubled["samples"][FRAMES:], latents["samples"])
    assert doubled["batch_index"] == 2 * latents["batch_index"]
    every = run("VHS_SelectEveryNthImage", images=images, select_every_nth=2, skip_first_images=1)[0]
    assert torch.equal(every, images[1::2])
    every = run("VHS_SelectEveryNthLatent", latents=latents, select_every_nth=4)[0]
    assert torch.equal(every["noise_mask"], latents["noise_mask"][::4])
    other = {"images_A": images, "images_B": clip(2, 64, 48)}
    merged, count = run("VHS_MergeImages", merge_strategy="match smaller", **other)
    assert merged.shape == (count, 24, 32, 3) and count == FRAMES + 2 and torch.equal(merged[:FRAMES], images)
    assert run("VHS_MergeImages", merge_strategy="match larger", **other)[0].shape == (count, 48, 64, 3)


@pytest.mark.parametrize(
    ("indexes", "places"),
    [("0", [0]), ("-1", [5]), ("0, 1, 3", [0, 1, 3]), ("0:3, 5", [0, 1, 2, 5]), ("0:-1", [0, 1, 2, 3, 4]),
     ("0:5:-1", [4, 3, 2, 1, 0]), ("0:5:2", [0, 2, 4]), ("::-1", [5, 4, 3, 2, 1, 0])],
)  # fmt: skip
def test_indexes(indexes: str, places: list[int]) -> None:
    assert torch.equal(run("VHS_SelectImages", image=clip(), indexes=indexes)[0], clip()[places])


# what is refused


@pytest.mark.parametrize(
    ("kind", "inputs", "said"),
    [
        ("VHS_LoadVideo", {"video": "../walk.mp4"}, "leads outside"),
        ("VHS_LoadVideoPath", {"video": "/etc/passwd"}, "leads outside"),
        ("VHS_LoadVideoPath", {"video": "http://example.org/walk.mp4"}, "no such file"),
        ("VHS_LoadImagesPath", {"directory": "../"}, "leads outside"),
        ("VHS_LoadImages", {"directory": "nothing"}, "no such folder"),
        ("VHS_LoadAudio", {"audio_file": "../../tone.wav"}, "leads outside"),
        ("LoadVideo", {"file": "../walk.mp4"}, "leads outside"),
        ("VHS_LoadVideo", {"video": "x.mp4", "meta_batch": 1}, "meta_batch.*leave it open"),
        ("VHS_VideoCombine", {"images": clip(), "filename_prefix": "../walk"}, "leads outside"),
        ("VHS_VideoCombine", {"images": clip(), "format": "video/ProRes"}, "'video/ProRes' is not written here"),
        ("VHS_VideoCombine", {"images": clip(0)}, "empty batch"),
        ("VHS_SelectImages", {"image": clip(), "indexes": "6"}, "not among 6 pictures"),
        ("VHS_SelectImages", {"image": clip(), "indexes": "fox"}, "no number or range"),
        ("VHS_SelectImages", {"image": clip(), "indexes": "4:2"}, "choose nothing"),
        ("VHS_SelectImages", {"image": clip(), "indexes": "0:5:0"}, "no range"),
        ("VHS_SelectImages", {"image": clip(), "indexes": "0:5:1:1"}, "no range"),
        ("VHS_SelectFilename", {"filenames": (True, ["a"]), "index": 1}, "only 1"),
    ],
)
def test_refusals(kind: str, inputs: dict[str, Any], said: str, home: Path) -> None:
    with pytest.raises(ms.MahlstickError, match=said):
        run(kind, **inputs)
    assert not [each for each in home.rglob("*") if each.is_file()], "nothing half-written"


def test_frames_that_are_not_there() -> None:
    name = combined()["filename"]
    with pytest.raises(ms.MahlstickError, match="no frame is left"):
        run("VHS_LoadVideo", video=name, skip_first_frames=6)


def test_what_changed_is_seen(home: Path) -> None:
    """Before a run a file that is missing is told of, and a new one makes the node run again."""
    node = NODES["VHS_LoadVideo"]
    assert node.check is not None and node.fingerprint is not None
    assert "no such file" in str(node.check(video="AnimateDiff_00001_.mp4")) and node.check(video=None) is True
    path = home / "shared" / combined()["filename"]
    before = node.fingerprint(video=path.name)
    assert node.check(video=path.name) is True
    path.write_bytes(path.read_bytes() + b"\0")
    assert node.fingerprint(video=path.name) != before
