"""Videos in and out: clips read frame by frame as their time says, and written whole or not at all.

However long a clip is, no more than a few frames of it are in memory: what is read is kept on disk (`Frames`), and
what is written leaves with each frame (`VideoWriter`).

PyAV reads and writes what FFmpeg knows. Animated GIF, WebP and PNG are read with Pillow, since FFmpeg does not read
animated WebP and drops the transparency and comments of the others' frames.
"""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import struct
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeGuard, TypeVar, cast, overload

import av
import numpy as np
from av.audio.layout import AudioLayout
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from PIL import Image, UnidentifiedImageError

from mahlstick import pictures
from mahlstick.errors import MahlstickError
from mahlstick.pictures import MAX_PIXELS, ResizeMode, load_picture, save_png
from mahlstick.pipelines.generate import check_folder

if TYPE_CHECKING:
    from mahlstick.pictures import PictureSource

T = TypeVar("T")
PathLike = str | os.PathLike[str]

#: What `VideoWriter` makes, besides a folder of PNGs.
SUFFIXES = (".mp4", ".mov", ".webm", ".gif", ".webp")

_ANIMATIONS = ("GIF", "WEBP", "PNG")  # Pillow's names
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".ppm"}
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
_FASTEST = {".gif": 50, ".webp": 90}  # browsers play what is marked as faster at 10 frames a second
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
# With faststart, what a player needs stands before the frames; without metadata tags a .mov takes no long text.
_CONTAINER_OPTIONS = {
    ".mp4": {"movflags": "+faststart"},
    ".mov": {"movflags": "+faststart+use_metadata_tags"},
    ".webm": {},
}
# What players take in the container, and what other sound is encoded to.
_SOUND = {
    "mp4": ({"aac", "mp3", "ac3", "alac"}, "aac"),
    "mov": ({"aac", "mp3", "ac3", "alac"}, "aac"),
    "webm": ({"opus", "vorbis"}, "libopus"),
}
_MILLISECOND = Fraction(1, 1000)
_BT709 = 1  # the number of its matrix, primaries and transfer alike (ITU-T H.273)
_EXIF_DESCRIPTION, _EXIF_ORIENTATION = 0x010E, 0x0112
_PNG_COMMENT = "Comment"  # a keyword that the PNG specification registers


class Frames(Sequence[Image.Image]):
    """Frames that lie on disk and are read one at a time: RGB pictures, all of one size.

    They are raw in one file that has no name and goes when this object does, in the folder for temporary files
    (``TMPDIR``). Nothing is mapped: mapped pages would count as the process's memory.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self._count = 0
        self._size: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        if self._size is None:
            raise MahlstickError("there are no frames yet, so they have no size; append one first")
        return self._size

    def append(self, picture: Image.Image) -> None:
        """Adds a frame at the end, on white where it is transparent.

        Raises :class:`MahlstickError` where it has another size than the first, or the disk is full.
        """
        self._size = self._size or picture.size
        if picture.size != self._size:
            raise MahlstickError(f"a frame is {_wh(picture.size)} and the first {_wh(self._size)}; resize it")
        try:
            self._file.seek(self._count * self._bytes)
            self._file.write(load_picture(picture, name="frame").tobytes())
            self._file.flush()
        except OSError as error:
            reason = f"cannot be kept in {tempfile.gettempdir()!r} ({error.strerror or error})"
            raise MahlstickError(f"frame {self._count + 1} {reason}; make room, or set TMPDIR") from error
        self._count += 1

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...

    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self[i] for i in range(self._count)[index]]
        self._file.seek(range(self._count)[index] * self._bytes)
        return Image.frombytes("RGB", self.size, self._file.read(self._bytes))

    @property
    def _bytes(self) -> int:
        return 3 * math.prod(self.size)

    def close(self) -> None:
        """Gives the disk back."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class VideoInfo:
    """What a video holds, counted and not taken from its header.

    Attributes:
        path: the file or folder.
        width: in pixels, as the video is shown: a phone's turn of the picture is done.
        height: likewise.
        fps: frames a second, exact (30000/1001); where they come at uneven times, the average. None for a folder.
        frames: how many there are.
        has_audio: whether there is sound.
        has_alpha: whether frames may be transparent.
        note: what a person should know; empty where there is nothing to say.
    """

    path: Path
    width: int
    height: int
    fps: Fraction | None
    frames: int
    has_audio: bool
    has_alpha: bool
    note: str

    @property
    def seconds(self) -> float | None:
        """From the first frame until the last ends, which lasts as long as the others where they come evenly.

        None for a folder.
        """
        return None if self.fps is None else float(self.frames / self.fps)

    def frames_at(self, fps: float | Fraction | None) -> int:
        """How many frames `iterate_video` gives."""
        rate = _rate(fps)
        return math.ceil(self.frames * rate / self.fps) if rate and self.fps else self.frames


