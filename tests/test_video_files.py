"""Clips: read by time, exactly counted, written whole or not at all, and refused in one sentence."""

from __future__ import annotations

import io
import math
import tracemalloc
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mahlstick.errors import MahlstickError
from mahlstick.pipelines.video import (
    SUFFIXES,
    Frames,
    VideoWriter,
    check_video_target,
    is_video,
    iterate_video,
    read_video,
    video_comment,
    video_info,
)

TARGETS = (*SUFFIXES, "")  # the last is a folder
SIZE = (48, 32)


def picture(k: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A disc that moves over a gradient."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    pixels = np.stack([x * 5 % 256, y * 7 % 256, np.full_like(x, 90)], axis=2).astype(np.uint8)
    pixels[(x - 8 - 3 * k) ** 2 + (y - 12) ** 2 < 40] = (30, 40, 50)
    return Image.fromarray(pixels)


def cut_out(k: int) -> Image.Image:
    """The disc alone; in frame 1 nothing at all."""
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    alpha = np.where((x - 8 - 3 * k) ** 2 + (y - 12) ** 2 < 40, 255, 0) * (k != 1)
    result = picture(k)
    result.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return result


def write(path: Path, frames: Sequence[Image.Image], fps: float | Fraction = 8, **options: Any) -> Path:
    with VideoWriter(path, fps, frames[0].size, **options) as writer:
        for frame in frames:
            writer.write(frame)
    return path


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (level,) * 3)


