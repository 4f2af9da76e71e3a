"""Nodes for latents: encode, decode, scale, combine, batch, save. Names and behaviour are ComfyUI's.

Latents flow as the autoencoder gives them, without its scaling factor. Their nodes count in pixels, eight for one
latent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders, progress
from mahlstick.nodes.builtin.images import MAX_SIDE, TURNS, Crop, Mirror, Rotation
from mahlstick.nodes.files import PngText, Prompt, check_file, chosen_file, digest, listing, new_files, texts, whole
from mahlstick.nodes.resample import composite, not_empty, paired, ramp, repeat_to, resample, resized_mask
from mahlstick.nodes.schema import Returned, Socket, Widget, node
from mahlstick.nodes.values import ConditioningT, ImageT, LatentT, MaskT, Vae, VaeT

LatentMethod = Literal["nearest-exact", "bilinear", "area", "bicubic", "bislerp"]
LatentList = Annotated[list[dict[str, Any]], Socket("LATENT")]
Position = Annotated[int, Widget(min=0, max=MAX_SIDE, step=8)]
TileSize = Annotated[int, Widget(min=64, max=4096, step=32)]
Overlap = Annotated[int, Widget(min=0, max=4096, step=32, optional=True)]
VideoFrames = Annotated[int, Widget(min=8, max=4096, step=4, optional=True, tooltip="For autoencoders of video only.")]
VideoOverlap = Annotated[int, Widget(min=4, max=4096, step=4, optional=True, tooltip="For autoencoders of video only.")]

_FACTOR = 8


@node("latent", display_name="Empty Latent Image")
def EmptyLatentImage(
    *,
    width: Annotated[int, Widget(min=16, max=MAX_SIDE, step=8)] = 512,
    height: Annotated[int, Widget(min=16, max=MAX_SIDE, step=8)] = 512,
    batch_size: Annotated[int, Widget(min=1, max=4096)] = 1,
) -> LatentT:
    """Empty latents to begin from, for pictures of a size in pixels."""
    samples = torch.zeros(batch_size, 4, height // _FACTOR, width // _FACTOR)
    # By this a sampler tells how to make the same for a model of another autoencoder.
    return {"samples": samples, "downscale_ratio_spacial": _FACTOR}


# Encode and decode


def encode(vae: Vae, pixels: Tensor) -> Tensor:
    """The latents of an IMAGE, float32: the mean of the autoencoder's distribution, of the part that fits its factor.

    What is beyond a multiple of the factor is cut off evenly.
    """
    return _each(lambda grid: _encoded(vae, grid), _fitting(vae, pixels))


def decode(vae: Vae, samples: Tensor) -> Tensor:
    """The IMAGE of latents."""
    return _as_image(_each(lambda latents: _decoded(vae, latents), samples))


@node("latent", display_name="VAE Decode")
def VAEDecode(*, samples: LatentT, vae: VaeT) -> ImageT:
    """Makes pictures of latents."""
    return decode(vae, samples["samples"])


@node("latent", display_name="VAE Decode (Tiled)")
def VAEDecodeTiled(
    *,
    samples: LatentT,
    vae: VaeT,
    tile_size: TileSize = 512,
    overlap: Overlap = 64,
    temporal_size: VideoFrames = 64,
    temporal_overlap: VideoOverlap = 8,
) -> ImageT:
    """Makes pictures of latents in tiles, with less memory. Not quite the same as in one piece."""
    tile, shared = tile_size // vae.factor, min(overlap, tile_size // 4) // vae.factor
    return _as_image(_tiled(lambda grid: _decoded(vae, grid), samples["samples"], tile, shared, vae.factor))


@node("latent", display_name="VAE Encode")
def VAEEncode(*, pixels: ImageT, vae: VaeT) -> LatentT:
    """Makes latents of pictures; what is beyond a multiple of 8 pixels is cut off evenly."""
    return {"samples": encode(vae, pixels)}


@node("latent", display_name="VAE Encode (Tiled)")
def VAEEncodeTiled(
    *,
    pixels: ImageT,
    vae: VaeT,
    tile_size: Annotated[int, Widget(min=64, max=4096, step=64)] = 512,
    overlap: Overlap = 64,
    temporal_size: VideoFrames = 64,
    temporal_overlap: VideoOverlap = 8,
) -> LatentT:
    """Makes latents of pictures in tiles, with less memory. Not quite the same as in one piece."""
    halved = 2 * vae.factor  # half a tile is whole latents, too
    tile, shared = tile_size // halved * halved, min(overlap, tile_size // 4) // vae.factor * vae.factor
    latents = _tiled(lambda grid: _encoded(vae, grid), _fitting(vae, pixels), tile, shared, 1 / vae.factor)
    return {"samples": latents}


@node("latent/inpaint", display_name="VAE Encode (for Inpainting)")
def VAEEncodeForInpaint(
    *, pixels: ImageT, vae: VaeT, mask: MaskT, grow_mask_by: Annotated[int, Widget(min=0, max=64, step=1)] = 6
) -> LatentT:
    """Makes latents of pictures that are grey where the mask is, with the mask, grown, for the sampler."""
    grid, mask = _cropped(vae, pixels, mask)
    side = max(1, grow_mask_by)
    grown = F.max_pool2d(mask.round(), side, stride=1, padding=side // 2)[..., : mask.shape[-2], : mask.shape[-1]]
    return {"samples": _each(lambda each: _encoded(vae, each), _greyed(grid, mask)), "noise_mask": grown}


@node("conditioning/inpaint", outputs=("positive", "negative", "latent"))
def InpaintModelConditioning(
    *,
    positive: ConditioningT,
    negative: ConditioningT,
    vae: VaeT,
    pixels: ImageT,
    mask: MaskT,
    noise_mask: bool = True,
) -> tuple[ConditioningT, ConditioningT, LatentT]:
    """For inpainting models: the conditioning carries the pictures, grey where the mask is, and the mask.

    With ``noise_mask`` sampling leaves the rest of the latents as it is.
    """
    grid, mask = _cropped(vae, pixels, mask)
    greyed = _each(lambda each: _encoded(vae, each), _greyed(grid, mask))
    added = {"concat_latent_image": greyed, "concat_mask": mask}
    conditionings = [[[text, options | added] for text, options in each] for each in (positive, negative)]
    latent = {"samples": encode(vae, pixels)} | ({"noise_mask": mask} if noise_mask else {})
    return conditionings[0], conditionings[1], latent


def _encoded(vae: Vae, grid: Tensor) -> Tensor:
    """Latents of ``(batch, 3, height, width)`` in [0, 1]."""
    autoencoder = vae.autoencoder
    with torch.no_grad():
        moments = autoencoder.encode((2 * grid - 1).to(autoencoder.device, autoencoder.dtype))
    return moments.latent_dist.mode().float().cpu()


def _decoded(vae: Vae, latents: Tensor) -> Tensor:
    """``(batch, 3, height, width)`` about [-1, 1]."""
    autoencoder = vae.autoencoder
    channels = autoencoder.config.latent_channels
    if latents.shape[1] != channels:
        raise MahlstickError(
            f"samples have {latents.shape[1]} channels and the VAE takes {channels}; choose another VAE."
        )
    with torch.no_grad():
        return autoencoder.decode(latents.to(autoencoder.device, autoencoder.dtype)).sample.float().cpu()


def _as_image(decoded: Tensor) -> Tensor:
    return ((decoded + 1) / 2).clamp(0, 1).movedim(1, -1)


def _each(function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """One after the other, so that a batch needs no more memory than one."""
    done = []
    for index, item in enumerate(not_empty(batch).split(1)):
        done.append(function(item))
        progress.report(index + 1, len(batch))
    return torch.cat(done)


def _fitting(vae: Vae, pixels: Tensor) -> Tensor:
    """The middle of an IMAGE whose sides are multiples of the factor, as ``(batch, 3, height, width)``."""
    grid = pixels[..., :3].movedim(-1, 1)
    for dim in (2, 3):
        over = grid.shape[dim] % vae.factor
        if over == grid.shape[dim]:
            raise MahlstickError(f"pictures of {pixels.shape[2]}x{pixels.shape[1]} are too small; give larger ones.")
        grid = grid.narrow(dim, over // 2, grid.shape[dim] - over)
    return grid


def _cropped(vae: Vae, pixels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The part of the pictures that fits, and of the mask, scaled to the pictures first: ``(batch, 1 or 3, h, w)``."""
    return _fitting(vae, pixels), _fitting(vae, resized_mask(mask, pixels.shape[1:3]).movedim(1, -1))