def video_info(path: PathLike) -> VideoInfo:
    """What a video, an animation or a folder of pictures holds.

    A video's packets are read to its end, but for one frame they are not decoded. Raises :class:`MahlstickError` for
    what is missing, no video, broken, empty or a single picture. A file that does not say how long it is (MPEG
    streams) may be cut between two frames without a sign of it.
    """
    return _source(Path(path)).info


def iterate_video(path: PathLike, fps: float | Fraction | None = None) -> Iterator[Image.Image]:
    """The frames of a video, an animation or a folder of pictures one after the other, RGB.

    Frame k is the last whose time is at most k / ``fps``. Without ``fps`` every frame comes once, and of a video with
    uneven times as many as its average rate gives. The pictures of a folder are taken by name (2 before 10), one by
    one whatever ``fps`` is. Transparency shows white.

    Raises :class:`MahlstickError` as `video_info` does, at once, and for a frame that cannot be decoded when it is
    its turn.
    """
    source = _source(Path(path))
    return source.pictures(fps)


def read_video(
    path: PathLike,
    *,
    fps: float | Fraction | None = None,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    resize: ResizeMode = "crop",
) -> Frames:
    """The frames of `iterate_video`, all or the first ``frames``, resized to ``size`` (width, height).

    Raises :class:`MahlstickError` as that does, where there are fewer than ``frames``, and where sizes differ and no
    ``size`` is given.
    """
    source = _source(Path(path))
    held = source.info.frames_at(fps)
    if frames is not None and not 1 <= frames <= held:
        at = f" at {float(fps):g} a second" if fps and source.info.fps else ""
        raise MahlstickError(f"{path} holds {held} frames{at}, and {frames} are asked for; ask for 1 to {held}")
    if size is None:
        source.require_one_size()
    result = Frames()
    try:
        for picture in islice(source.pictures(fps), frames):
            if size is None and result and picture.size != result.size:
                raise _sizes_differ(source.info.path)
            result.append(picture if size is None else pictures.resize(picture, size, resize))
    except BaseException:
        result.close()
        raise
    return result


def is_video(source: object) -> TypeGuard[PathLike]:
    """Whether a source is the path of a folder, or of a file that is no still picture, be it a video or not."""
    try:
        if not isinstance(source, str | os.PathLike) or not Path(source).exists():
            return False
    except OSError:  # a data: URL is too long for a name
        return False
    if Path(source).is_dir():
        return True
    try:
        with _opened_picture(Path(source), formats=None) as picture:
            moves = picture.format in _ANIMATIONS or picture.format == "AVIF"
            return picture.format == "MPEG" or (moves and picture.n_frames > 1)
    except UnidentifiedImageError:
        return True
    except MahlstickError:  # a damaged picture, which opening it will tell
        return False


def video_comment(path: PathLike) -> str | None:
    """The text that `VideoWriter` or another program left in a video, in a folder in its first picture.

    None where there is none. Raises :class:`MahlstickError` for what is missing, damaged or no video.
    """
    path = _existing(Path(path))
    if path.is_dir():
        path = _picture_files(path)[0]
    try:
        with _opened_picture(path) as picture:
            described = str(picture.getexif().get(_EXIF_DESCRIPTION, "")).encode("latin-1", "replace")
            kept = picture.info.get("comment") or picture.info.get(_PNG_COMMENT) or described
            return (kept.decode("utf-8", "replace") if isinstance(kept, bytes) else kept) or None
    except UnidentifiedImageError:
        with open_container(path) as container:
            found = (text for name, text in container.metadata.items() if name.lower() == "comment")
            return next(found, None)


# --- what is read


@dataclass(frozen=True)
class _Source:
    """A video that has been looked through.

    ``frames`` gives each frame's time in seconds from the first, which may be rounded up by ``slack``, and what
    ``picture`` makes a picture of. In a folder a second is a picture.
    """

    info: VideoInfo
    frames: Callable[[], Iterator[tuple[Fraction, Any]]]
    picture: Callable[[Any], Image.Image]
    slack: Fraction = Fraction(0)
    one_size: bool = True

    def pictures(self, fps: float | Fraction | None) -> Iterator[Image.Image]:
        rate = Fraction(1) if self.info.fps is None else _rate(fps) or self.info.fps
        return map(self.picture, islice(_by_time(self.frames(), rate, self.slack), self.info.frames_at(fps)))

    def require_one_size(self) -> None:
        if not self.one_size:
            raise _sizes_differ(self.info.path)


def _by_time(frames: Iterable[tuple[Fraction, T]], fps: Fraction, slack: Fraction) -> Iterator[T]:
    """For k = 0, 1, 2, ... the last frame whose time is at most k / fps + slack; the last of all without end."""
    k, current = 0, None
    for time, frame in frames:
        while current is not None and k / fps + slack < time:
            yield current
            k += 1
        current = frame
    while current is not None:
        yield current