def stamped(path: Path, stamps: Sequence[int], tick: Fraction = Fraction(1, 1000), **stream: Any) -> Path:
    """A lossless video of frames of level 0, 1, 2, ... with these time stamps, in ticks."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("ffv1", rate=Fraction(1, 1) / tick)
        video.width, video.height, video.pix_fmt = 16, 16, "bgr0"
        for level, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_image(grey(level)).reformat(format="bgr0")
            frame.pts, frame.time_base = stamp, tick
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return path


def levels(frames: Any) -> list[int]:
    return [frame.getpixel((0, 0))[0] for frame in frames]


def psnr(one: Image.Image, other: Image.Image) -> float:
    error = np.asarray(one, float) - np.asarray(other, float)
    return 10 * math.log10(255**2 / max(1e-9, float((error**2).mean())))


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(MahlstickError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message, f"no way out is named: {message}"
    for word in words:
        assert word in message, message


# --- frames on disk


def test_frames_are_a_sequence_on_disk() -> None:
    with Frames() as frames:
        refused(lambda: frames.size, "no frames yet")
        for k in range(5):
            frames.append(picture(k))
        assert len(frames) == 5 and frames.size == SIZE
        assert frames[3] == picture(3) and frames[-1] == picture(4) and frames[0] == picture(0)
        assert frames[1:4:2] == [picture(1), picture(3)] and frames[5:] == []
        assert list(frames) == [picture(k) for k in range(5)]
        with pytest.raises(IndexError):
            frames[5]
        refused(lambda: frames.append(grey(0)), "16x16", "48x32")
        frames.append(cut_out(1))
        assert frames[5] == Image.new("RGB", SIZE, "white")
    with pytest.raises(ValueError, match="closed"):
        frames[0]


def test_a_thousand_frames_cost_no_memory(tmp_path: Path) -> None:
    frame = picture(0, (128, 128))  # 48 KiB
    with Frames() as frames, VideoWriter(tmp_path / "a.webp", 8, frame.size) as writer:
        frames.append(frame)
        writer.write(frame)
        tracemalloc.start()
        try:
            for _ in range(200):
                frames.append(frame)
                writer.write(frames[-1])
            kept, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert kept < 100_000 and most < 1_000_000


# --- what is written reads back


@pytest.mark.parametrize("suffix", TARGETS)
@pytest.mark.parametrize("fps", [8, 24, 12.5])
def test_round_trip(tmp_path: Path, suffix: str, fps: float) -> None:
    shown = [picture(k) for k in range(9)]
    path = write(tmp_path / f"clip{suffix}", shown, fps)
    info = video_info(path)
    assert (info.width, info.height, info.frames) == (*SIZE, 9)
    assert info.fps == (Fraction(fps) if suffix else None)
    assert not info.has_audio
    assert not info.has_alpha or suffix == ".gif"  # where a colour may be kept for what stays as it is
    assert info.seconds == (pytest.approx(9 / fps) if suffix else None)
    with read_video(path) as frames:
        assert len(frames) == 9 and frames.size == SIZE
        least = min(psnr(frame, true) for frame, true in zip(frames, shown, strict=True))
    assert least > {"": 80, ".gif": 27}.get(suffix, 29)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_television_rates_stay_exact(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"clip{suffix}", [picture(k) for k in range(40)], Fraction(30000, 1001))
    assert video_info(path).fps == Fraction(30000, 1001)
    assert video_info(write(path, [picture(k) for k in range(3)], 23.976)).fps == Fraction(2997, 125)


def test_quality_tells_in_bytes(tmp_path: Path) -> None:
    noise = [Image.fromarray(np.random.default_rng(k).integers(0, 255, (32, 48, 3), np.uint8)) for k in range(4)]
    for suffix in (".mp4", ".webm", ".webp"):
        sizes = [write(tmp_path / f"clip{suffix}", noise, quality=q).stat().st_size for q in (20, 60, 100)]
        assert sizes == sorted(set(sizes)), suffix


def test_colours_are_those_of_the_picture(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50)]
    for suffix in SUFFIXES:
        path = write(tmp_path / f"clip{suffix}", [Image.new("RGB", (16, 16), colour) for colour in colours])
        read = [frame.getpixel((8, 8)) for frame in iterate_video(path)]
        assert np.abs(np.subtract(read, colours)).max() <= 5, suffix


@pytest.mark.parametrize("suffix", [".webp", ""])
def test_transparency_is_kept(tmp_path: Path, suffix: str) -> None:
    shown = [cut_out(k) for k in range(4)]
    path = write(tmp_path / f"clip{suffix}", shown)
    assert video_info(path).has_alpha
    for k, frame in enumerate(shown):
        read = Image.open(path if suffix else path / f"{k + 1:04d}.png")
        read.seek(k if suffix else 0)
        assert np.array_equal(read.convert("RGBA").getchannel("A"), frame.getchannel("A"))
    for read, frame in zip(iterate_video(path), shown, strict=True):
        white = Image.alpha_composite(Image.new("RGBA", SIZE, "white"), frame).convert("RGB")
        assert psnr(read, white) > 30


def test_where_transparency_is_not_kept_white_shows(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", [cut_out(1), cut_out(2)])
    assert next(iterate_video(path)).getpixel((40, 25)) == pytest.approx((255, 255, 255), abs=2)


def test_a_clip_of_one_frame_may_be_written(tmp_path: Path) -> None:
    for suffix in TARGETS:
        path = write(tmp_path / f"clip{suffix}", [picture(0)], comment="one")
        refused(lambda path=path: video_info(path), str(path), "is one picture")
        assert video_comment(path) == "one"


def test_still_parts_of_a_gif_do_not_flicker(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.gif", [picture(k) for k in range(8)])
    corners = [np.asarray(frame)[24:, 40:] for frame in iterate_video(path)]
    assert all(np.array_equal(corner, corners[0]) for corner in corners)
    with Image.open(path) as opened:
        assert opened.info["loop"] == 0


def test_an_odd_side_gets_its_last_pixels_twice(tmp_path: Path) -> None:
    shown = [picture(k, (33, 17)) for k in range(3)]
    for suffix in (".webm", ".gif", ".webp"):
        assert next(iterate_video(write(tmp_path / f"clip{suffix}", shown))).size == (33, 17)
    frame = next(iterate_video(write(tmp_path / "clip.mp4", shown, quality=100)))
    assert frame.size == (34, 18)
    assert psnr(frame.crop((0, 0, 33, 17)), shown[0]) > 28
    pixels = np.asarray(frame, int)
    assert np.abs(pixels[:, 33] - pixels[:, 32]).mean() < 4 and np.abs(pixels[17] - pixels[16]).mean() < 4


@pytest.mark.parametrize("suffix", TARGETS)
def test_a_comment_comes_back(tmp_path: Path, suffix: str) -> None:
    text = 'ein "Fuchs" = 狐; \\ \n' * 5000  # beyond the 64 KiB that some containers' short fields hold
    path = write(tmp_path / f"clip{suffix}", [picture(0), picture(1)], comment=text.strip())
    assert video_comment(path) == text.strip()
    assert len(list(iterate_video(path))) == 2
    assert video_comment(write(tmp_path / f"bare{suffix}", [picture(0), picture(1)])) is None


def test_an_mp4_begins_with_what_a_player_needs(tmp_path: Path) -> None:
    content = write(tmp_path / "clip.mp4", [picture(0)] * 3).read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


# --- frames by their time


def by_time(stamps: Sequence[Fraction], fps: Fraction, count: int, tolerance: Fraction) -> list[int]:
    """The rule, as it is said."""
    return [max(i for i, time in enumerate(stamps) if time <= k / fps + tolerance) for k in range(count)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.integers(2, 300), min_size=2, max_size=12),
    fps=st.fractions(1, 60, max_denominator=1001),
    start=st.sampled_from([0, 70]),
)
def test_frame_k_is_the_last_that_has_begun(tmp_path: Path, steps: list[int], fps: Fraction, start: int) -> None:
    stamps = np.cumsum([0, *steps]).tolist()
    path = stamped(tmp_path / "clip.mkv", [start + stamp for stamp in stamps])
    info = video_info(path)
    read = levels(iterate_video(path, fps))
    assert len(read) == info.frames_at(fps) == math.ceil(len(stamps) * fps / info.fps)
    half_a_tick = Fraction(1, 2000)
    assert read == by_time([Fraction(stamp, 1000) for stamp in stamps], fps, len(read), half_a_tick)


@pytest.mark.parametrize(
    ("source", "fps", "expected"),
    [
        (24, 8, [0, 3, 6, 9]),
        (24, 24, list(range(12))),
        (24, 48, [k // 2 for k in range(24)]),
        (30, 12, [0, 2, 5, 7, 10]),
        (12.5, 25, [k // 2 for k in range(24)]),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp"])
def test_other_frame_rates(tmp_path: Path, suffix: str, source: float, fps: float, expected: list[int]) -> None:
    path = write(tmp_path / f"clip{suffix}", [grey(20 * k) for k in range(12)], source)
    assert [round(level / 20) for level in levels(iterate_video(path, fps))] == expected
    assert video_info(path).frames_at(fps) == len(expected)


def test_coarse_time_stamps(tmp_path: Path) -> None:
    """An AVI counts in frames."""
    path = tmp_path / "clip.avi"
    with av.open(str(path), "w") as container:
        video = container.add_stream("ffv1", rate=10)
        video.width, video.height, video.pix_fmt = 16, 16, "bgr0"
        for k in range(4):
            container.mux(video.encode(av.VideoFrame.from_image(grey(k)).reformat(format="bgr0")))
        container.mux(video.encode(None))
    assert video_info(path).fps == 10
    assert levels(iterate_video(path, 20)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_uneven_times_are_told_and_taken_by_the_average(tmp_path: Path) -> None:
    path = stamped(tmp_path / "clip.mkv", [0, 100, 200, 300, 1000, 1500, 2000, 2500])
    info = video_info(path)
    assert info.frames == 8 and "uneven" in info.note
    assert 2.5 < info.fps < 3.5
    assert len(list(iterate_video(path))) == 8
    even = video_info(stamped(path, [0, 33, 67, 100, 133, 167, 200]))
    assert even.fps == 30 and not even.note


def test_uneven_animations(tmp_path: Path) -> None:
    for name in ("clip.webp", "clip.gif", "clip.png"):
        path = tmp_path / name
        frames = [grey(40 * k) for k in range(4)]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100, 300, 100, 500], lossless=True)
        assert "uneven" in video_info(path).note and video_info(path).frames == 4
        assert [level // 40 for level in levels(iterate_video(path, 10))] == [0, 1, 1, 1, 2, 3, 3, 3, 3, 3]


def test_a_frame_without_time_lasts_a_tenth_of_a_second(tmp_path: Path) -> None:
    frames = [grey(40 * k) for k in range(4)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=0)
    assert video_info(tmp_path / "clip.gif").fps == 10


def test_a_png_may_have_a_picture_that_is_no_frame(tmp_path: Path) -> None:
    frames = [grey(40 * k) for k in range(4)]
    frames[0].save(tmp_path / "clip.png", save_all=True, append_images=frames[1:], duration=125, default_image=True)
    assert video_info(tmp_path / "clip.png").fps == 8
    assert [level // 40 for level in levels(iterate_video(tmp_path / "clip.png"))] == [1, 2, 3]


def test_a_stream_without_a_container_has_no_times(tmp_path: Path) -> None:
    path = tmp_path / "clip.h264"
    with av.open(str(path), "w", format="h264") as container:
        video = container.add_stream("libx264", rate=24)
        video.width, video.height, video.pix_fmt = 16, 16, "yuv420p"
        for k in range(6):
            container.mux(video.encode(av.VideoFrame.from_image(grey(40 * k)).reformat(format="yuv420p")))
        container.mux(video.encode(None))
    assert video_info(path).frames == 6
    assert [round(level / 40) for level in levels(iterate_video(path))] == list(range(6))


def test_how_many_and_how_large(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", [picture(k) for k in range(6)], 8)
    with read_video(path, fps=4, frames=2, size=(16, 16), resize="stretch") as frames:
        assert len(frames) == 2 and frames.size == (16, 16)
        assert psnr(frames[1], picture(2).resize((16, 16))) > 22
    with read_video(path, size=(32, 32)) as frames:
        assert psnr(frames[0], picture(0).crop((8, 0, 40, 32))) > 25
    refused(lambda: read_video(path, frames=7), str(path), "6 frames", "7 are asked for")
    refused(lambda: read_video(path, fps=4, frames=4), "3 frames at 4 a second")
    refused(lambda: read_video(path, frames=0), "0 are asked for")
    for fps in (0, -1, math.nan, math.inf):
        refused(lambda fps=fps: iterate_video(path, fps), "fps")


# --- what phones, editors and folders hold


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_a_phones_turn_is_done(tmp_path: Path, turn: int) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=8)
        (video.width, video.height), video.pix_fmt = SIZE, "yuv420p"
        video.set_display_rotation(turn)  # counter-clockwise
        for k in range(3):
            container.mux(video.encode(av.VideoFrame.from_image(picture(k)).reformat(format="yuv420p")))
        container.mux(video.encode(None))
    expected = picture(0).rotate(turn, expand=True)
    assert (video_info(path).width, video_info(path).height) == expected.size
    assert psnr(next(iterate_video(path)), expected) > 25


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [("vp9.webm", "libvpx-vp9", "yuva420p"), ("vp8.webm", "libvpx", "yuva420p"), ("png.mov", "png", "rgba")],
)
def test_transparency_of_videos_shows_white(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=8, options={"auto-alt-ref": "0"} if "vp" in name else {})
        (video.width, video.height), video.pix_fmt = SIZE, pixels
        for k in range(4):
            frame = av.VideoFrame.from_ndarray(np.asarray(cut_out(k)), format="rgba")
            container.mux(video.encode(frame.reformat(format=pixels)))
        container.mux(video.encode(None))
    assert video_info(path).has_alpha and video_info(path).frames == 4
    frames = list(iterate_video(path))
    assert min(np.asarray(frames[1]).min(), np.asarray(frames[2])[25:, 40:].min()) > 245
    assert frames[2].getpixel((14, 12))[2] < 100


def test_a_folder_is_read_by_number(tmp_path: Path) -> None:
    for k in (1, 2, 10, 9):
        grey(k).save(tmp_path / f"frame {k}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".hidden.png").write_text("nor this")
    assert levels(iterate_video(tmp_path)) == [1, 2, 9, 10]
    assert levels(iterate_video(tmp_path, fps=3)) == [1, 2, 9, 10]
    info = video_info(tmp_path)
    assert (info.frames, info.frames_at(24), info.fps, info.seconds) == (4, 4, None, None)
    assert "no frame rate" in info.note
    refused(lambda: read_video(tmp_path, fps=8, frames=5), "4 frames,")

    picture(0).save(tmp_path / "frame 11.jpg")
    assert "differ in size" in video_info(tmp_path).note
    refused(lambda: read_video(tmp_path), str(tmp_path), "different sizes")
    assert len({frame.size for frame in iterate_video(tmp_path)}) == 2, "one at a time they may differ"
    with read_video(tmp_path, size=(8, 8)) as frames:
        assert len(frames) == 5 and frames.size == (8, 8)

    (tmp_path / "frame 12.png").write_text("no picture")
    refused(lambda: video_info(tmp_path), "frame 12.png", "not a picture")


def test_pictures_turned_by_their_exif_have_one_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "1.jpg", exif=exif, quality=95)
    picture(1).save(tmp_path / "2.png")
    assert (video_info(tmp_path).width, video_info(tmp_path).height) == SIZE
    with read_video(tmp_path) as frames:
        assert psnr(frames[0], picture(0)) > 25


def test_a_video_whose_frames_change_in_size(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mjpeg", rate=25)
        (video.width, video.height), video.pix_fmt = SIZE, "yuvj420p"
        container.start_encoding()
        for k in range(6):
            still = io.BytesIO()
            picture(k, (64, 64) if k > 3 else SIZE).save(still, "JPEG")
            packet = av.Packet(still.getvalue())
            packet.pts = packet.dts = 40 * k
            packet.time_base, packet.stream = Fraction(1, 1000), video
            container.mux(packet)
    refused(lambda: read_video(path, fps=25), str(path), "different sizes")
    with read_video(path, fps=25, size=(16, 16)) as frames:
        assert frames.size == (16, 16)


def test_what_is_a_video(tmp_path: Path) -> None:
    for suffix in TARGETS:
        assert is_video(write(tmp_path / f"clip{suffix}", [picture(0), picture(1)]))
    picture(0).save(tmp_path / "still.png")
    picture(0).save(tmp_path / "still.gif")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    assert is_video(str(tmp_path / "broken.mp4"))
    url = "data:image/png;base64," + "A" * 9000
    others = [tmp_path / "still.png", tmp_path / "still.gif", tmp_path / "nowhere.mp4", url, picture(0), [1], None]
    assert not any(is_video(other) for other in others)


# --- what is refused


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    def check(name: str, content: bytes, *words: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        for call in (video_info, read_video, iterate_video):  # at once, and not with the first frame
            refused(lambda call=call: call(path), str(path), *words)

    text = b"hello, this is no video\n" * 200
    check("text.txt", text, "not a video")  # which FFmpeg plays as a film of letters
    check("text.mp4", text, "not a video")
    check("empty.mp4", b"", "not a video")
    write(tmp_path / "clip.mp4", [picture(0), picture(1)])
    stream = f"file://{tmp_path / 'clip.mp4'}"
    check("list.m3u8", f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{stream}\n#EXT-X-ENDLIST\n".encode(), "not a")
    check("list.ffconcat", b"ffconcat version 1.0\nfile clip.mp4\n", "not a video")
    check("sound.wav", sound(tmp_path / "s.wav", "pcm_s16le").read_bytes(), "no video stream")
    refused(lambda: video_info(tmp_path / "nowhere.mp4"), "nowhere.mp4", "does not exist")
    refused(lambda: video_info("http://example.invalid/clip.mp4"), "does not exist")


def test_one_picture_is_refused(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "gif", "webp", "bmp", "tif", "avif"):
        picture(0).save(tmp_path / f"still.{suffix}")
        refused(lambda suffix=suffix: read_video(tmp_path / f"still.{suffix}"), f"still.{suffix}", "is one picture")
    refused(lambda: read_video(stamped(tmp_path / "still.mkv", [0])), "still.mkv", "is one picture")
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(lambda: read_video(folder), "folder without pictures")
    picture(0).save(folder / "1.png")
    refused(lambda: read_video(folder), str(folder), "is one picture")


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".avi", ".mkv", ".png"])
def test_a_file_that_breaks_off_is_refused(tmp_path: Path, suffix: str) -> None:
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    shown = [picture(k) for k in range(12)]
    if suffix in (".avi", ".mkv"):
        stamped(whole, range(12), Fraction(1, 10))
    elif suffix == ".png":
        shown[0].save(whole, save_all=True, append_images=shown[1:], duration=100)
    else:
        write(whole, shown)
    content = whole.read_bytes()
    end = content.index(b"idx1") if suffix == ".avi" else content.index(b"IEND") if suffix == ".png" else len(content)
    for share in (0.02, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99):
        cut.write_bytes(content[: int(end * share)])
        refused(lambda: read_video(cut), str(cut))
        refused(lambda: video_info(cut), str(cut))
    cut.write_bytes(content[: int(end * 0.9)])
    silent = suffix in (".avi", ".webp")  # their decoders do not say where
    refused(lambda: read_video(cut), "" if silent else "cut off at frame")


@pytest.mark.parametrize("suffix", [".webm", ".avi", ".gif"])
def test_a_file_that_breaks_off_between_two_frames_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip{suffix}"
    if suffix == ".avi":
        stamped(path, range(12), Fraction(1, 10))
        ends = [at for at in range(path.stat().st_size) if path.read_bytes()[at : at + 4] == b"00dc"][6:11]
    else:
        write(path, [picture(k) for k in range(12)])
        mark = b"\xa3" if suffix == ".webm" else b"\x21\xf9\x04"
        ends = [at for at in range(path.stat().st_size) if path.read_bytes()[at:].startswith(mark)][4:]
    content = path.read_bytes()
    assert ends
    for end in ends:
        path.write_bytes(content[:end])
        refused(lambda: read_video(path), str(path))


def test_a_damaged_frame_is_named_when_it_is_its_turn(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", [picture(k) for k in range(40)], quality=100)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + (len(content) - content.index(b"mdat")) * 2 // 3
    content[start : start + 400] = bytes(range(200)) * 2
    path.write_bytes(content)
    assert video_info(path).frames == 40
    refused(lambda: read_video(path), str(path), "at frame")
    read: list[Image.Image] = []
    refused(lambda: read.extend(iterate_video(path)), str(path))
    assert all(psnr(frame, picture(k)) > 28 for k, frame in enumerate(read))


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp"])
def test_crafted_files_give_an_error_of_ours_or_none(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"clip{suffix}", [picture(k) for k in range(6)], comment="x" * 50)
    content, random = path.read_bytes(), np.random.default_rng(0)
    outcomes = set()
    for _ in range(25):
        damaged = bytearray(content)
        for at in random.integers(0, len(content), 8):
            damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        is_video(path)
        try:
            video_comment(path)
            with read_video(path) as frames:
                outcomes.add(len(frames) > 1)
        except MahlstickError:
            outcomes.add(None)
    assert None in outcomes and False not in outcomes


# --- all or nothing


@pytest.mark.parametrize("suffix", TARGETS)
@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path, suffix: str, stop: type[BaseException]) -> None:
    path = tmp_path / f"clip{suffix}"
    with pytest.raises(stop), VideoWriter(path, 8, SIZE, comment="a") as writer:
        for k in range(5):
            writer.write(picture(k))
        assert not path.exists()
        raise stop
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_there_stays_until_the_new_is_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), VideoWriter(path, 8, SIZE) as writer:
        writer.write(picture(0))
        raise RuntimeError
    assert path.read_bytes() == b"before"
    write(path, [picture(0), picture(1)])
    assert video_info(path).frames == 2
    assert list(tmp_path.iterdir()) == [path]


def without_frames(path: Path) -> None:
    with VideoWriter(path, 8, SIZE):
        pass


def test_bad_frames_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    for suffix in TARGETS:
        path = tmp_path / f"clip{suffix}"
        refused(lambda path=path: without_frames(path), str(path), "no frame")
        refused(lambda path=path: write(path, [picture(0), grey(0)]), "frame 2", "16x16, not 48x32")
    assert list(tmp_path.iterdir()) == []


def test_targets_that_do_not_do_are_refused_before_any_work(tmp_path: Path) -> None:
    def check(path: Path, *words: str, fps: float = 8, size: tuple[int, int] = SIZE, **options: Any) -> None:
        refused(lambda: VideoWriter(path, fps, size, **options), *words)

    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("")
    full = tmp_path / "full"
    full.mkdir()
    (full / "0001.png").write_text("")
    for path, words in {
        "clip.flv": ("clip.flv", ".mp4, .mov, .webm, .gif or .webp"),
        "folder.mp4": ("folder.mp4", "is a folder"),
        "file/clip.mp4": ("file", "choose another place"),
        "file": ("file", "choose another place"),
        "full": ("full", "something in it"),
    }.items():
        refused(lambda path=path: check_video_target(tmp_path / path), *words)
        check(tmp_path / path, *words)
    check(tmp_path / "a.mp4", "fps", fps=0)
    check(tmp_path / "a.gif", "50 frames a second", fps=60)
    check(tmp_path / "a.webp", "90 frames a second", fps=100)
    check(tmp_path / "a.mp4", "quality", quality=0)
    check(tmp_path / "a.mp4", "0x16", size=(0, 16))
    check(tmp_path / "a.mp4", "nowhere.mp3", "does not exist", audio=tmp_path / "nowhere.mp3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.mp4", "full"]


def test_new_and_empty_folders_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/deep/clip", "other/clip.mp4"):
        assert video_info(write(tmp_path / name, [picture(0), picture(1)])).frames == 2
    assert sorted(file.name for file in (tmp_path / "empty").iterdir()) == ["0001.png", "0002.png"]


# --- sound


def sound(path: Path, codec: str, seconds: int = 2, rate: int = 48000, video: bool = False) -> Path:
    with av.open(str(path), "w") as container:
        if video:
            pictures = container.add_stream("libvpx-vp9" if path.suffix == ".webm" else "libx264", rate=8)
            pictures.width, pictures.height, pictures.pix_fmt = 16, 16, "yuv420p"
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        if video:
            for k in range(8 * seconds):
                container.mux(pictures.encode(av.VideoFrame.from_image(grey(k)).reformat(format="yuv420p")))
            container.mux(pictures.encode(None))
        wave = np.sin(np.arange(seconds * rate) * 2 * np.pi * 440 / rate) * 12000
        frame = av.AudioFrame.from_ndarray(np.repeat(wave.astype(np.int16), 2)[None], format="s16", layout="stereo")
        frame.sample_rate, frame.pts = rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def loudness(path: Path) -> tuple[float, float]:
    """How long the sound is, in seconds, and where its spectrum peaks, in Hz."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
        rate, layout = container.streams.audio[0].rate, container.streams.audio[0].layout.nb_channels
    wave = np.concatenate([frame[0] if frame.shape[0] == layout else frame[0, ::layout] for frame in frames], axis=-1)
    spectrum = np.abs(np.fft.rfft(wave))
    return len(wave) / rate, float(np.argmax(spectrum) * rate / len(wave))


