"""Clips in and out, under the names and inputs of VideoHelperSuite's nodes and of ComfyUI's own.

Clips flow as IMAGE batches, and sound as ComfyUI's AUDIO: a dict with ``waveform`` (1, channels, samples) in [-1, 1]
and ``sample_rate``. Files are read and written by `mahlstick.pipelines.video`.
"""

from __future__ import annotations

import json
import tempfile
import wave
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import av
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mahlstick import pictures
from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders, progress
from mahlstick.nodes.builtin.latents import decode
from mahlstick.nodes.files import PngText, Prompt, check_file, chosen_file, listing, new_files, texts, whole
from mahlstick.nodes.resample import from_picture, resample, to_picture
from mahlstick.nodes.schema import Returned, Socket, Widget, node
from mahlstick.nodes.values import ImageT, LatentT, MaskT, Vae, VaeT
from mahlstick.pipelines.video import VideoWriter, iterate_video, open_container, video_info

_VIDEOS = {".webm", ".mp4", ".mkv", ".gif", ".mov", ".webp"}
_SOUNDS = {".wav", ".mp3", ".ogg", ".m4a", ".flac", ".mp4"}
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_MANY = 2**53 - 1
# What VideoHelperSuite calls the files that `VideoWriter` makes.
_SUFFIXES = {
    "image/gif": ".gif",
    "image/webp": ".webp",
    "video/ffmpeg-gif": ".gif",
    "video/h264-mp4": ".mp4",
    "video/webm": ".webm",
}
_SIDES = {"None": 1, "AnimateDiff": 8}  # pixels of which a clip's sides are multiples

Audio = dict[str, Any]
Info = dict[str, float]


@dataclass(frozen=True)
class Video:
    """ComfyUI's VIDEO: frames, an IMAGE, with what they are played with."""

    images: Tensor
    fps: float
    audio: Audio | None = None


AudioT = Annotated[Audio, Socket("AUDIO")]
VideoT = Annotated[Video, Socket("VIDEO")]
InfoT = Annotated[Info, Socket("VHS_VIDEOINFO")]
NamesT = Annotated[tuple[bool, list[str]], Socket("VHS_FILENAMES")]
BatchManagerT = Annotated[Any, Socket("VHS_BatchManager")]

Rate = Annotated[float, Widget(min=0, max=60, step=1)]
Side = Annotated[int, Widget(min=0, max=8192)]
Count = Annotated[int, Widget(min=0, max=_MANY, step=1)]
Every = Annotated[int, Widget(min=1, max=_MANY, step=1)]
OptionalCount = Annotated[int, Widget(min=0, max=_MANY, step=1, optional=True)]
OptionalEvery = Annotated[int, Widget(min=1, max=_MANY, step=1, optional=True)]
Seconds = Annotated[float, Widget(min=0, max=10_000_000, step=0.01, optional=True)]
SizeRule = Annotated[str, Widget(choices=tuple(_SIDES), optional=True)]
Index = Annotated[int, Widget(min=-_MANY, max=_MANY, step=1)]


# what workflows name


def _file(name: str) -> Path:
    """A file of the input folder by what a person wrote: its name there, or its whole path."""
    return chosen_file(_bare(name))


def _bare(name: str) -> str:
    return name.strip().strip('"').removeprefix("input/")


def _stamp(name: str | None) -> str:
    return "" if name is None else folders.stamp(_file(name))


def _check(name: str | None) -> bool | str:
    return name is None or check_file(_bare(name))


def _folder(name: str) -> Path:
    path = folders.inside(folders.current().input, _bare(name))
    if not path.is_dir():
        raise MahlstickError(f"{name}: no such folder in {folders.current().input}; put it there, or choose another.")
    return path


def _stamp_of_folder(directory: str | None) -> str:
    return "" if directory is None else folders.stamp(_folder(directory))


def _files(suffixes: set[str]) -> list[str]:
    root = folders.current().input
    found = root.iterdir() if root.is_dir() else ()
    return sorted(each.name for each in found if each.suffix.lower() in suffixes and each.is_file())