class _Timeline:
    """When frames begin, in seconds from the first, as their time stamps tell, which are rounded to a tick.

    Where the stamps are those of a constant rate but for the rounding, `fps` is that rate, and times are exact; else
    it is the average.
    """

    def __init__(self, starts: Sequence[Fraction], end: Fraction, tick: Fraction, rates: Sequence[Fraction | None]):
        # Without the last frame, of whose time some files say next to nothing.
        apart, seen = {later - start for start, later in pairwise(starts)}, (len(starts) - 1) / starts[-1]
        whole, television = seen.limit_denominator(1), seen.limit_denominator(1) * Fraction(1000, 1001)
        simplest = [seen] if len(apart) == 1 else [whole, television, *map(seen.limit_denominator, (8, 1001))]
        candidates = [*rates, *simplest]
        # Rounded stamps are off by half a tick; by one where the first, from which the rest counts, was rounded too.
        found = (rate for off in (tick / 2, tick) for rate in candidates if rate and _is_even(starts, rate, off))
        even = next(found, None)
        self.even = even is not None
        mean = len(starts) / end
        self.fps = even or mean.limit_denominator(1001) or mean
        self.slack = min(tick, _MILLISECOND) / 2

    def exact(self, start: Fraction) -> Fraction:
        """The time that the stamp ``start`` stands for."""
        return round(start * self.fps) / self.fps if self.even else start

    @property
    def note(self) -> str:
        rate = f"{float(self.fps):.4g}"
        return "" if self.even else f"frames come at uneven times; {rate} a second, the average, are taken by time"


def _is_even(starts: Sequence[Fraction], rate: Fraction, off: Fraction) -> bool:
    allowed = min(off, 1 / (4 * rate))
    return all(abs(start - i / rate) <= allowed for i, start in enumerate(starts))


def _source(path: Path) -> _Source:
    path = _existing(path)
    if path.is_dir():
        return _folder(path)
    try:
        return _animation(path)
    except UnidentifiedImageError:
        return _video(path)


def _folder(path: Path) -> _Source:
    files = _picture_files(path)
    if len(files) == 1:
        raise _one_picture(path)
    sizes, alpha = [], False
    for file in files:
        try:
            with _opened_picture(file, formats=None) as picture:
                sideways = picture.getexif().get(_EXIF_ORIENTATION, 1) >= 5
                sizes.append(picture.size[::-1] if sideways else picture.size)
                alpha = alpha or picture.has_transparency_data
        except UnidentifiedImageError as error:
            raise MahlstickError(f"{file} is not a picture; take it out of the folder") from error
    (width, height), one_size = sizes[0], len(set(sizes)) == 1
    note = "a folder has no frame rate; its pictures are taken one by one"
    note = note if one_size else f"{note}, and differ in size"
    info = VideoInfo(path, width, height, None, len(files), has_audio=False, has_alpha=alpha, note=note)

    def frames() -> Iterator[tuple[Fraction, Path]]:
        return ((Fraction(i), file) for i, file in enumerate(files))

    def load(file: Path) -> Image.Image:
        return load_picture(file, name="frame")

    return _Source(info, frames, load, one_size=one_size)


def _picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder by name, numbers by their value."""

    def by_value(file: Path) -> list[int | str]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name.lower())]

    files = [file for file in folder.iterdir() if file.suffix.lower() in _PICTURES and file.name[0] != "."]
    if not files:
        raise MahlstickError(f"{folder} is a folder without pictures; give a video or a folder of frames")
    return sorted(files, key=by_value)


def _animation(path: Path) -> _Source:
    """A GIF, WebP or PNG, of which every frame is decoded once. Raises UnidentifiedImageError for another file."""
    starts: list[Fraction] = []
    end, alpha = Fraction(0), False
    with _opened_picture(path) as picture:
        (width, height), tick = picture.size, Fraction(1, 100) if picture.format == "GIF" else _MILLISECOND
        first = int(getattr(picture, "default_image", False))  # of a PNG, for those who do not know animations
        try:
            for i in range(first, getattr(picture, "n_frames", 1)):
                picture.seek(i)
                picture.load()
                starts.append(end)
                # As browsers and FFmpeg do: what has next to no time is shown for a tenth of a second.
                lasts = Fraction(picture.info.get("duration") or 0).limit_denominator(1000) * _MILLISECOND
                end += lasts if lasts > 10 * _MILLISECOND else 100 * _MILLISECOND
                alpha = alpha or picture.has_transparency_data
        except Exception as error:  # as in `_opened_picture`
            raise _broken(path, len(starts) + 1) from error
    if _is_short(path):
        raise _broken(path, len(starts) + 1)
    if len(starts) < 2:
        raise _one_picture(path)
    timeline = _Timeline(starts, end, tick, [])
    info = VideoInfo(
        path, width, height, timeline.fps, len(starts), has_audio=False, has_alpha=alpha, note=timeline.note
    )

    def frames() -> Iterator[tuple[Fraction, Image.Image]]:
        with _opened_picture(path) as picture:
            for i, start in enumerate(starts):
                picture.seek(first + i)
                yield timeline.exact(start), load_picture(picture, name="frame")

    return _Source(info, frames, lambda picture: picture, timeline.slack)


@contextmanager
def _opened_picture(path: Path, formats: tuple[str, ...] | None = _ANIMATIONS) -> Iterator[Any]:
    """Pillow's view of a file. Raises UnidentifiedImageError where it is none of the formats."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_check_size` refuses
            picture = Image.open(path, formats=formats)
        with picture:
            _check_size(path, picture.size)
            yield picture
    except (MahlstickError, UnidentifiedImageError):
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(path) from error
    except PermissionError as error:
        raise MahlstickError(f"{path} may not be read; check its permissions") from error
    except Exception as error:  # decoders fail on damaged files in every way there is
        raise _broken(path) from error