@pytest.mark.parametrize(("name", "codec"), [("in.mp4", "aac"), ("in.mp3", "libmp3lame"), ("in.ts", "aac")])
def test_sound_is_copied_packet_by_packet(tmp_path: Path, name: str, codec: str) -> None:
    source = sound(tmp_path / name, codec, video=name != "in.mp3")
    path = write(tmp_path / "out.mp4", [grey(k) for k in range(16)], audio=source)
    assert video_info(path).has_audio and video_info(path).frames == 16
    given, taken = packets(source), packets(path)
    if name == "in.ts":  # its packets have a header that an .mp4 has once for all
        given = [packet[7:] for packet in given]
    assert len(taken) >= len(given) - 2
    assert taken == given[: len(taken)]
    assert loudness(path) == (pytest.approx(2, abs=0.1), pytest.approx(440, abs=3))


def test_sound_ends_with_the_clip(tmp_path: Path) -> None:
    source = sound(tmp_path / "in.mp4", "aac", video=True)
    path = write(tmp_path / "out.mp4", [grey(k) for k in range(8)], audio=source)
    assert packets(path) == packets(source)[: len(packets(path))]
    assert loudness(path)[0] == pytest.approx(1, abs=0.05)
    longer = write(tmp_path / "longer.mp4", [grey(k) for k in range(32)], audio=source)
    assert video_info(longer).frames == 32
    assert packets(longer) == packets(source)


