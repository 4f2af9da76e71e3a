"""Nodes for pictures: load, save, scale, crop, blend, filter, batch. Names and behaviour are ComfyUI's."""

from __future__ import annotations

import itertools
import math
import mimetypes
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

from mahlstick import pictures
from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders, progress
from mahlstick.nodes.files import PngText, Prompt, check_file, chosen_file, digest, listing, new_files, texts, whole
from mahlstick.nodes.resample import (
    composite,
    from_picture,
    not_empty,
    paired,
    repeat_to,
    resample,
    resized_mask,
    to_picture,
)
from mahlstick.nodes.schema import Returned, Socket, Widget, node
from mahlstick.nodes.values import ImageT, MaskT

#: The longest side of a picture, in pixels, that ComfyUI's nodes take.
MAX_SIDE = 16384

Side = Annotated[int, Widget(min=0, max=MAX_SIDE, step=1)]
ShownSide = Annotated[int, Widget(min=1, max=MAX_SIDE, step=1)]
ImageList = Annotated[list[Tensor], Socket("IMAGE")]
PictureMethod = Literal["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]
Crop = Literal["disabled", "center"]
Rotation = Literal["none", "90 degrees", "180 degrees", "270 degrees"]
Mirror = Literal["x-axis: vertically", "y-axis: horizontally"]
Prefix = Annotated[
    str, Widget(tooltip="Begins the file's name; may hold folders, %date:yyyy-MM-dd% or %Node name.input%.")
]

TURNS = {"none": 0, "90 degrees": 1, "180 degrees": 2, "270 degrees": 3}


# Files


def _pictures_in(folder: Path) -> list[str]:
    files = [each.name for each in folder.iterdir() if each.is_file()] if folder.is_dir() else []
    return sorted(name for name in files if (mimetypes.guess_type(name, strict=False)[0] or "").startswith("image/"))


InputPicture = Annotated[str, Widget(choices=lambda: _pictures_in(folders.current().input), upload=True)]
OutputPicture = Annotated[
    str, Widget(choices=lambda: [f"{name} [output]" for name in _pictures_in(folders.current().output)], upload=True)
]


def preview(images: Tensor, prompt: Prompt, extra_pnginfo: PngText) -> dict[str, Any]:
    """Saves pictures to the temporary folder; returns what the page shows."""
    prefix = f"ComfyUI_temp_{uuid.uuid4().hex[:5]}"
    return _save_pngs(images, "temp", prefix, prompt, extra_pnginfo, compress_level=1)


def _save_pngs(
    images: Tensor,
    kind: Literal["output", "temp"],
    prefix: str,
    prompt: Prompt,
    extra_pnginfo: PngText,
    compress_level: int,
) -> dict[str, Any]:
    # Not pictures.save_png: its iTXt chunks are not what ComfyUI's page reads a workflow from.
    info = PngInfo()
    for key, value in texts(prompt, extra_pnginfo).items():
        info.add_text(key, value)
    root = getattr(folders.current(), kind)
    paths = new_files(root, prefix, ".png", count=len(images), size_wh=_size_wh(images), prompt=prompt)
    for index, (path, image) in enumerate(zip(paths, images, strict=True)):
        with whole(path) as unfinished:
            to_picture(image).save(unfinished, format="PNG", pnginfo=info, compress_level=compress_level)
        progress.report(index + 1, len(images))
    return {"images": [listing(path, kind) for path in paths]}


def _save_animation(images: Tensor, prefix: str, suffix: str, prompt: Prompt, **options: Any) -> dict[str, Any]:
    (path,) = new_files(folders.current().output, prefix, suffix, size_wh=_size_wh(images), prompt=prompt)
    first, *others = [to_picture(image) for image in not_empty(images)]
    with whole(path) as unfinished:
        first.save(unfinished, save_all=True, append_images=others, **options)
    return {"images": [listing(path, "output")], "animated": (len(images) > 1,)}


def _size_wh(images: Tensor) -> tuple[int, int]:
    return images.shape[2], images.shape[1]


# Load and save


def _load(name: str) -> tuple[Tensor, Tensor]:
    """The frames of a picture ``(batch, height, width, 3)``, and 1 - alpha; if opaque, ``(batch, 64, 64)`` zeros."""
    frames = _frames(chosen_file(name))
    images = [_colours(frame) for frame in frames]
    clear = [_transparency(frame) for frame in frames]
    size = images[0].shape[:2] if any(each is not None for each in clear) else (64, 64)
    masks = [torch.zeros(size) if each is None else each for each in clear]
    return torch.stack(images), torch.stack(masks)


def _frames(path: Path) -> list[Image.Image]:
    """Upright, and all of the first one's size."""
    pictures.load_picture(path, name="image")  # refuses what is no picture, or too large, before frames are kept
    try:
        with Image.open(path) as opened:
            several = opened.format != "MPO"  # a camera's second picture is another view or size, not a frame
            shown = ImageSequence.Iterator(opened) if several else [opened]
            frames = [ImageOps.exif_transpose(frame) for frame in shown]
    except Exception as error:  # decoders fail on later frames in every way there is
        raise MahlstickError(f"image {str(path)!r} is damaged ({error}); save or download it again") from error
    return [frame for frame in frames if frame.size == frames[0].size]


def _colours(frame: Image.Image) -> Tensor:
    """``(height, width, 3)``; what is transparent keeps the colour it has underneath."""
    opaque = frame.convert("RGBA").convert("RGB") if frame.has_transparency_data else frame
    return from_picture(pictures.load_picture(opaque))


def _transparency(frame: Image.Image) -> Tensor | None:
    if not frame.has_transparency_data:
        return None
    return 1.0 - from_picture(frame.convert("RGBA").getchannel("A"))


_FROM_FILE: dict[str, Any] = {"check": lambda image: check_file(image), "fingerprint": lambda image: digest(image)}


@node("image", display_name="Load Image", **_FROM_FILE)
def LoadImage(*, image: InputPicture) -> tuple[ImageT, MaskT]:
    """A picture from the input folder, turned as its EXIF says; the mask is 1 where it is transparent.

    An animation gives its frames as a batch. Without transparency the mask is 64 x 64 zeros.
    """
    return _load(image)


@node("mask", display_name="Load Image (as Mask)", **_FROM_FILE)
def LoadImageMask(*, image: InputPicture, channel: Literal["alpha", "red", "green", "blue"]) -> MaskT:
    """One channel of a picture as a mask; of alpha, 1 where the picture is transparent."""
    pixels, mask = _load(image)
    if channel != "alpha":
        return pixels[..., ("red", "green", "blue").index(channel)]
    return mask if mask.shape == pixels.shape[:3] else pixels.new_zeros(pixels.shape[:3])


@node("image", display_name="Load Image (from Outputs)", **_FROM_FILE)
def LoadImageOutput(*, image: OutputPicture) -> tuple[ImageT, MaskT]:
    """A picture from the output folder."""
    return _load(image)


@node("image", display_name="Save Image", is_output=True, outputs=("images",))
def SaveImage(
    *, images: ImageT, filename_prefix: Prefix = "ComfyUI", prompt: Prompt = None, extra_pnginfo: PngText = None
) -> ImageT | Returned:
    """Saves the pictures to the output folder as PNG, numbered, with the workflow inside."""
    shown = _save_pngs(images, "output", filename_prefix, prompt, extra_pnginfo, compress_level=4)
    return Returned((images,), ui=shown)


@node("image", display_name="Preview Image", is_output=True, outputs=("images",))
def PreviewImage(*, images: ImageT, prompt: Prompt = None, extra_pnginfo: PngText = None) -> ImageT | Returned:
    """Shows the pictures; they are kept in the temporary folder."""
    return Returned((images,), ui=preview(images, prompt, extra_pnginfo))


@node("image/animation", is_output=True, outputs=("images",))
def SaveAnimatedWEBP(
    *,
    images: ImageT,
    filename_prefix: str = "ComfyUI",
    fps: Annotated[float, Widget(min=0.01, max=1000.0, step=0.01)] = 6.0,
    lossless: bool = True,
    quality: Annotated[int, Widget(min=0, max=100)] = 80,
    method: Literal["default", "fastest", "slowest"],
    prompt: Prompt = None,
    extra_pnginfo: PngText = None,
) -> ImageT | Returned:
    """Saves the pictures as the frames of one WebP, with the workflow in its EXIF."""
    exif = Image.Exif()
    model, make = 0x0110, 0x010F  # the tags where ComfyUI looks for the prompt, and from where down for the rest
    others = itertools.count(make, -1)
    for key, value in texts(prompt, extra_pnginfo).items():
        exif[model if key == "prompt" else next(others)] = f"{key}:{value}"
    effort = {"default": 4, "fastest": 0, "slowest": 6}[method]
    options = {"lossless": lossless, "quality": quality, "method": effort, "exif": exif, "duration": int(1000 / fps)}
    shown = _save_animation(images, filename_prefix, ".webp", prompt, format="WEBP", **options)
    return Returned((images,), ui=shown)


@node("image/animation", is_output=True, outputs=("images",))
def SaveAnimatedPNG(
    *,
    images: ImageT,
    filename_prefix: str = "ComfyUI",
    fps: Annotated[float, Widget(min=0.01, max=1000.0, step=0.01)] = 6.0,
    compress_level: Annotated[int, Widget(min=0, max=9)] = 4,
    prompt: Prompt = None,
    extra_pnginfo: PngText = None,
) -> ImageT | Returned:
    """Saves the pictures as the frames of one PNG, with the workflow inside."""
    info = PngInfo()
    for key, value in texts(prompt, extra_pnginfo).items():
        info.add(b"comf", key.encode() + b"\0" + value.encode(), after_idat=True)  # ComfyUI's chunk for animations
    options = {"pnginfo": info, "compress_level": compress_level, "duration": int(1000 / fps)}
    shown = _save_animation(images, filename_prefix, ".png", prompt, format="PNG", **options)
    return Returned((images,), ui=shown)


# Size and place


def _scaled(image: Tensor, width: int, height: int, method: str, crop: str = "disabled") -> Tensor:
    return resample(image.movedim(-1, 1), width, height, method, crop).movedim(1, -1)


@node("image/upscaling", display_name="Upscale Image")
def ImageScale(
    *, image: ImageT, upscale_method: PictureMethod, width: Side = 512, height: Side = 512, crop: Crop
) -> ImageT:
    """Scales pictures to a size in pixels; a width or height of 0 follows from the other."""
    before_wh = _size_wh(image)
    if width == 0 and height == 0:
        return image
    width = width or max(1, round(before_wh[0] * height / before_wh[1]))
    height = height or max(1, round(before_wh[1] * width / before_wh[0]))
    return _scaled(image, width, height, upscale_method, crop)


@node("image/upscaling", display_name="Upscale Image By")
def ImageScaleBy(
    *,
    image: ImageT,
    upscale_method: PictureMethod,
    scale_by: Annotated[float, Widget(min=0.01, max=8.0, step=0.01)] = 1.0,
) -> ImageT:
    """Scales pictures by a factor."""
    width, height = _size_wh(image)
    return _scaled(image, round(width * scale_by), round(height * scale_by), upscale_method)


@node("image/upscaling", display_name="Scale Image to Total Pixels")
def ImageScaleToTotalPixels(
    *,
    image: ImageT,
    upscale_method: PictureMethod,
    megapixels: Annotated[float, Widget(min=0.01, max=16.0, step=0.01)] = 1.0,
    resolution_steps: Annotated[int, Widget(min=1, max=256, optional=True)] = 1,
) -> ImageT:
    """Scales pictures to a number of pixels, in units of 1024 x 1024, with sides that are multiples of a step."""
    width, height = _size_wh(image)
    factor = math.sqrt(megapixels * 1024 * 1024 / (width * height)) / resolution_steps
    sides = [round(side * factor) * resolution_steps for side in (width, height)]
    return _scaled(image, sides[0], sides[1], upscale_method)


@node("image/transform", display_name="Crop Image")
def ImageCrop(*, image: ImageT, width: ShownSide = 512, height: ShownSide = 512, x: Side = 0, y: Side = 0) -> ImageT:
    """The part of the pictures that begins at (x, y); at their edge it is smaller."""
    left, top = min(x, image.shape[2] - 1), min(y, image.shape[1] - 1)
    return image[:, top : top + height, left : left + width]


@node("image/transform", display_name="Rotate Image")
def ImageRotate(*, image: ImageT, rotation: Rotation) -> ImageT:
    """Turns pictures clockwise."""
    return torch.rot90(image, TURNS[rotation], dims=(2, 1))


@node("image/transform", display_name="Flip Image")
def ImageFlip(*, image: ImageT, flip_method: Mirror) -> ImageT:
    """Turns pictures upside down, or mirrors them."""
    return image.flip(1 if flip_method.startswith("x") else 2)


Padding = Annotated[int, Widget(min=0, max=MAX_SIDE, step=8)]


@node("image/transform", display_name="Pad Image for Outpainting")
def ImagePadForOutpaint(
    *,
    image: ImageT,
    left: Padding = 0,
    top: Padding = 0,
    right: Padding = 0,
    bottom: Padding = 0,
    feathering: Side = 40,
) -> tuple[ImageT, MaskT]:
    """Adds grey around the pictures, and the mask that is 1 there.

    Within ``feathering`` pixels of an added side the mask falls to 0 with the square of the distance, unless the
    pictures are no larger than twice that.
    """
    height, width = image.shape[1:3]
    padded = F.pad(image, (0, 0, left, right, top, bottom), value=0.5)
    inside = torch.zeros(height, width)
    if 0 < 2 * feathering < min(height, width):
        down = torch.minimum(_distance(height, top), _distance(height, bottom, from_end=True))
        across = torch.minimum(_distance(width, left), _distance(width, right, from_end=True))
        inside = ((feathering - torch.minimum(down[:, None], across)) / feathering).clamp(min=0) ** 2
    return padded, F.pad(inside, (left, right, top, bottom), value=1.0)[None]


def _distance(length: int, added: int, *, from_end: bool = False) -> Tensor:
    """Of each place from a side that was added to, in pixels; infinite from one that was not."""
    if not added:
        return torch.full((length,), math.inf)
    counted = torch.arange(length, dtype=torch.float32)
    return length - counted if from_end else counted


@node("image", display_name="Image Composite Masked")
def ImageCompositeMasked(
    *,
    destination: ImageT,
    source: ImageT,
    x: Side = 0,
    y: Side = 0,
    resize_source: bool = False,
    mask: MaskT | None = None,
) -> ImageT:
    """Lays the source on the destination at (x, y), where the mask says so; it is scaled to the source's size."""
    above = _with_channels(source, destination.shape[-1]).movedim(-1, 1)
    below = destination.movedim(-1, 1)
    if resize_source:
        above = F.interpolate(above, size=below.shape[-2:], mode="bilinear")
    weight = None if mask is None else resized_mask(mask, above.shape[-2:])
    return composite(below, above, x, y, weight).movedim(1, -1)


def _with_channels(image: Tensor, channels: int) -> Tensor:
    """With as many channels: alpha is dropped, or added opaque."""
    return F.pad(image, (0, channels - image.shape[-1]), value=1.0)


# Batches


@node("image/batch", display_name="Batch Images")
def ImageBatch(*, image1: ImageT, image2: ImageT) -> ImageT:
    """Both as one batch; the second are scaled and cropped to the size of the first."""
    channels = max(image1.shape[-1], image2.shape[-1])
    first, second = _with_channels(image1, channels), _with_channels(image2, channels)
    if first.shape[1:] != second.shape[1:]:
        second = _scaled(second, *_size_wh(first), "bilinear", "center")
    return torch.cat([first, second])


@node("image/batch", display_name="Get Image from Batch")
def ImageFromBatch(
    *,
    image: ImageT,
    batch_index: Annotated[int, Widget(min=-MAX_SIDE, max=MAX_SIDE)] = 0,
    length: Annotated[int, Widget(min=1, max=4096)] = 1,
) -> ImageT:
    """Some pictures of a batch, from an index on; a negative one counts from the end."""
    first = batch_index + len(image) if batch_index < 0 else batch_index
    first = max(0, min(len(image) - 1, first))
    return image[first : first + length]


@node("image/batch", display_name="Repeat Image Batch")
def RepeatImageBatch(*, image: ImageT, amount: Annotated[int, Widget(min=1, max=4096)] = 1) -> ImageT:
    """The batch, several times over."""
    return repeat_to(image, len(image) * amount)


@node("image/batch", display_name="Rebatch Images", takes_lists=True, lists=(True,))
def RebatchImages(*, images: ImageList, batch_size: Annotated[list[int], Widget(min=1, max=4096)]) -> ImageList:
    """Batches of another size, from all the pictures of a list."""
    if len({batch.shape[1:] for batch in images}) > 1:
        raise MahlstickError("images have several sizes, and a batch has one; scale them to the same size first.")
    every = [each for batch in images for each in batch.split(1)]
    return [torch.cat(every[first : first + batch_size[0]]) for first in range(0, len(every), batch_size[0])]


@node("image", display_name="Get Image Size", outputs=("width", "height", "batch_size"))
def GetImageSize(*, image: ImageT) -> tuple[int, int, int]:
    """The pictures' width and height in pixels, and their number."""
    return *_size_wh(image), len(image)


# Colour


@node("image", display_name="Empty Image")
def EmptyImage(
    *,
    width: ShownSide = 512,
    height: ShownSide = 512,
    batch_size: Annotated[int, Widget(min=1, max=4096)] = 1,
    color: Annotated[int, Widget(min=0, max=0xFFFFFF, step=1)] = 0,
) -> ImageT:
    """Pictures of one colour, given as 0xRRGGBB."""
    levels = torch.tensor([color >> 16 & 255, color >> 8 & 255, color & 255]) / 255
    return levels.expand(batch_size, height, width, 3).clone()


@node("image/color", display_name="Invert Image Colors")
def ImageInvert(*, image: ImageT) -> ImageT:
    """The negative of the pictures; their transparency stays."""
    return torch.cat([1.0 - image[..., :3], image[..., 3:]], dim=-1)


@node("image/filters", display_name="Blend Images")
def ImageBlend(
    *,
    image1: ImageT,
    image2: ImageT,
    blend_factor: Annotated[float, Widget(min=0.0, max=1.0, step=0.01)] = 0.5,
    blend_mode: Literal["normal", "multiply", "screen", "overlay", "soft_light", "difference"],
) -> ImageT:
    """Mixes the first pictures with what a blend mode makes of both; the second are scaled to the first. The
    transparency is that of the first."""
    above = _with_channels(image2, image1.shape[-1])
    if image1.shape[1:3] != above.shape[1:3]:
        above = _scaled(above, *_size_wh(image1), "bicubic", "center")
    below, above = paired(image1, above)
    mixed = (below * (1 - blend_factor) + _BLENDS[blend_mode](below, above) * blend_factor).clamp(0, 1)
    return torch.cat([mixed[..., :3], below[..., 3:]], dim=-1)


def _overlay(below: Tensor, above: Tensor) -> Tensor:
    return torch.where(below <= 0.5, 2 * below * above, 1 - 2 * (1 - below) * (1 - above))


def _soft_light(below: Tensor, above: Tensor) -> Tensor:
    """As the W3C's compositing specification has it."""
    lightened = torch.where(below <= 0.25, ((16 * below - 12) * below + 4) * below, below.sqrt())
    darker = below - (1 - 2 * above) * below * (1 - below)
    return torch.where(above <= 0.5, darker, below + (2 * above - 1) * (lightened - below))


_BLENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "normal": lambda below, above: above,
    "multiply": torch.mul,
    "screen": lambda below, above: 1 - (1 - below) * (1 - above),
    "overlay": _overlay,
    "soft_light": _soft_light,
    "difference": torch.sub,
}