def _directories() -> list[str]:
    root = folders.current().input
    return sorted(each.name for each in root.iterdir() if each.is_dir()) if root.is_dir() else []


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise MahlstickError(f"{name}: clips are read and written whole here; leave it open.")


# reading


def _read_clip(
    path: Path,
    rate: float = 0.0,
    size_wh: tuple[int, int] = (0, 0),
    side: int = 1,
    cap: int = 0,
    skip: int = 0,
    every: int = 1,
) -> tuple[Tensor, Audio | None, Info]:
    """Frames (n, height, width, 3) of a video from number ``skip`` on, their sound, and what is known of both.

    ``rate``: frames a second, 0 as in the file. ``cap``: how many frames at most, 0 all of them. See `_target_size`.
    """
    source = video_info(path)
    assert source.fps is not None  # as a folder has none, and this is a file
    count = len(range(skip, source.frames_at(rate or None), every))
    count = min(count, cap) if cap else count
    if count == 0:
        raise MahlstickError(f"{path}: no frame is left behind the {skip} that are skipped; skip fewer.")
    size = _target_size((source.width, source.height), size_wh, side)
    frames = torch.empty(count, size[1], size[0], 3)
    chosen = islice(iterate_video(path, rate or None), skip, None, every)
    for place, picture in zip(range(count), chosen, strict=False):
        frames[place] = from_picture(pictures.resize(picture, size, "crop"))
        progress.report(place + 1, count)
    rate = rate or float(source.fps)
    sound = _read_sound(path, skip / rate, cap * every / rate) if source.has_audio else None
    info = _described("source", float(source.fps), source.frames, source.width, source.height)
    return frames, sound, info | _described("loaded", rate / every, count, *size)


def _described(which: str, fps: float, frames: int, width: int, height: int) -> Info:
    values = {"fps": fps, "frame_count": frames, "duration": frames / fps, "width": width, "height": height}
    return {f"{which}_{name}": value for name, value in values.items()}


def _target_size(source: tuple[int, int], wanted: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) that are wanted, of which 0 follows the source's shape, in multiples of ``side``."""
    width, height = wanted
    if not width and not height:
        width, height = source
    found = (width or height * source[0] / source[1], height or width * source[1] / source[0])
    across, down = (max(side, int(each / side + 0.5) * side) for each in found)
    return across, down


def _read_sound(path: Path, start: float = 0.0, seconds: float = 0.0) -> Audio | None:
    """The first sound of a file from ``start`` on, ``seconds`` long (0: all); None where it has none."""
    with open_container(path) as container:
        try:
            return _decoded_sound(container, start, seconds) if container.streams.audio else None
        except av.FFmpegError as error:
            raise MahlstickError(f"{path}: its sound is damaged ({error}); save or download it again.") from error


def _decoded_sound(container: Any, start: float, seconds: float) -> Audio | None:
    stream = container.streams.audio[0]
    rate, channels = stream.codec_context.sample_rate, stream.codec_context.layout.nb_channels
    resampler = av.AudioResampler(format="fltp", layout="mono" if channels == 1 else "stereo", rate=rate)
    decoded = chain.from_iterable(resampler.resample(frame) for frame in container.decode(stream))
    samples = [part.to_ndarray() for part in chain(decoded, resampler.resample(None))]
    if not samples:
        return None
    first = round(start * rate)
    last = first + round(seconds * rate) if seconds else None
    waveform = torch.from_numpy(np.concatenate(samples, axis=1))[None, :, first:last]
    return {"waveform": waveform.contiguous(), "sample_rate": rate}


@node(
    "video",
    outputs=("IMAGE", "frame_count", "audio", "video_info"),
    fingerprint=lambda video: _stamp(video),
    check=lambda video: _check(video),
)
def VHS_LoadVideo(
    *,
    video: Annotated[str, Widget(choices=lambda: _files(_VIDEOS))],
    force_rate: Rate = 0,
    custom_width: Side = 0,
    custom_height: Side = 0,
    frame_load_cap: Count = 0,
    skip_first_frames: Count = 0,
    select_every_nth: Every = 1,
    meta_batch: BatchManagerT | None = None,
    vae: VaeT | None = None,
    format: SizeRule = "AnimateDiff",
) -> tuple[ImageT, int, AudioT | None, InfoT]:
    """Loads a video or an animation from the input folder. Frames are taken by their time; 0 leaves rate and size."""
    _refuse(meta_batch=meta_batch, vae=vae)
    frames, sound, info = _read_clip(
        _file(video), force_rate, (custom_width, custom_height), _SIDES[format], frame_load_cap, skip_first_frames,
        select_every_nth,
    )  # fmt: skip
    return frames, len(frames), sound, info


