"""Pictures in and out: whatever a person hands over becomes an 8-bit PIL picture, or one clear error."""

from __future__ import annotations

import io
import os
import uuid
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from mahlstick.errors import MahlstickError

if TYPE_CHECKING:
    import numpy as np

    PictureSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any]

ResizeMode = Literal["stretch", "crop", "pad"]

#: Larger pictures are refused from their header, before a pixel is decoded. Stays below Pillow's own
#: limit, which is global to the process and left alone.
MAX_PIXELS = 8192 * 8192

# Decoding these hands the file to another program (Ghostscript, the Windows renderer).
_PROGRAM_FORMATS = {"EPS", "WMF", "EMF"}


def load_picture(source: PictureSource, *, name: str = "picture", alpha: bool = False) -> Image.Image:
    """An RGB picture from a path, a file's bytes, a PIL picture or a NumPy array.

    Arrays are ``(height, width)`` or ``(height, width, channels)`` with 1, 3 or 4 channels, of bool,
    uint8, uint16 or floats in [0, 1]. Files are turned as their EXIF says, animations give their first
    frame, 16 bits are scaled to 8, and transparency shows white; with ``alpha`` it is kept where it varies,
    and the picture is RGBA.

    ``name`` says in errors what the picture is for. Raises MahlstickError for what is missing, damaged,
    no picture, or of more than `MAX_PIXELS` pixels.
    """
    picture = _decode(source, name)
    if picture.mode == "RGBA":
        if alpha and _alpha_varies(picture):
            return picture
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def load_mask(source: PictureSource, *, name: str = "mask") -> Image.Image:
    """A mask of mode L, white where it acts, from the same sources as `load_picture`.

    The alpha channel is the mask where it varies, as painting tools save it; otherwise the brightness is.
    """
    picture = _decode(source, name)
    if picture.mode == "RGBA":
        if _alpha_varies(picture):
            return picture.getchannel("A")
        picture = picture.convert("RGB")
    return picture.convert("L")