def _video(path: Path) -> _Source:
    """Whatever FFmpeg knows: packets are read to the end, and the first frame is decoded."""
    with _opened_video(path) as (container, stream):
        _check_size(path, (stream.width, stream.height))
        rates = [stream.guessed_rate, stream.average_rate]
        rate = next(filter(None, rates), Fraction(25))
        tick, has_audio = stream.time_base or 1 / rate, bool(container.streams.audio)
        stamps, lasts = _packets(path, container, stream)
    if len(stamps) == 1:
        raise _one_picture(path)
    # Streams without a container have no time stamps.
    stamped = [stamp for stamp in stamps if stamp is not None]
    stamped = sorted(stamped) if len(set(stamped)) == len(stamps) else []
    starts = [(stamp - stamped[0]) * tick for stamp in stamped] or [i / rate for i in range(len(stamps))]
    end = starts[-1] + (lasts * tick if stamped and lasts else (starts[-1] - starts[0]) / (len(starts) - 1))
    timeline = _Timeline(starts, end, tick, rates)
    shown = next(_decoded(path), None)
    if shown is None:
        raise _broken(path, 1)
    (width, height), alpha = _picture(shown).size, _has_alpha(shown)
    info = VideoInfo(
        path, width, height, timeline.fps, len(starts), has_audio=has_audio, has_alpha=alpha, note=timeline.note
    )

    def frames() -> Iterator[tuple[Fraction, av.VideoFrame]]:
        for i, frame in enumerate(_decoded(path)):
            if stamped and frame.pts is not None:
                yield timeline.exact((frame.pts - stamped[0]) * tick), frame
            else:
                yield i / rate, frame

    return _Source(info, frames, _picture, timeline.slack)


@contextmanager
def open_container(path: Path) -> Iterator[InputContainer]:
    """A file as FFmpeg sees it, judged by its content alone.

    By name it would take every .txt for a drawing in letters, and a playlist would have it open other files and
    addresses; so it gets no name, and may open nothing.
    """
    try:
        with path.open("rb") as file:
            unnamed = SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
            try:
                opened = av.open(unnamed, "r", options={"protocol_whitelist": "none"}, metadata_errors="replace")
            except av.FFmpegError as error:
                kinds = "give a video, an animation or a folder of frames"
                raise MahlstickError(f"{path} is not a video, or one without its beginning or end; {kinds}") from error
            with opened:
                yield opened
    except PermissionError as error:
        raise MahlstickError(f"{path} may not be read; check its permissions") from error


@contextmanager
def _opened_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    with open_container(path) as container:
        # The cover of a song is a video stream too.
        moving = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not moving:
            raise MahlstickError(f"{path} has no video stream; give a video, an animation or a folder of frames")
        if moving[0].codec_context is None:
            raise MahlstickError(f"{path} is in a format that is not decoded here; convert it to .mp4")
        yield container, moving[0]


def _packets(path: Path, container: InputContainer, stream: VideoStream) -> tuple[list[int | None], int | None]:
    """The time stamp of each frame that is shown, and how long the last lasts. Raises where packets are missing."""
    shown: list[int | None] = []
    total, lasts, latest = 0, None, None
    try:
        for packet in container.demux():
            if packet.is_corrupt:
                raise _broken(path, len(shown) + 1)
            if packet.stream_index != stream.index:
                continue
            total += bool(packet.size) or packet.dts is not None  # the last packet is PyAV's own
            if not packet.size or packet.is_discard:
                continue
            shown.append(packet.pts)
            if packet.pts is not None and (latest is None or packet.pts > latest):
                latest, lasts = packet.pts, packet.duration
    except av.FFmpegError as error:
        raise _broken(path, len(shown) + 1) from error
    # Demuxers say nothing of a file that breaks off between two packets, but these headers tell what is missing.
    if ("mp4" in container.format.name and total < stream.frames) or _is_short(path):
        raise _broken(path, len(shown) + 1)
    if not shown:
        raise MahlstickError(f"{path} holds no frame; give another video")
    return shown, lasts