@node(
    "video",
    outputs=("IMAGE", "frame_count", "audio", "video_info"),
    fingerprint=lambda video: _stamp(video),
    check=lambda video: _check(video),
)
def VHS_LoadVideoPath(
    *,
    video: str,
    force_rate: Rate = 0,
    custom_width: Side = 0,
    custom_height: Side = 0,
    frame_load_cap: Count = 0,
    skip_first_frames: Count = 0,
    select_every_nth: Every = 1,
    meta_batch: BatchManagerT | None = None,
    vae: VaeT | None = None,
    format: SizeRule = "AnimateDiff",
) -> tuple[ImageT, int, AudioT | None, InfoT]:
    """As Load Video, by a path, which lies in the input folder."""
    return VHS_LoadVideo.function(
        video=video, force_rate=force_rate, custom_width=custom_width, custom_height=custom_height,
        frame_load_cap=frame_load_cap, skip_first_frames=skip_first_frames, select_every_nth=select_every_nth,
        meta_batch=meta_batch, vae=vae, format=format,
    )  # fmt: skip


def _read_folder(directory: str, cap: int, skip: int, every: int) -> tuple[Tensor, Tensor, int]:
    """The pictures of a folder by name at the size that most have, and a mask of what is transparent."""
    files = sorted(each for each in _folder(directory).iterdir() if each.suffix.lower() in _PICTURES)
    files = files[skip::every][: cap or None]
    if not files:
        raise MahlstickError(f"{directory} has no picture behind the {skip} that are skipped; choose another folder.")
    found = [pictures.load_picture(each, name="frame", alpha=True) for each in files]
    ((size, _),) = Counter(each.size for each in found).most_common(1)
    grids = [from_picture(pictures.resize(each, size, "crop")) for each in found]
    opaque = torch.ones(size[1], size[0])
    masks = [1 - (grid[..., 3] if grid.shape[-1] == 4 else opaque) for grid in grids]
    return torch.stack([grid[..., :3] for grid in grids]), torch.stack(masks), len(grids)


@node("video", outputs=("IMAGE", "MASK", "frame_count"), fingerprint=_stamp_of_folder)
def VHS_LoadImages(
    *,
    directory: Annotated[str, Widget(choices=_directories)],
    image_load_cap: OptionalCount = 0,
    skip_first_images: OptionalCount = 0,
    select_every_nth: OptionalEvery = 1,
    meta_batch: BatchManagerT | None = None,
) -> tuple[ImageT, MaskT, int]:
    """Loads the pictures of a folder in the input folder, in the order of their names, all at the commonest size."""
    _refuse(meta_batch=meta_batch)
    return _read_folder(directory, image_load_cap, skip_first_images, select_every_nth)


@node("video", outputs=("IMAGE", "MASK", "frame_count"), fingerprint=_stamp_of_folder)
def VHS_LoadImagesPath(
    *,
    directory: str,
    image_load_cap: OptionalCount = 0,
    skip_first_images: OptionalCount = 0,
    select_every_nth: OptionalEvery = 1,
    meta_batch: BatchManagerT | None = None,
) -> tuple[ImageT, MaskT, int]:
    """As Load Images, by a path, which lies in the input folder."""
    _refuse(meta_batch=meta_batch)
    return _read_folder(directory, image_load_cap, skip_first_images, select_every_nth)


def _sound_of(name: str, start: float, seconds: float) -> tuple[Audio, float]:
    sound = _read_sound(_file(name), start, seconds)
    if sound is None:
        raise MahlstickError(f"{name} has no sound; choose another file.")
    return sound, sound["waveform"].shape[-1] / sound["sample_rate"]