def resize(picture: Image.Image, size_wh: tuple[int, int], mode: ResizeMode = "stretch") -> Image.Image:
    """The picture at ``(width, height)`` by Lanczos resampling.

    ``stretch`` ignores the aspect, ``crop`` keeps it and cuts what overhangs evenly, ``pad`` keeps it and
    fills the rest with black, which means "nothing here" to line, edge, depth and pose conditions.
    """
    width, height = size_wh
    if width < 1 or height < 1:
        raise MahlstickError(f"a picture cannot be resized to {width}x{height}; give a width and height of at least 1")
    if mode not in get_args(ResizeMode):
        raise MahlstickError(f"resize mode {mode!r} is unknown; use one of {', '.join(get_args(ResizeMode))}")
    if picture.size == size_wh:
        return picture.copy()
    if mode == "stretch":
        return picture.resize(size_wh, Image.Resampling.LANCZOS)
    if mode == "crop":
        return ImageOps.fit(picture, size_wh, Image.Resampling.LANCZOS)
    ratio = min(width / picture.width, height / picture.height)
    # A hair-thin picture keeps one pixel, where ImageOps.pad would round it away and fail.
    inner = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    padded = Image.new(picture.mode, size_wh)
    padded.paste(picture.resize(inner, Image.Resampling.LANCZOS), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return padded


def aspect_differs(picture: Image.Image, size_wh: tuple[int, int], tolerance: float = 0.02) -> bool:
    """Whether stretching to ``(width, height)`` would distort by more than ``tolerance`` (a fraction)."""
    distortion = (picture.width * size_wh[1]) / (picture.height * size_wh[0])
    return max(distortion, 1 / distortion) > 1 + tolerance


def save_png(picture: Image.Image, path: str | os.PathLike[str], text: dict[str, str] | None = None) -> Path:
    """Write a PNG with text chunks, whole or not at all; missing folders are made. Returns the path."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise MahlstickError(f"{str(path)!r} is to be a PNG; let its name end in .png")
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)  # what pages read; Pillow takes iTXt for other scripts
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            picture.save(unfinished, format="PNG", pnginfo=info)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise MahlstickError(f"{str(path)!r} cannot be written ({reason}); choose another place") from error
    return path


def _alpha_varies(picture: Image.Image) -> bool:
    low, high = picture.getchannel("A").getextrema()
    return low != high


def _decode(source: PictureSource, name: str) -> Image.Image:
    """The source as an upright 8-bit picture of mode L, RGB or RGBA."""
    import numpy as np

    if isinstance(source, (str, os.PathLike)):
        return _from_file(Path(source), f"{name} {os.fspath(source)!r}")
    if isinstance(source, bytes):
        return _from_file(io.BytesIO(source), name)
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        return _eight_bit(source, f"{name} {filename!r}" if filename else name)
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    raise MahlstickError(f"{name} is a {type(source).__name__}; give a path, a PIL picture or a NumPy array")


def _from_file(file: Path | io.BytesIO, label: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns below its own limit and above ours, where ours is about to refuse.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(file)
    except UnidentifiedImageError as error:
        raise MahlstickError(f"{label} is not a picture; give a PNG, JPEG, WebP or another picture file") from error
    except FileNotFoundError as error:
        raise MahlstickError(f"{label} does not exist; check the path") from error
    except IsADirectoryError as error:
        raise MahlstickError(f"{label} is a folder; name a picture in it") from error
    except Image.DecompressionBombError as error:
        raise MahlstickError(_too_large(label)) from error
    except PermissionError as error:
        if isinstance(file, Path) and file.is_dir():  # so Windows says "is a folder"
            raise MahlstickError(f"{label} is a folder; name a picture in it") from error
        raise MahlstickError(f"{label} may not be read; check its permissions") from error
    except Exception as error:  # decoders fail on crafted headers in every way there is
        raise MahlstickError(_damaged(label, error)) from error
    with opened:
        return _eight_bit(opened, label)


def _eight_bit(picture: Image.Image, label: str) -> Image.Image:
    _check_size(picture.width, picture.height, label)
    if picture.format in _PROGRAM_FORMATS:
        raise MahlstickError(f"{label} is {picture.format}, which is not a pixel format; save it as PNG first")
    try:
        picture = ImageOps.exif_transpose(picture)
    except Exception as error:  # decoding happens here, and fails in every way there is
        raise MahlstickError(_damaged(label, error)) from error
    if picture.mode.startswith("I") or picture.mode == "F":
        return _from_array(_deep_pixels(picture, label), label)
    if picture.has_transparency_data:
        return picture.convert("RGBA")
    if picture.mode in ("L", "1"):
        return picture.convert("L")
    return picture.convert("RGB")


def _deep_pixels(picture: Image.Image, label: str) -> np.ndarray[Any, Any]:
    """The pixels of a greyscale picture of more than 8 bits: uint16, or floats."""
    import numpy as np

    pixels = np.asarray(picture)
    if picture.mode == "F":
        return pixels
    if pixels.min() < 0 or pixels.max() > 65535:
        raise MahlstickError(f"{label} has pixels outside 0 to 65535; save it with 8 or 16 bits a channel")
    return pixels.astype(np.uint16)


def _from_array(array: np.ndarray[Any, Any], label: str) -> Image.Image:
    import numpy as np

    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise MahlstickError(
            f"{label} has shape {array.shape}; give (height, width) or (height, width, 1, 3 or 4 channels)"
        )
    _check_size(array.shape[1], array.shape[0], label)
    if array.dtype == np.bool_:
        pixels = array.astype(np.uint8) * 255
    elif array.dtype == np.uint8:
        pixels = array
    elif array.dtype == np.uint16:
        pixels = np.rint(array / 257).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        pixels = _from_unit_range(array, label)
    else:
        raise MahlstickError(f"{label} has dtype {array.dtype}; give uint8, or floats in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _from_unit_range(array: np.ndarray[Any, Any], label: str) -> np.ndarray[Any, Any]:
    import numpy as np

    if not np.isfinite(array).all():
        raise MahlstickError(f"{label} holds NaN or infinite values; give numbers in [0, 1]")
    low, high = float(array.min()), float(array.max())
    rounding = 1e-4
    if low < -rounding or high > 1 + rounding:
        raise MahlstickError(f"{label} holds floats from {low:g} to {high:g}; scale them to [0, 1]")
    pixels: np.ndarray[Any, Any] = np.rint(array.astype(np.float64).clip(0, 1) * 255).astype(np.uint8)
    return pixels


def _check_size(width: int, height: int, label: str) -> None:
    if width < 1 or height < 1:
        raise MahlstickError(f"{label} is empty ({width}x{height}); give a picture of at least one pixel")
    if width * height > MAX_PIXELS:
        raise MahlstickError(_too_large(label, f" ({width}x{height})"))


def _too_large(label: str, size: str = "") -> str:
    return f"{label} is too large{size}; scale it down to at most {MAX_PIXELS / 1e6:.0f} million pixels"


def _damaged(label: str, error: Exception) -> str:
    return f"{label} is damaged or truncated ({error}); save or download it again"