def _is_short(path: Path) -> bool:
    """Whether a file is shorter than its beginning says, or has no end: Matroska, WebM (RFC 8794), AVI, WebP, GIF."""
    actual = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
        file.seek(max(0, actual - 64))
        tail = file.read()
    if head.startswith(b"GIF8"):
        return not tail.rstrip(b"\0").endswith(b";")
    if head.startswith(b"RIFF"):
        return actual < 8 + int.from_bytes(head[4:8], "little")
    at = head.find(_SEGMENT) + len(_SEGMENT)
    if not head.startswith(_EBML) or not len(_SEGMENT) <= at < len(head):
        return False
    length = 9 - head[at].bit_length()  # of a number whose first bit that is set ends its unary length
    unknown = (1 << 7 * length) - 1
    size = int.from_bytes(head[at : at + length], "big") & unknown
    return size != unknown and actual < at + length + size


def _decoded(path: Path) -> Iterator[av.VideoFrame]:
    count = 0
    with _opened_video(path) as (container, stream):
        decoder = stream.codec_context
        if stream.metadata.get("alpha_mode") == "1":  # which FFmpeg's own decoders of VP8 and VP9 pass over
            decoder = av.VideoCodecContext.create("libvpx-vp9" if decoder.name == "vp9" else "libvpx", "r")
        try:
            for packet in container.demux(stream):
                for frame in decoder.decode(packet):
                    if frame.is_corrupt:
                        raise _broken(path, count + 1)
                    yield frame
                    count += 1
        except av.FFmpegError as error:
            raise _broken(path, count + 1) from error


def _picture(frame: av.VideoFrame) -> Image.Image:
    pixels = frame.to_ndarray(format="rgba" if _has_alpha(frame) else "rgb24")
    picture = load_picture(pixels, name="frame")
    turn = _TURNS.get(frame.rotation % 360)
    return picture if turn is None else picture.transpose(turn)


def _has_alpha(frame: av.VideoFrame) -> bool:
    return any(component.is_alpha for component in frame.format.components)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise MahlstickError(f"{path} does not exist; check the path")
    return path


def _rate(fps: float | Fraction | None) -> Fraction | None:
    return None if fps is None else _checked_rate(fps)


def _checked_rate(fps: float | Fraction) -> Fraction:
    """``fps`` as a fraction that containers can hold: 29.97 is 2997/100."""
    if not 0.01 <= fps <= 1000:
        raise MahlstickError(f"fps is {fps}; give frames a second, from 0.01 to 1000")
    return Fraction(fps).limit_denominator(1001)


def _check_size(path: Path, size: tuple[int, int]) -> None:
    if math.prod(size) > MAX_PIXELS:
        raise _too_large(path)


def _too_large(path: Path) -> MahlstickError:
    return MahlstickError(f"{path} is too large; scale it down to at most {MAX_PIXELS / 1e6:.0f} million pixels")


def _one_picture(path: Path) -> MahlstickError:
    return MahlstickError(f"{path} is one picture; give a video, an animation or a folder of frames")


def _broken(path: Path, frame: int | None = None) -> MahlstickError:
    where = "" if frame is None else f" at frame {frame}"
    return MahlstickError(f"{path} is damaged or cut off{where}; export or download it again")


def _sizes_differ(path: Path) -> MahlstickError:
    return MahlstickError(f"{path} holds frames of different sizes; give the size that they are to have")