@node(
    "video",
    outputs=("audio", "duration"),
    fingerprint=lambda audio_file: _stamp(audio_file),
    check=lambda audio_file: _check(audio_file),
)
def VHS_LoadAudio(
    *,
    audio_file: str = "input/",
    seek_seconds: Annotated[float, Widget(min=0, optional=True)] = 0,
    duration: Seconds = 0,
) -> tuple[AudioT, float]:
    """The sound of a file in the input folder, from some second on; 0 seconds are all."""
    return _sound_of(audio_file, seek_seconds, duration)


@node(
    "video", outputs=("audio", "duration"), fingerprint=lambda audio: _stamp(audio), check=lambda audio: _check(audio)
)
def VHS_LoadAudioUpload(
    *,
    audio: Annotated[str, Widget(choices=lambda: _files(_SOUNDS))],
    start_time: Seconds = 0,
    duration: Seconds = 0,
) -> tuple[AudioT, float]:
    """The sound of a file in the input folder, from some second on; 0 seconds are all."""
    return _sound_of(audio, start_time, duration)


_INFO = ("fps", "frame_count", "duration", "width", "height")


@node("video", outputs=tuple(f"{name}🟨" for name in _INFO))
def VHS_VideoInfoSource(*, video_info: InfoT) -> tuple[float, int, float, int, int]:
    """What the file holds."""
    return tuple(video_info[f"source_{name}"] for name in _INFO)  # type: ignore[return-value]


@node("video", outputs=tuple(f"{name}🟦" for name in _INFO))
def VHS_VideoInfoLoaded(*, video_info: InfoT) -> tuple[float, int, float, int, int]:
    """What was loaded of it."""
    return tuple(video_info[f"loaded_{name}"] for name in _INFO)  # type: ignore[return-value]


@node("video", outputs=(*(f"source_{name}🟨" for name in _INFO), *(f"loaded_{name}🟦" for name in _INFO)))
def VHS_VideoInfo(*, video_info: InfoT) -> tuple[float, int, float, int, int, float, int, float, int, int]:
    """What the file holds, and what was loaded of it."""
    return (*VHS_VideoInfoSource(video_info=video_info), *VHS_VideoInfoLoaded(video_info=video_info))


# writing


def _frames(images: Tensor | dict[str, Any], vae: Vae | None) -> tuple[Iterable[Tensor], int]:
    """Pictures (height, width, channels) one by one, of an IMAGE, or of a LATENT with its VAE; and how many."""
    if isinstance(images, Tensor):
        return images.unbind(), len(images)
    if vae is None:
        raise MahlstickError("images are latents: connect the VAE that decodes them.")
    return _decoded(images["samples"], vae), len(images["samples"])


def _decoded(samples: Tensor, vae: Vae) -> Iterator[Tensor]:
    for each in samples.split(1):
        with progress.listening(lambda *_: None):  # it would tell of one frame, and `_write` tells of all
            picture = decode(vae, each)
        yield picture[0]


def _write(
    path: Path, frames: Iterable[Tensor], count: int, fps: float, audio: Audio | None, comment: str | None, quality: int
) -> Image.Image:
    """Writes a clip of ``count`` frames; returns the first."""
    made = (to_picture(frame) for frame in frames)
    first = next(made, None)
    if first is None:
        raise MahlstickError("images is an empty batch; give at least one picture.")
    with _sound_file(audio) as sound:
        with VideoWriter(path, fps, first.size, audio=sound, comment=comment, quality=quality) as writer:
            for place, picture in enumerate(chain([first], made)):
                writer.write(picture)
                progress.report(place + 1, count)
    return first