def _greyed(grid: Tensor, mask: Tensor) -> Tensor:
    grid, mask = paired(grid, mask)
    return (grid - 0.5) * (1 - mask.round()) + 0.5


def _tiled(function: Callable[[Tensor], Tensor], batch: Tensor, tile: int, shared: int, ratio: float) -> Tensor:
    """The mean of three tilings, wide, tall and square, so that no seam is in all of them.

    The function makes of an area one that is ``ratio`` as long; tiles have ``shared`` places in common.
    """
    shapes = (tile // 2, tile * 2), (tile * 2, tile // 2), (tile, tile)
    tilings = [_tiles(batch, shape, shared) for shape in shapes]
    total, done = len(batch) * sum(map(len, tilings)), itertools.count(1)

    def counted(area: Tensor) -> Tensor:
        made = function(area)
        progress.report(next(done), total)
        return made

    fade = round(shared * ratio)
    tiled = [
        [_put_together(counted, item, tiles, fade, ratio) for tiles in tilings] for item in not_empty(batch).split(1)
    ]
    return torch.cat([torch.stack(each).mean(dim=0) for each in tiled])


def _tiles(grid: Tensor, tile: tuple[int, int], shared: int) -> list[tuple[slice, slice]]:
    """Rows and columns of each tile; the last ones are smaller."""

    def along(side: int, length: int) -> list[slice]:
        starts = range(0, side - shared, length - shared) if side > length else [0]
        return [slice(start, min(start + length, side)) for start in starts]

    return list(itertools.product(along(grid.shape[-2], tile[0]), along(grid.shape[-1], tile[1])))


def _put_together(
    function: Callable[[Tensor], Tensor], grid: Tensor, tiles: list[tuple[slice, slice]], fade: int, ratio: float
) -> Tensor:
    """What the function makes of each tile, in its place; where tiles overlap they fade into one another."""
    parts = [function(grid[..., rows, columns]) for rows, columns in tiles]
    total = torch.zeros(*parts[0].shape[:2], *(round(side * ratio) for side in grid.shape[-2:]))
    weights = torch.zeros_like(total)
    for part, tile in zip(parts, tiles, strict=True):
        rows, columns = (slice(round(each.start * ratio), round(each.stop * ratio)) for each in tile)
        down, across = (ramp(side, fade, fade) if fade < side else torch.ones(side) for side in part.shape[-2:])
        weight = down[:, None] * across
        total[..., rows, columns] += part * weight
        weights[..., rows, columns] += weight
    return total / weights


# Masks for sampling


@node("latent/inpaint", display_name="Set Latent Noise Mask")
def SetLatentNoiseMask(*, samples: LatentT, mask: MaskT) -> LatentT:
    """Lets the sampler change the latents only where the mask is."""
    return samples | {"noise_mask": mask.reshape(-1, 1, *mask.shape[-2:])}


# Size and place


@node("latent", display_name="Upscale Latent")
def LatentUpscale(
    *, samples: LatentT, upscale_method: LatentMethod, width: Position = 512, height: Position = 512, crop: Crop
) -> LatentT:
    """Scales latents to a size in pixels, at least 64; a width or height of 0 follows from the other."""
    rows, columns = samples["samples"].shape[-2:]
    if width == 0 and height == 0:
        return samples
    smallest = 64
    wide, high = max(smallest, width), max(smallest, height)
    if width == 0:
        wide = max(smallest, round(columns * high / rows))
    elif height == 0:
        high = max(smallest, round(rows * wide / columns))
    return _changed(samples, lambda grid: resample(grid, wide // _FACTOR, high // _FACTOR, upscale_method, crop))


@node("latent", display_name="Upscale Latent By")
def LatentUpscaleBy(
    *,
    samples: LatentT,
    upscale_method: LatentMethod,
    scale_by: Annotated[float, Widget(min=0.01, max=8.0, step=0.01)] = 1.5,
) -> LatentT:
    """Scales latents by a factor."""
    rows, columns = samples["samples"].shape[-2:]
    wide, high = round(columns * scale_by), round(rows * scale_by)
    return _changed(samples, lambda grid: resample(grid, wide, high, upscale_method))


@node("latent/transform", display_name="Rotate Latent")
def LatentRotate(*, samples: LatentT, rotation: Rotation) -> LatentT:
    """Turns latents clockwise."""
    return _changed(samples, lambda grid: torch.rot90(grid, TURNS[rotation], dims=(3, 2)))


@node("latent/transform", display_name="Flip Latent")
def LatentFlip(*, samples: LatentT, flip_method: Mirror) -> LatentT:
    """Turns latents upside down, or mirrors them."""
    return _changed(samples, lambda grid: grid.flip(2 if flip_method.startswith("x") else 3))


@node("latent/transform", display_name="Crop Latent")
def LatentCrop(
    *,
    samples: LatentT,
    width: Annotated[int, Widget(min=64, max=MAX_SIDE, step=8)] = 512,
    height: Annotated[int, Widget(min=64, max=MAX_SIDE, step=8)] = 512,
    x: Position = 0,
    y: Position = 0,
) -> LatentT:
    """The part of the latents that begins at (x, y), in pixels, and no later than 64 pixels before their end."""
    rows, columns = samples["samples"].shape[-2:]
    left, top = (max(0, min(place // _FACTOR, side - 64 // _FACTOR)) for place, side in ((x, columns), (y, rows)))
    return _changed(samples, lambda grid: grid[..., top : top + height // _FACTOR, left : left + width // _FACTOR])


@node("latent", display_name="Latent Composite")
def LatentComposite(
    *, samples_to: LatentT, samples_from: LatentT, x: Position = 0, y: Position = 0, feather: Position = 0
) -> LatentT:
    """Lays latents on others at (x, y); at edges inside the others they fade over ``feather``, all in pixels."""
    below, above = samples_to["samples"], _alike(samples_from["samples"], samples_to["samples"])
    left, top, fade = x // _FACTOR, y // _FACTOR, feather // _FACTOR
    rows, columns = (
        min(length, side - place)
        for length, side, place in zip(above.shape[-2:], below.shape[-2:], (top, left), strict=True)
    )
    above = above[..., : max(0, rows), : max(0, columns)]
    down = ramp(above.shape[-2], fade if top else 0, fade if top + rows < below.shape[-2] else 0)
    across = ramp(above.shape[-1], fade if left else 0, fade if left + columns < below.shape[-1] else 0)
    return samples_to | {"samples": composite(below, above, left, top, (down[:, None] * across)[None, None])}


@node("latent", display_name="Latent Composite Masked")
def LatentCompositeMasked(
    *,
    destination: LatentT,
    source: LatentT,
    x: Position = 0,
    y: Position = 0,
    resize_source: bool = False,
    mask: MaskT | None = None,
) -> LatentT:
    """Lays the source on the destination at (x, y), in pixels, where the mask says so; it is scaled to the source."""
    below, above = destination["samples"], _alike(source["samples"], destination["samples"])
    if resize_source:
        above = F.interpolate(above, size=below.shape[-2:], mode="bilinear")
    weight = None if mask is None else resized_mask(mask, above.shape[-2:])
    return destination | {"samples": composite(below, above, x // _FACTOR, y // _FACTOR, weight)}


# Arithmetic


@node("latent", display_name="Latent Blend")
def LatentBlend(
    *,
    samples1: LatentT,
    samples2: LatentT,
    blend_factor: Annotated[float, Widget(min=0, max=1, step=0.01)] = 0.5,
) -> LatentT:
    """Mixes latents: at 1 the first, at 0 the second, which are scaled to the first."""
    first = samples1["samples"]
    first, second = paired(first, _sized(samples2["samples"], first, "bicubic"))
    return samples1 | {"samples": first * blend_factor + second * (1 - blend_factor)}


@node("latent/advanced")
def LatentAdd(*, samples1: LatentT, samples2: LatentT) -> LatentT:
    """The sum; the second are scaled and repeated to match the first."""
    return samples1 | {"samples": samples1["samples"] + _matched(samples2, samples1)}


@node("latent/advanced")
def LatentSubtract(*, samples1: LatentT, samples2: LatentT) -> LatentT:
    """The first without the second, which are scaled and repeated to match the first."""
    return samples1 | {"samples": samples1["samples"] - _matched(samples2, samples1)}


@node("latent/advanced")
def LatentMultiply(
    *, samples: LatentT, multiplier: Annotated[float, Widget(min=-10.0, max=10.0, step=0.01)] = 1.0
) -> LatentT:
    """The latents times a number."""
    return _changed(samples, lambda grid: grid * multiplier)


@node("latent/advanced")
def LatentInterpolate(
    *, samples1: LatentT, samples2: LatentT, ratio: Annotated[float, Widget(min=0.0, max=1.0, step=0.01)] = 1.0
) -> LatentT:
    """Mixes the directions and the lengths of the latents' vectors of channels: at 1 the first, at 0 the second."""
    first, second = samples1["samples"], _matched(samples2, samples1)
    lengths = ratio * first.norm(dim=1, keepdim=True) + (1 - ratio) * second.norm(dim=1, keepdim=True)
    direction = ratio * F.normalize(first, dim=1) + (1 - ratio) * F.normalize(second, dim=1)
    return samples1 | {"samples": F.normalize(direction, dim=1) * lengths}


def _matched(latent: dict[str, Any], wanted: dict[str, Any]) -> Tensor:
    return repeat_to(_sized(latent["samples"], wanted["samples"]), len(wanted["samples"]))


def _sized(samples: Tensor, wanted: Tensor, method: str = "bilinear") -> Tensor:
    """The samples scaled and cropped to the height and width of those that are wanted."""
    if _alike(samples, wanted).shape[2:] == wanted.shape[2:]:
        return samples
    return resample(samples, wanted.shape[-1], wanted.shape[-2], method, "center")


def _alike(samples: Tensor, wanted: Tensor) -> Tensor:
    """The samples, which have the channels of those that are wanted."""
    if samples.shape[1] != wanted.shape[1]:
        raise MahlstickError(
            f"latents of {samples.shape[1]} and of {wanted.shape[1]} channels do not mix; encode both by the same VAE."
        )
    return samples


def _changed(latent: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return latent | {"samples": change(latent["samples"])}


# Batches


@node("latent/batch", display_name="Get Latent From Batch")
def LatentFromBatch(
    *,
    samples: LatentT,
    batch_index: Annotated[int, Widget(min=-MAX_SIDE, max=MAX_SIDE)] = 0,
    length: Annotated[int, Widget(min=1, max=64)] = 1,
) -> LatentT:
    """Some latents of a batch, from an index on; a negative one counts from the end. They keep their noise."""
    count = len(samples["samples"])
    first = max(0, min(count - 1, batch_index + count if batch_index < 0 else batch_index))
    chosen = slice(first, first + length)
    found = _changed(samples, lambda grid: grid[chosen]) | {"batch_index": _indices(samples)[chosen]}
    if len(samples.get("noise_mask", ())) > 1:
        found["noise_mask"] = repeat_to(samples["noise_mask"], count)[chosen]
    return found


@node("latent/batch", display_name="Repeat Latent Batch")
def RepeatLatentBatch(*, samples: LatentT, amount: Annotated[int, Widget(min=1, max=64)] = 1) -> LatentT:
    """The batch, several times over, each time with other noise."""
    count = len(samples["samples"])
    repeated = _changed(samples, lambda grid: repeat_to(grid, count * amount))
    if len(samples.get("noise_mask", ())) > 1:
        repeated["noise_mask"] = repeat_to(repeat_to(samples["noise_mask"], count), count * amount)
    if "batch_index" in samples:
        indices = samples["batch_index"]
        span = max(indices) - min(indices) + 1
        repeated["batch_index"] = [index + time * span for time in range(amount) for index in indices]
    return repeated


@node("latent/batch", display_name="Latent Batch")
def LatentBatch(*, samples1: LatentT, samples2: LatentT) -> LatentT:
    """Both as one batch; the second are scaled and cropped to the size of the first."""
    first = samples1["samples"]
    joined = torch.cat([first, _sized(samples2["samples"], first)])
    return samples1 | {"samples": joined, "batch_index": _indices(samples1) + _indices(samples2)}


@node("latent/advanced")
def LatentBatchSeedBehavior(*, samples: LatentT, seed_behavior: Literal["random", "fixed"] = "fixed") -> LatentT:
    """Gives each of the batch its own noise, or all of them that of the first."""
    if seed_behavior == "random":
        return {key: value for key, value in samples.items() if key != "batch_index"}
    return samples | {"batch_index": _indices(samples)[:1] * len(samples["samples"])}


@node("latent/batch", display_name="Rebatch Latents", takes_lists=True, lists=(True,))
def RebatchLatents(*, latents: LatentList, batch_size: Annotated[list[int], Widget(min=1, max=4096)]) -> LatentList:
    """Batches of another size, from all the latents of a list; where their size changes, a new one begins."""
    items = list(itertools.chain.from_iterable(_items(latents)))
    batches = []
    for _, alike in itertools.groupby(items, key=lambda item: item["samples"].shape):
        run = list(alike)
        batches += [run[first : first + batch_size[0]] for first in range(0, len(run), batch_size[0])]
    return [_joined(batch) for batch in batches]


def _items(latents: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Each latent as a list of its items, each with a mask and an index."""
    before = 0
    for latent in latents:
        samples = not_empty(latent["samples"])
        count, size = len(samples), [side * _FACTOR for side in samples.shape[-2:]]
        mask = resized_mask(latent.get("noise_mask", torch.ones(1, 1, 1, 1)), size)
        indices = latent.get("batch_index", range(before, before + count))
        masks = repeat_to(mask, count).split(1)
        keys = ("samples", "noise_mask", "batch_index")
        yield [dict(zip(keys, item, strict=True)) for item in zip(samples.split(1), masks, indices, strict=True)]
        before += count


def _joined(items: list[dict[str, Any]]) -> dict[str, Any]:
    """One latent of items; a mask that is 1 everywhere is none."""
    joined = {
        "samples": torch.cat([item["samples"] for item in items]),
        "batch_index": [item["batch_index"] for item in items],
    }
    mask = torch.cat([item["noise_mask"] for item in items])
    return joined if (mask == 1).all() else joined | {"noise_mask": mask}


def _indices(latent: dict[str, Any]) -> list[int]:
    """By which place in a batch each item takes its noise."""
    return list(latent.get("batch_index", range(len(latent["samples"]))))


# Files


def _saved_latents() -> list[str]:
    folder = folders.current().input
    return sorted(each.name for each in folder.glob("*.latent") if each.is_file())


@node("latent", display_name="Save Latent", is_output=True, outputs=("samples",))
def SaveLatent(
    *,
    samples: LatentT,
    filename_prefix: str = "latents/ComfyUI",
    prompt: Prompt = None,
    extra_pnginfo: PngText = None,
) -> LatentT | Returned:
    """Saves latents to the output folder, numbered, with the workflow inside."""
    (path,) = new_files(folders.current().output, filename_prefix, ".latent", prompt=prompt)
    # The empty tensor says that these are not multiplied by the scaling factor.
    tensors = {"latent_tensor": samples["samples"].contiguous(), "latent_format_version_0": torch.empty(0)}
    with whole(path) as unfinished:
        save_file(tensors, unfinished, metadata=texts(prompt, extra_pnginfo))
    return Returned((samples,), ui={"latents": [listing(path, "output")]})


@node(
    "latent",
    display_name="Load Latent",
    check=lambda latent: check_file(latent),
    fingerprint=lambda latent: digest(latent),
)
def LoadLatent(*, latent: Annotated[str, Widget(choices=_saved_latents)]) -> LatentT:
    """Latents from the input folder."""
    path = chosen_file(latent)
    try:
        tensors = load_file(path)
        samples = tensors["latent_tensor"].float()
    except (SafetensorError, KeyError) as error:
        raise MahlstickError(f"{latent}: not a file of latents ({error}); save it by Save Latent.") from error
    scaling_factor = 0.18215  # of Stable Diffusion 1, which the first files were multiplied by
    return {"samples": samples if "latent_format_version_0" in tensors else samples / scaling_factor}