def _wh(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


# --- what is written


def check_video_target(path: PathLike) -> None:
    """Raises :class:`MahlstickError` where no video could be written under ``path``, before any frame is made."""
    target = Path(path)
    if not target.suffix:
        if target.is_dir() and any(target.iterdir()):
            raise MahlstickError(f"{path} is a folder with something in it; give a new or an empty one")
        return check_folder(target)
    if target.suffix.lower() not in SUFFIXES:
        known = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise MahlstickError(
            f"{path}: no video is written as {target.suffix}; end in {known}, or name a folder for PNGs"
        )
    if target.is_dir():
        raise MahlstickError(f"{path} is a folder; give another name")
    check_folder(target.parent)


class VideoWriter:
    """Writes a clip frame by frame, whole or not at all: ``with VideoWriter(path, 8, (512, 512)) as writer: ...``.

    The name's end says what is made:

    - .mp4, .mov: H.264 with 4:2:0 colours, which needs even sides: an odd one gets its last row or column twice.
    - .webm: VP9, 4:2:0.
    - .gif: 256 colours, chosen once for the clip, so that still parts do not flicker. Frames wait on disk until all
      are there. At most 50 frames a second.
    - .webp: each frame on its own, with its transparency, so that none has to be kept; libwebp's own encoder of
      animations would hold them all. At most 90 frames a second.
    - none: a new folder of PNGs, 0001.png and so on, with their transparency.

    Where transparency is not kept, white shows. Until the last frame is in, all is in a file or folder with a hidden
    name beside the target, which is removed where an error or an interrupt leaves the ``with``; only a process that is
    killed outright leaves it behind.
    """

    def __init__(
        self,
        path: PathLike,
        fps: float | Fraction,
        size: tuple[int, int],
        *,
        audio: PathLike | None = None,
        comment: str | None = None,
        quality: int = 90,
    ) -> None:
        """
        Args:
            path: the target; missing folders are made.
            fps: frames a second.
            size: (width, height) of every frame.
            audio: a file whose first sound is taken along, from its beginning to the end of the clip: as it is where
                the container has it, else as AAC, in .webm as Opus. A file without sound is ignored, and so is sound
                for GIF, WebP and folders, which have none.
            comment: text that the file keeps and `video_comment` reads; in a folder, its first picture.
            quality: 1 to 100; 90 means crf 17 in H.264 and 24 in VP9. GIF and PNG have none.
        """
        check_video_target(path)
        self.path, rate, suffix = Path(path), _checked_rate(fps), Path(path).suffix.lower()
        if rate > _FASTEST.get(suffix, rate):
            raise MahlstickError(f"{path}: {suffix} shows at most {_FASTEST[suffix]} frames a second; give a lower fps")
        if not 1 <= quality <= 100:
            raise MahlstickError(f"quality is {quality}; give 1 to 100")
        if min(size) < 1 or math.prod(size) > MAX_PIXELS:
            raise MahlstickError(
                f"size is {_wh(size)}; give sides of at least 1 with at most {MAX_PIXELS} pixels in all"
            )
        sound = None if audio is None else _existing(Path(audio))
        self._clip = _Clip(suffix, rate, size, comment, quality, sound)
        self._count = 0

    def __enter__(self) -> Self:
        self._unfinished = self.path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            with _written(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._sink = _SINKS.get(self._clip.suffix, _Stream)(self._unfinished, self._clip)
        except BaseException:
            _remove(self._unfinished)
            raise
        return self

    def write(self, picture: PictureSource) -> None:
        """Adds a frame: any source of `load_picture`; transparency is kept of a PIL picture of mode RGBA.

        Raises :class:`MahlstickError` where it has another size than the clip, or cannot be written.
        """
        keep = self._sink.transparent and isinstance(picture, Image.Image) and picture.mode == "RGBA"
        frame = cast(Image.Image, picture) if keep else load_picture(picture, name="frame")
        if frame.size != self._clip.size:
            sizes = f"{_wh(frame.size)}, not {_wh(self._clip.size)}"
            raise MahlstickError(f"{self.path}: frame {self._count + 1} is {sizes}; resize it")
        with _written(self.path):
            self._sink.write(frame)
        self._count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                return
            if not self._count:
                raise MahlstickError(f"{self.path}: no frame was written; write at least one")
            with _written(self.path):
                self._sink.finish()
                if self.path.is_dir():
                    self.path.rmdir()  # empty, or it would have been refused
                os.replace(self._unfinished, self.path)
        finally:
            with suppress(Exception):  # what went wrong is known already
                self._sink.abandon()
            _remove(self._unfinished)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        raise MahlstickError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Clip:
    suffix: str
    fps: Fraction
    size: tuple[int, int]
    comment: str | None
    quality: int
    audio: Path | None


class _Sink(Protocol):
    """Where frames go. After `finish` the file is whole; `abandon` closes what is open, and may follow `finish`."""

    transparent: bool

    def write(self, picture: Image.Image) -> None: ...

    def finish(self) -> None: ...

    def abandon(self) -> None: ...


class _Pictures:
    transparent = True

    def __init__(self, folder: Path, clip: _Clip) -> None:
        folder.mkdir()
        self._folder, self._count = folder, 0
        self._text = {} if clip.comment is None else {_PNG_COMMENT: clip.comment}

    def write(self, picture: Image.Image) -> None:
        self._count += 1
        save_png(picture, self._folder / f"{self._count:04d}.png", self._text)
        self._text = {}

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class _WebP:
    """Animated WebP (RFC 9649): RIFF chunks, in which a frame is the chunks of a still WebP that Pillow made."""

    transparent = True

    def __init__(self, path: Path, clip: _Clip) -> None:
        self._file, self._clip = path.open("wb"), clip
        self._count, self._alpha = 0, False
        self._file.write(b"RIFF\0\0\0\0WEBP" + self._canvas() + _chunk(b"ANIM", bytes(6)))  # loops for ever

    def write(self, picture: Image.Image) -> None:
        still = io.BytesIO()
        picture.save(still, "WEBP", quality=self._clip.quality)
        parts = [part for part in _chunks(still.getvalue()[12:]) if part[:4] in (b"ALPH", b"VP8 ", b"VP8L")]
        start, end = (round(1000 * k / self._clip.fps) for k in (self._count, self._count + 1))
        whole_picture = bytes(6) + self._sides()  # its corner, and its size
        do_not_blend = b"\2"
        self._file.write(_chunk(b"ANMF", whole_picture + _three(end - start) + do_not_blend + b"".join(parts)))
        self._alpha = self._alpha or picture.mode == "RGBA"
        self._count += 1

    def finish(self) -> None:
        if self._clip.comment is not None:
            exif = Image.Exif()
            exif[_EXIF_DESCRIPTION] = self._clip.comment.encode()
            self._file.write(_chunk(b"EXIF", exif.tobytes().removeprefix(b"Exif\0\0")))
        size = self._file.tell()
        self._file.seek(4)
        self._file.write(struct.pack("<I", size - 8) + b"WEBP" + self._canvas())
        self._file.close()

    def abandon(self) -> None:
        self._file.close()

    def _canvas(self) -> bytes:
        flags = 0x02 | 0x10 * self._alpha | 0x08 * (self._clip.comment is not None)  # animation, alpha, EXIF
        return _chunk(b"VP8X", bytes([flags, 0, 0, 0]) + self._sides())

    def _sides(self) -> bytes:
        return b"".join(_three(side - 1) for side in self._clip.size)


def _three(number: int) -> bytes:
    return number.to_bytes(3, "little")


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def _chunks(content: bytes) -> Iterator[bytes]:
    while content:
        size = 8 + struct.unpack_from("<I", content, 4)[0]
        size += size % 2
        yield content[:size]
        content = content[size:]


class _Gif:
    """Frames are kept on disk, since the palette of a clip is known when its last frame is."""

    transparent = False

    def __init__(self, path: Path, clip: _Clip) -> None:
        self._path, self._clip, self._frames = path, clip, Frames()

    def write(self, picture: Image.Image) -> None:
        self._frames.append(picture)

    def finish(self) -> None:
        with av.open(str(self._path), "w", format="gif") as container:
            stream = container.add_stream("gif", rate=self._clip.fps)
            (stream.width, stream.height), stream.pix_fmt = self._clip.size, "pal8"
            for frame in self._in_palette():
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        if self._clip.comment is not None:
            _insert_gif_comment(self._path, self._clip.comment)

    def abandon(self) -> None:
        self._frames.close()

    def _in_palette(self) -> Iterator[av.VideoFrame]:
        """The frames in one palette. Dithering starts anew only where a picture changes, so that the rest is still."""
        graph = av.filter.Graph()
        sample, tick = self._sample(), 1 / self._clip.fps
        colours, clip = (
            graph.add("buffer", f"video_size={_wh(size)}:pix_fmt=rgb24:time_base={tick}:pixel_aspect=1/1")
            for size in (sample.size, self._clip.size)
        )
        choose, apply = graph.add("palettegen"), graph.add("paletteuse", "dither=sierra2_4a:diff_mode=rectangle")
        result = graph.add("buffersink")
        colours.link_to(choose)
        clip.link_to(apply, input_idx=0)
        choose.link_to(apply, input_idx=1)
        apply.link_to(result)
        graph.configure()
        colours.push(_frame(sample, 0, tick))
        colours.push(None)
        for k in range(len(self._frames) + 1):
            clip.push(_frame(self._frames[k], k, tick) if k < len(self._frames) else None)
            with suppress(av.BlockingIOError, av.EOFError):  # nothing more for now; the end
                while True:
                    yield cast(av.VideoFrame, result.pull())

    def _sample(self) -> Image.Image:
        """At most 64 frames from all over the clip with at most 64 x 64 pixels each, side by side."""
        count = len(self._frames)
        picked = [self._frames[i] for i in sorted({i * count // 64 for i in range(64)})]
        width, height = (min(side, 64) for side in self._clip.size)
        sample = Image.new("RGB", (width * len(picked), height))
        for i, picture in enumerate(picked):
            sample.paste(picture.resize((width, height), Image.Resampling.NEAREST), (i * width, 0))
        return sample


def _insert_gif_comment(path: Path, comment: str) -> None:
    """Behind the header and the global colours, where readers look for it (GIF89a, 24)."""
    content = comment.encode()
    blocks = (content[i : i + 255] for i in range(0, len(content), 255))
    extension = b"\x21\xfe" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"
    longer = path.with_name(f"{path.name}.tmp")
    try:
        with path.open("rb") as old, longer.open("wb") as new:
            header = old.read(13)
            colours = 3 << (header[10] & 7) + 1 if header[10] & 0x80 else 0
            new.write(header + old.read(colours) + extension)
            shutil.copyfileobj(old, new)
        os.replace(longer, path)
    finally:
        longer.unlink(missing_ok=True)


class _Stream:
    """H.264 or VP9 in its container, with sound."""

    transparent = False

    def __init__(self, path: Path, clip: _Clip) -> None:
        crf = round(53 - 0.4 * clip.quality)
        if clip.suffix == ".webm":
            codec, settings = "libvpx-vp9", {"crf": f"{crf + 7}", "b": "0", "cpu-used": "4", "row-mt": "1"}
            self._size = clip.size
        else:
            codec, settings = "libx264", {"crf": f"{crf}"}
            self._size = (clip.size[0] + clip.size[0] % 2, clip.size[1] + clip.size[1] % 2)
        self._tick, self._count = 1 / clip.fps, 0
        self._opened = ExitStack()
        try:
            container = av.open(str(path), "w", format=clip.suffix[1:], options=_CONTAINER_OPTIONS[clip.suffix])
            self._container = self._opened.enter_context(container)
            if clip.comment is not None:
                container.metadata["comment"] = clip.comment
            self._stream = cast(VideoStream, container.add_stream(codec, rate=clip.fps, options=settings))
            (self._stream.width, self._stream.height), self._stream.pix_fmt = self._size, "yuv420p"
            context = self._stream.codec_context
            context.color_range = ColorRange.MPEG
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            self._sound = None if clip.audio is None else _Sound.of(clip.audio, container, self._opened)
        except BaseException:
            self._opened.close()
            raise

    def write(self, picture: Image.Image) -> None:
        frame = _frame(picture, self._count, self._tick, self._size)
        frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
        self._container.mux(self._stream.encode(frame))
        self._count += 1
        if self._sound is not None:
            self._sound.follow(self._count * self._tick)

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        if self._sound is not None:
            self._sound.finish()
        self._opened.close()

    def abandon(self) -> None:
        self._opened.close()


_SINKS: dict[str, Callable[[Path, _Clip], _Sink]] = {"": _Pictures, ".gif": _Gif, ".webp": _WebP}


def _frame(picture: Image.Image, k: int, tick: Fraction, size: tuple[int, int] | None = None) -> av.VideoFrame:
    """Frame k of a clip, up to ``size`` with its last row and column again."""
    pixels = np.asarray(picture)
    if size is not None and size != picture.size:
        pixels = np.pad(pixels, ((0, size[1] - picture.height), (0, size[0] - picture.width), (0, 0)), mode="edge")
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    frame.pts, frame.time_base = k, tick
    return frame


class _Sound:
    """The sound of a file on its way into a clip, no further than the clip has come."""

    def __init__(self, path: Path, source: InputContainer, target: OutputContainer) -> None:
        (stream, *_), (kept, encoder) = source.streams.audio, _SOUND[target.format.name]
        context = stream.codec_context
        self._target, self._start = target, Fraction(source.start_time or 0, av.time_base)
        self._stream: AudioStream
        self._copied = context.codec.canonical_name in kept
        if self._copied:
            self._stream = target.add_stream_from_template(stream)
        else:
            self._stream = cast(AudioStream, target.add_stream(encoder, rate=48000))
            self._stream.codec_context.layout = AudioLayout("mono" if context.layout.nb_channels == 1 else "stereo")
        self._parts = _sound_parts(path, source, stream, self._copied)
        self._next = next(self._parts, None)

    @classmethod
    def of(cls, path: Path, target: OutputContainer, opened: ExitStack) -> _Sound | None:
        """None where the file has no sound; ``opened`` closes what is opened."""
        if path.is_dir():
            return None
        source = opened.enter_context(open_container(path))
        return cls(path, source, target) if source.streams.audio else None

    def follow(self, end: Fraction) -> None:
        """Passes on what begins before ``end``, in seconds."""
        while self._next is not None:
            part = self._next
            tick = cast(Fraction, part.time_base)
            shift = round(self._start / tick)
            if ((part.pts or 0) - shift) * tick >= end:
                return
            for name in ("pts", "dts"):
                if getattr(part, name) is not None:
                    setattr(part, name, getattr(part, name) - shift)
            if isinstance(part, av.Packet):
                part.stream = self._stream
                self._target.mux(part)
            else:
                self._target.mux(self._stream.encode(part))
            self._next = next(self._parts, None)

    def finish(self) -> None:
        if not self._copied:
            self._target.mux(self._stream.encode(None))


def _sound_parts(
    path: Path, source: InputContainer, stream: AudioStream, packets: bool
) -> Iterator[av.Packet[Any] | av.AudioFrame]:
    """The packets of a sound, or what is decoded from them."""
    try:
        for packet in source.demux(stream):
            if not packets:
                yield from packet.decode()
            elif packet.size:
                yield packet
    except av.FFmpegError as error:
        raise MahlstickError(f"{path} has a damaged sound; leave it out, or give another file") from error