@contextmanager
def _sound_file(audio: Audio | None) -> Iterator[Path | None]:
    """An AUDIO as a WAV file of 16 bits for as long as the block lasts."""
    if audio is None:
        yield None
        return
    levels = (audio["waveform"][0].float().cpu().clamp(-1, 1) * 32767).round().to(torch.int16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound.wav"
        with wave.open(str(path), "wb") as file:
            file.setnchannels(levels.shape[0])
            file.setsampwidth(2)
            file.setframerate(int(audio["sample_rate"]))
            file.writeframes(levels.T.contiguous().numpy().astype("<i2").tobytes())
        yield path


def _comment(prompt: Prompt, extra: PngText) -> str | None:
    """What a file tells of its making, as one text."""
    told = ({} if prompt is None else {"prompt": prompt}) | (extra or {})
    return json.dumps(told) if told else None


def _quality(crf: float, worst: int) -> int:
    """Of `VideoWriter`, by the codec's own measure, of which ``worst`` stands for no quality at all."""
    return min(100, max(1, round((worst - crf) / 0.4)))


def _save_still(picture: Image.Image, path: Path, prompt: Prompt, extra: PngText) -> None:
    info = PngInfo()
    for key, value in texts(prompt, extra).items():
        info.add_text(key, value)
    with whole(path) as unfinished:
        picture.save(unfinished, format="PNG", pnginfo=info)


@node("video", is_output=True, outputs=("Filenames",), display_name="Video Combine")
def VHS_VideoCombine(
    *,
    images: Annotated[Any, Socket("IMAGE,LATENT")],
    frame_rate: Annotated[float, Widget(min=1, step=1)] = 8,
    loop_count: Annotated[int, Widget(min=0, max=100, step=1)] = 0,
    filename_prefix: str = "AnimateDiff",
    format: Annotated[str, Widget(choices=tuple(_SUFFIXES))] = "image/gif",
    pingpong: bool = False,
    save_output: bool = True,
    audio: AudioT | None = None,
    meta_batch: BatchManagerT | None = None,
    vae: VaeT | None = None,
    crf: Annotated[int, Widget(min=0, max=100, step=1, optional=True)] = 19,
    save_metadata: Annotated[bool, Widget(optional=True)] = True,
    prompt: Prompt = None,
    extra_pnginfo: PngText = None,
) -> NamesT:
    """Writes pictures as a clip, with the workflow in it and, as a picture, beside it. pingpong plays it back as well;
    loop_count plays a video as many times more (a GIF or WebP plays for ever). crf: the lower, the better."""
    _refuse(meta_batch=meta_batch)
    if format not in _SUFFIXES:
        raise MahlstickError(f"format {format!r} is not written here; use {', '.join(_SUFFIXES)}.")
    suffix = _SUFFIXES[format]
    if loop_count and suffix in (".gif", ".webp"):
        raise MahlstickError(f"loop_count is {loop_count}, and a GIF or WebP is written to play for ever; set it to 0.")
    frames, count = _frames(images, vae)
    if pingpong or loop_count:
        once = list(frames)
        frames = [*once, *(once[-2:0:-1] if pingpong else ())] * (1 + loop_count)
        count = len(frames)
    kind: Literal["output", "temp"] = "output" if save_output else "temp"
    (clip,) = new_files(getattr(folders.current(), kind), filename_prefix, suffix, prompt=prompt)
    comment = _comment(prompt, extra_pnginfo) if save_metadata else None
    still = clip.with_suffix(".png")
    first = _write(clip, frames, count, frame_rate, audio, comment, _quality(crf, 53))
    _save_still(first, still, prompt, extra_pnginfo)
    shown = {**listing(clip, kind), "format": format, "frame_rate": frame_rate, "workflow": still.name}
    return Returned(((save_output, [str(still), str(clip)]),), ui={"gifs": [shown]})  # type: ignore[return-value]


@node("video", outputs=("Filename",))
def VHS_SelectFilename(*, filenames: NamesT, index: Annotated[int, Widget(min=-1, step=1)] = -1) -> str:
    """One of the paths that Video Combine wrote."""
    names = filenames[1]
    if not -len(names) <= index < len(names):
        raise MahlstickError(f"index {index}: only {len(names)} files were written.")
    return names[index]


# ComfyUI's own


@node("image/video", display_name="Create Video")
def CreateVideo(
    *, images: ImageT, fps: Annotated[float, Widget(min=1.0, max=120.0, step=1.0)] = 30.0, audio: AudioT | None = None
) -> VideoT:
    """Pictures with the rate at which they are played, and sound."""
    return Video(images, fps, audio)


@node("image/video", display_name="Get Video Components", outputs=("images", "audio", "fps"))
def GetVideoComponents(*, video: VideoT) -> tuple[ImageT, AudioT | None, float]:
    """A video's pictures, sound and rate."""
    return video.images, video.audio, video.fps


@node("image/video", display_name="Load Video", fingerprint=lambda file: _stamp(file), check=lambda file: _check(file))
def LoadVideo(*, file: Annotated[str, Widget(choices=lambda: _files(_VIDEOS))]) -> VideoT:
    """Loads a video or an animation from the input folder."""
    frames, sound, info = _read_clip(_file(file))
    return Video(frames, info["source_fps"], sound)


@node("image/video", display_name="Save Video", is_output=True)
def SaveVideo(
    *,
    video: VideoT,
    filename_prefix: str = "video/ComfyUI",
    format: Annotated[str, Widget(choices=("auto", "mp4"))] = "auto",
    codec: Annotated[str, Widget(choices=("auto", "h264"))] = "auto",
    prompt: Prompt = None,
    extra_pnginfo: PngText = None,
) -> Returned:
    """Writes a video as H.264 in MP4, with the workflow in it."""
    return _saved(video, filename_prefix, ".mp4", prompt, extra_pnginfo)


@node("image/video", is_output=True)
def SaveWEBM(
    *,
    images: ImageT,
    filename_prefix: str = "ComfyUI",
    codec: Annotated[str, Widget(choices=("vp9",))] = "vp9",
    fps: Annotated[float, Widget(min=0.01, max=1000.0, step=0.01)] = 24.0,
    crf: Annotated[float, Widget(min=0, max=63, step=1)] = 32.0,
    prompt: Prompt = None,
    extra_pnginfo: PngText = None,
) -> Returned:
    """Writes pictures as VP9 in WebM, with the workflow in it. crf: the lower, the better."""
    return _saved(Video(images, fps), filename_prefix, ".webm", prompt, extra_pnginfo, _quality(crf, 60))


def _saved(
    video: Video, prefix: str, suffix: str, prompt: Prompt, extra_pnginfo: PngText, quality: int = 90
) -> Returned:
    size = (video.images.shape[2], video.images.shape[1])
    (path,) = new_files(folders.current().output, prefix, suffix, size_wh=size, prompt=prompt)
    comment = _comment(prompt, extra_pnginfo)
    _write(path, video.images.unbind(), len(video.images), video.fps, video.audio, comment, quality)
    return Returned(ui={"images": [listing(path, "output")], "animated": (True,)})


# parts of batches


@node("video", outputs=("IMAGE_A", "A_count", "IMAGE_B", "B_count"))
def VHS_SplitImages(*, images: ImageT, split_index: Index = 0) -> tuple[ImageT, int, ImageT, int]:
    """The pictures before an index, and those from it on."""
    first, second = images[:split_index], images[split_index:]
    return first, len(first), second, len(second)


@node("video", outputs=("LATENT_A", "A_count", "LATENT_B", "B_count"))
def VHS_SplitLatents(*, latents: LatentT, split_index: Index = 0) -> tuple[LatentT, int, LatentT, int]:
    """The latents before an index, and those from it on."""
    count = len(latents["samples"])
    first, second = (_part(latents, range(count)[part]) for part in (slice(split_index), slice(split_index, None)))
    return first, len(first["samples"]), second, len(second["samples"])


def _part(latents: dict[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """Some items of a LATENT, with the tensors that it has for each and the place where each takes its noise."""
    count = len(latents["samples"])
    chosen = torch.tensor(places, dtype=torch.long)
    of_each = {name: value for name, value in latents.items() if isinstance(value, Tensor) and len(value) == count}
    part = latents | {name: value[chosen] for name, value in of_each.items()}
    if "batch_index" in latents:
        part["batch_index"] = [latents["batch_index"][place] for place in places]
    return part


@node("video", outputs=("IMAGE", "count"))
def VHS_MergeImages(
    *,
    images_A: ImageT,
    images_B: ImageT,
    merge_strategy: Annotated[str, Widget(choices=("match A", "match B", "match smaller", "match larger"))] = "match A",
    scale_method: Annotated[
        str, Widget(choices=("nearest-exact", "bilinear", "area", "bicubic", "bislerp"))
    ] = "nearest-exact",
    crop: Annotated[str, Widget(choices=("disabled", "center"))] = "disabled",
) -> tuple[ImageT, int]:
    """Pictures one after the other, at the size of the first, of the second, or of the smaller or larger of both."""
    sizes = [each.shape[1:3] for each in (images_A, images_B)]
    by_area = sorted(sizes, key=lambda size: size[0] * size[1])
    places = {"match A": sizes[0], "match B": sizes[1], "match smaller": by_area[0], "match larger": by_area[1]}
    height, width = places[merge_strategy]
    grids = [
        each if each.shape[1:3] == (height, width)
        else resample(each.movedim(-1, 1), width, height, scale_method, crop).movedim(1, -1)
        for each in (images_A, images_B)
    ]  # fmt: skip
    merged = torch.cat(grids)
    return merged, len(merged)


@node("video", outputs=("count",))
def VHS_GetImageCount(*, images: ImageT) -> int:
    """How many pictures there are."""
    return len(images)


@node("video", outputs=("count",))
def VHS_GetLatentCount(*, latents: LatentT) -> int:
    """How many latents there are."""
    return len(latents["samples"])


@node("video", outputs=("IMAGE", "count"))
def VHS_DuplicateImages(*, images: ImageT, multiply_by: Every = 1) -> tuple[ImageT, int]:
    """All pictures several times, one series after the other."""
    repeated = images.repeat(multiply_by, 1, 1, 1)
    return repeated, len(repeated)


@node("video", outputs=("LATENT", "count"))
def VHS_DuplicateLatents(*, latents: LatentT, multiply_by: Every = 1) -> tuple[LatentT, int]:
    """All latents several times, one series after the other."""
    repeated = _part(latents, list(range(len(latents["samples"]))) * multiply_by)
    return repeated, len(repeated["samples"])


@node("video", outputs=("IMAGE", "count"))
def VHS_SelectEveryNthImage(
    *, images: ImageT, select_every_nth: Every = 1, skip_first_images: Count = 0
) -> tuple[ImageT, int]:
    """Every nth picture."""
    chosen = images[skip_first_images::select_every_nth]
    return chosen, len(chosen)


@node("video", outputs=("LATENT", "count"))
def VHS_SelectEveryNthLatent(
    *, latents: LatentT, select_every_nth: Every = 1, skip_first_latents: Count = 0
) -> tuple[LatentT, int]:
    """Every nth latent."""
    chosen = _part(latents, range(len(latents["samples"]))[skip_first_latents::select_every_nth])
    return chosen, len(chosen["samples"])


@node("video")
def VHS_SelectImages(
    *, image: ImageT, indexes: str = "0", err_if_missing: bool = True, err_if_empty: bool = True
) -> ImageT:
    """Pictures by their numbers, e.g. "0, 2:5, -1" or "::-1"."""
    places = _places(indexes, len(image), err_if_missing)
    if not places and err_if_empty:
        raise MahlstickError(f"indexes {indexes!r} choose nothing of {len(image)} pictures.")
    return image[torch.tensor(places, dtype=torch.long)]


def _places(indexes: str, count: int, strict: bool) -> list[int]:
    """The places of "0, 2:5, -1" in a batch. As in VideoHelperSuite a range is taken first, and its step within it."""
    places: list[int] = []
    for part in filter(None, map(str.strip, indexes.split(","))):
        try:
            numbers = [int(number) if number.strip() else None for number in part.split(":")]
        except ValueError as error:
            raise MahlstickError(
                f"indexes {indexes!r}: {part!r} is no number or range; write e.g. 0, 2:5, -1."
            ) from error
        if len(numbers) > 3 or 0 in numbers[2:]:
            raise MahlstickError(f"indexes {indexes!r}: {part!r} is no range; write e.g. 2:5, or 0:5:2 with a step.")
        if len(numbers) > 1:
            first, last, step = (*numbers, None)[:3]
            places += range(count)[first:last][::step]
        elif numbers[0] is not None and -count <= numbers[0] < count:
            places.append(numbers[0] % count)
        elif strict:
            raise MahlstickError(f"indexes {indexes!r}: {part} is not among {count} pictures, 0 to {count - 1}.")
    return places