@node("image/filters", display_name="Blur Image")
def ImageBlur(
    *,
    image: ImageT,
    blur_radius: Annotated[int, Widget(min=1, max=31, step=1)] = 1,
    sigma: Annotated[float, Widget(min=0.1, max=10.0, step=0.1)] = 1.0,
) -> ImageT:
    """A Gaussian blur over a square; ``sigma`` is a multiple of ``blur_radius``."""
    return _convolved(image, _gaussian(blur_radius, sigma))


@node("image/filters", display_name="Sharpen Image")
def ImageSharpen(
    *,
    image: ImageT,
    sharpen_radius: Annotated[int, Widget(min=1, max=31, step=1)] = 1,
    sigma: Annotated[float, Widget(min=0.1, max=10.0, step=0.01)] = 1.0,
    alpha: Annotated[float, Widget(min=0.0, max=5.0, step=0.01)] = 1.0,
) -> ImageT:
    """Adds ten ``alpha`` times what a Gaussian blur over a square would take away."""
    kernel = -10 * alpha * _gaussian(sharpen_radius, sigma)
    kernel[sharpen_radius, sharpen_radius] += 1 - kernel.sum()
    return _convolved(image, kernel).clamp(0, 1)


def _gaussian(radius: int, sigma: float) -> Tensor:
    """``(2 radius + 1, 2 radius + 1)`` weights that sum to 1; ``sigma`` is a multiple of the radius."""
    squared = torch.linspace(-1, 1, 2 * radius + 1) ** 2
    weights = (-(squared[:, None] + squared) / (2 * sigma**2)).exp()
    return weights / weights.sum()