@pytest.mark.parametrize(("name", "codec", "rate"), [("in.mp4", "aac", 44100), ("in.wav", "pcm_s16le", 16000)])
@pytest.mark.parametrize(("suffix", "becomes"), [(".webm", "opus"), (".mp4", "aac"), (".mov", "aac")])
def test_other_sound_is_encoded_anew(
    tmp_path: Path, name: str, codec: str, rate: int, suffix: str, becomes: str
) -> None:
    source = sound(tmp_path / name, codec, rate=rate)
    path = write(tmp_path / f"out{suffix}", [grey(k) for k in range(8)], audio=source)
    with av.open(str(path)) as container:
        assert container.streams.audio[0].codec_context.codec.canonical_name == becomes
    assert loudness(path) == (pytest.approx(1, abs=0.07), pytest.approx(440, abs=3))


def test_silence_is_ignored(tmp_path: Path) -> None:
    shown = [picture(0), picture(1)]
    silent, loud = write(tmp_path / "silent.mp4", shown), sound(tmp_path / "loud.mp4", "aac")
    folder = write(tmp_path / "folder", shown)
    for target, source in (("a.mp4", silent), ("b.mp4", folder), ("c.gif", loud), ("d.webp", loud), ("e", loud)):
        assert not video_info(write(tmp_path / target, shown, audio=source)).has_audio
    (tmp_path / "text.mp3").write_text("no sound")
    refused(lambda: write(tmp_path / "f.mp4", shown, audio=tmp_path / "text.mp3"), "text.mp3")
    assert not (tmp_path / "f.mp4").exists()


def test_the_cover_of_a_song_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        (cover.width, cover.height), cover.pix_fmt = SIZE, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 48000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        container.mux(cover.encode(av.VideoFrame.from_image(picture(0)).reformat(format="yuvj420p")))
        container.mux(cover.encode(None))
    refused(lambda: video_info(path), "song.mp4", "no video stream")
    assert video_info(write(tmp_path / "clip.mp4", [picture(0), picture(1)], audio=path)).has_audio