def _convolved(image: Tensor, kernel: Tensor) -> Tensor:
    radius = len(kernel) // 2
    width, height = _size_wh(image)
    if radius >= min(width, height):
        raise MahlstickError(f"a radius of {radius} needs pictures larger than {width}x{height}; give a smaller one.")
    channels = image.shape[-1]
    padded = F.pad(image.movedim(-1, 1), (radius,) * 4, mode="reflect")
    weights = kernel.to(image).expand(channels, 1, -1, -1)
    return F.conv2d(padded, weights, groups=channels).movedim(1, -1)


@node("image/filters", display_name="Quantize Image")
def ImageQuantize(
    *,
    image: ImageT,
    colors: Annotated[int, Widget(min=1, max=256, step=1)] = 256,
    dither: Literal["none", "floyd-steinberg", "bayer-2", "bayer-4", "bayer-8", "bayer-16"],
) -> ImageT:
    """Pictures of few colours, each with a palette of its own."""
    quantized = torch.stack(
        [from_picture(_quantized(to_picture(each), colors, dither)) for each in not_empty(image)[..., :3]]
    )
    return torch.cat([quantized, image[..., 3:]], dim=-1)


def _quantized(picture: Image.Image, colors: int, dither: str) -> Image.Image:
    palette = picture.quantize(colors)
    if dither.startswith("bayer"):
        levels = np.asarray(picture, np.float32)
        entries = len(palette.getpalette() or ()) // 3
        pattern = 512 / entries * _bayer(int(dither.removeprefix("bayer-"))) + 0.5
        repeats = [-(-side // len(pattern)) for side in levels.shape[:2]]
        tiled = np.tile(pattern, repeats)[: levels.shape[0], : levels.shape[1], None]
        picture = Image.fromarray((levels + tiled).clip(0, 255).astype(np.uint8))
    error = Image.Dither.FLOYDSTEINBERG if dither == "floyd-steinberg" else Image.Dither.NONE
    return picture.quantize(palette=palette, dither=error).convert("RGB")


def _bayer(side: int) -> np.ndarray[Any, Any]:
    """``(side, side)`` thresholds of ordered dithering about 0, for a power of two (Bayer 1973)."""
    if side == 1:
        return np.zeros((1, 1), np.float32)
    coarse, step = _bayer(side // 2), 1 / side**2
    return np.block([[coarse - 1.5 * step, coarse + 0.5 * step], [coarse + 1.5 * step, coarse - 0.5 * step]])
