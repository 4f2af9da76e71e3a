"""From a request to pictures, and from a picture's recipe to the same pictures again."""

from __future__ import annotations

import inspect
import os
import re
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from mahlstick.adapters import formats
from mahlstick.errors import MahlstickError
from mahlstick.pictures import aspect_differs, resize, save_png
from mahlstick.pipelines import prompts, recipe, schedulers
from mahlstick.pipelines.attach import attach
from mahlstick.pipelines.load import Loader, adapter_path, for_task, unet_config
from mahlstick.pipelines.recipe import Recipe
from mahlstick.pipelines.request import (
    SEED_LIMIT,
    ControlSpec,
    ImagePromptSpec,
    Request,
    VideoRequest,
    decoded,
    open_mask,
    open_picture,
)
from mahlstick.pipelines.units import Control, ImagePrompt, Unit

EMBEDDED_GUIDANCE = 4.0  # what its model card measures with
INPAINT = "inpaint"  # the annotator whose condition is no picture
REFERENCE_SIDE = 1024  # pixels; image encoders see 224 to 448, and the recipe keeps the picture

_NAMED = re.compile(r"\d{1,9}")

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """The pictures, and the recipe that makes them again."""

    images: list[Image.Image]
    recipe: Recipe

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Writes every picture as a PNG that carries its recipe, each whole or not at all; returns the paths.

        ``out.png`` is replaced where it exists; several pictures become ``out-1.png``, ``out-2.png``, ... Any other
        name is a folder, in which the next free numbers are taken.
        """
        check_target(path)
        targets = self._targets(Path(path))
        for i, (image, target) in enumerate(zip(self.images, targets, strict=True)):
            save_png(image, target, self.recipe.for_image(i).text())
        return targets

    def _targets(self, path: Path) -> list[Path]:
        count = len(self.images)
        if path.suffix.lower() == ".png":
            return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i + 1}") for i in range(count)]
        taken = [int(file.stem) for file in path.glob("*.png") if _NAMED.fullmatch(file.stem)]
        first = max(taken, default=0) + 1
        return [path / f"{first + i:04d}.png" for i in range(count)]


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises :class:`MahlstickError` where pictures could not be saved under ``path``, before any are made."""
    target = Path(path)
    if target.suffix and target.suffix.lower() != ".png":
        raise MahlstickError(f"{path}: the recipe is kept in PNG; end the name in .png, or give a folder")
    if target.suffix and target.is_dir():
        raise MahlstickError(f"{path}: is a folder; give another name")
    check_folder(target.parent if target.suffix else target)


def check_folder(path: Path) -> None:
    """Raises :class:`MahlstickError` where nothing could be written into the folder, which need not be there yet."""
    folder = path
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise MahlstickError(f"{path}: {folder} is no folder that can be written; choose another place")


def generate(
    request: Request,
    *,
    pipe: Any = None,
    loader: Loader | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
    callback: StepCallback | None = None,
) -> Result:
    """Makes the request's pictures.

    Args:
        request: what to make.
        pipe: a diffusers pipeline to use in place of ``request.base``; it comes back as it was.
        loader: keeps bases and adapters between calls; without one nothing is kept.
        device: left open, the best there is; with ``pipe``, where that is.
        dtype: left open, float32 on a CPU and float16 elsewhere; with ``pipe``, that pipeline's.
        progress: show diffusers' progress bar.
        callback: diffusers' ``callback_on_step_end``.

    Picture i is drawn on the CPU from seed + i, so that it is the same on every device up to rounding and, with the
    default ``batch=1``, bit for bit what it would be alone. Raises :class:`MahlstickError` before anything is loaded
    where a picture or an adapter does not do.
    """
    loader = loader or Loader()
    opened = open_pictures(request)
    _check_adapters(opened, None if pipe is None else pipe.unet.config)
    if pipe is None:
        base = loader.pipeline(request.base, device=device, dtype=dtype, config=request.base_config)
    else:
        base = pipe
        opened = opened.model_copy(update={"base": f"<{type(pipe).__name__} in memory>"})
    worker = for_task(base, request.task)
    resolved = _fit_pictures(_resolve(opened, worker))
    schedulers.check_steps(schedulers.build(resolved.scheduler, worker.scheduler), resolved.steps)
    made_by = recipe.describe(resolved, worker._execution_device.type, worker.dtype)
    with prepared(worker, resolved, progress), _attached(resolved, worker, loader):
        images = _run(worker, resolved, callback)
    return Result(images, made_by)


def replay(
    path: str | os.PathLike[str],
    *,
    pipe: Any = None,
    weights: str | os.PathLike[str] | None = None,
    loader: Loader | None = None,
    device: str | None = None,
    progress: bool = True,
) -> list[Image.Image]:
    """Makes the picture of a PNG again from the recipe in it: bit for bit on the same machine and versions.

    ``weights`` is a folder in which files that have moved are searched by name; ``pipe`` stands in for the base.
    Warns where versions or devices differ. Raises :class:`MahlstickError` where the PNG has no recipe, or weights are
    missing or have changed.
    """
    made_by = recipe.read_recipe(path)
    request = recipe.found_again(made_by, str(path), weights, pipe is not None)
    notes = recipe.differences(made_by)
    if device is not None and device != made_by.device:
        notes.append(f"made on {made_by.device}, replayed on {device}")
    if notes:
        warnings.warn(f"{path}: the last bits may differ ({'; '.join(notes)})", stacklevel=2)
    where: dict[str, Any] = {} if pipe is not None else {"device": device or made_by.device, "dtype": made_by.dtype}
    with _threads(made_by.threads):
        images = generate(request, pipe=pipe, loader=loader, progress=progress, **where).images
    return images if made_by.index is None else [images[made_by.index]]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """The order of sums, and so the last bits, can depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def open_pictures(request: Request) -> Request:
    """Every picture of the request as a PIL picture, control pictures through their annotators."""

    def mask(source: Any, name: str) -> Image.Image | None:
        return None if source is None else open_mask(source, name)

    def reference(source: Any, name: str) -> Image.Image:
        picture = open_picture(source, name)
        picture.thumbnail((REFERENCE_SIDE, REFERENCE_SIDE), Image.Resampling.LANCZOS)
        return picture

    def control(spec: ControlSpec, name: str) -> ControlSpec:
        if spec.annotator == INPAINT:
            update: dict[str, Any] = {"image": _with_hole(spec, name)}
        else:
            image = _annotated(spec, name) if spec.annotator else open_picture(spec.image, f"{name} picture")
            # The control picture is what is kept and replayed, not how it was made.
            update = {"image": image, "annotator": None}
        return spec.model_copy(update=update | {"mask": mask(spec.mask, f"{name} mask"), "options": {}})

    def image_prompt(spec: ImagePromptSpec, name: str) -> ImagePromptSpec:
        spec = looked_up(spec, name)
        images = [reference(source, f"{name} picture") for source in spec.images]
        negative = None if spec.negative is None else reference(spec.negative, f"{name} negative")
        update = {"images": images, "mask": mask(spec.mask, f"{name} mask"), "negative": negative}
        return spec.model_copy(update=update)

    return request.model_copy(
        update={
            "init": None if request.init is None else open_picture(request.init, "init"),
            "mask": mask(request.mask, "mask"),
            "controls": [control(spec, f"controls[{i}]") for i, spec in enumerate(request.controls)],
            "image_prompts": [
                image_prompt(spec, f"image_prompts[{i}]") for i, spec in enumerate(request.image_prompts)
            ],
        }
    )


def looked_up(spec: ImagePromptSpec, name: str) -> ImagePromptSpec:
    """An image prompt whose words have found their pictures; any other as it is."""
    if spec.search is None:
        return spec
    from mahlstick.pipelines.library import look_up

    try:
        return look_up(spec)
    except MahlstickError as error:
        raise MahlstickError(f"{name}: {error}") from error


def _with_hole(spec: ControlSpec, name: str) -> Image.Image:
    """The picture, transparent where it is repainted. No PNG holds the -1 of `inpaint_condition`, but it does this."""
    given = dict(spec.options)
    repaint = given.pop("mask", None)
    if given:
        raise MahlstickError(f"{name}: annotator inpaint has no option {min(given)!r}; it takes mask")
    picture = open_picture(spec.image, f"{name} picture", alpha=repaint is None)
    if repaint is not None:
        keep = ImageOps.invert(open_mask(repaint, f"{name} inpaint mask"))
        picture.putalpha(resize(keep, picture.size))
    return _check_hole(picture, name)


def _check_hole(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode != "RGBA" or len(set(picture.getchannel("A").getextrema())) == 1:
        raise MahlstickError(
            f"{name}: inpaint needs a part that is repainted and one that is kept; give options mask=, white where it"
            " is repainted, or a picture that is transparent there"
        )
    return picture


def _annotated(spec: ControlSpec, name: str) -> Image.Image:
    from mahlstick import annotators

    try:
        return annotators.annotate(spec.annotator or "", decoded(spec.image, name), **spec.options)
    except MahlstickError as error:
        raise MahlstickError(f"{name}: {error}") from error


def _check_adapters(request: Request, config: Any) -> None:
    """Kind and base of every adapter from its header, before a tensor is loaded."""
    config = config or unet_config(request.base)
    for field, kind, specs in (
        ("controls", "controlnet", request.controls),
        ("image_prompts", "ip_adapter", request.image_prompts),
    ):
        for i, spec in enumerate(specs):
            if isinstance(spec.adapter, str):
                check_adapter(f"{field}[{i}]", kind, spec.adapter, config)


def check_adapter(field: str, kinds: str | tuple[str, ...], source: str, unet_config: Any) -> None:
    """Raises :class:`MahlstickError` where the weights are of another kind, or for another base than the UNet's.

    ``unet_config`` is None where the UNet is not known yet.
    """
    info, kinds = formats.inspect(adapter_path(source)), (kinds,) if isinstance(kinds, str) else kinds
    if info.kind not in kinds:
        raise MahlstickError(f"{field}: {source} holds a {info.kind}; give a {' or a '.join(kinds)}")
    if unet_config is not None:
        try:
            formats.require_fit(info.kind, info.config, unet_config)
        except MahlstickError as error:
            raise MahlstickError(f"{source}: {error}") from error


def _resolve(request: Request, pipe: Any) -> Request:
    """The request with seeds, size and strength filled in."""
    if pipe.unet.config.in_channels == 9 and request.task != "inpaint":
        raise MahlstickError(f"base: {request.base} is an inpainting model; give init and mask, or another base")
    update: dict[str, Any] = {"strength": request.effective_strength}
    update["guidance"] = guidance(request, pipe)
    if request.seeds is None:
        first = secrets.randbelow(2**32) if request.seed is None else request.seed
        update |= {"seed": None, "seeds": [(first + i) % (SEED_LIMIT + 1) for i in range(request.images)]}
    if request.init is None and request.width is None:
        width, height = own_size(pipe)
        update |= {"width": width, "height": height}
    return request.model_copy(update=update)


def guidance(request: Request | VideoRequest, pipe: Any) -> float:
    """The request's guidance; left open, that of the embedded model's card, or diffusers' default."""
    if request.guidance is not None:
        return request.guidance
    default: float = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    return EMBEDDED_GUIDANCE if request.base == "embedded" else default


def own_size(pipe: Any) -> tuple[int, int]:
    """Width and height that the base was trained for, in pixels."""
    sample = pipe.unet.config.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return width * pipe.vae_scale_factor, height * pipe.vae_scale_factor


def _size(request: Request) -> tuple[int, int]:
    """(width, height) of the result."""
    if request.width is not None and request.height is not None:
        return request.width, request.height
    return request.init.size  # type: ignore[union-attr]


def _fit_pictures(request: Request) -> Request:
    """Init, its mask and the control pictures at the size of the result, which is what the recipe keeps."""
    size = _size(request)
    controls = [_fit_control(spec, size, f"controls[{i}]") for i, spec in enumerate(request.controls)]
    update: dict[str, Any] = {"controls": controls}
    if request.init is not None:
        update["init"] = _fit(request.init, size, "stretch", "init")
    if request.mask is not None:
        update["mask"] = _fit(request.mask, size, "stretch", "mask")
    return request.model_copy(update=update)


def _fit_control(spec: ControlSpec, size: tuple[int, int], name: str) -> ControlSpec:
    image = _fit(spec.image, size, spec.resize, name)
    if spec.annotator == INPAINT:
        _check_hole(image, name)
    return spec.model_copy(update={"image": image, "resize": "stretch"})


def _fit(picture: Image.Image, size: tuple[int, int], mode: Any, name: str) -> Image.Image:
    if mode == "stretch" and aspect_differs(picture, size):
        shapes = f"{picture.width}x{picture.height} is stretched to {size[0]}x{size[1]}"
        way_out = "resize='crop' or 'pad' keeps its shape" if name.startswith("controls") else "give it in that shape"
        warnings.warn(f"{name}: {shapes}; {way_out}", stacklevel=2)
    return resize(picture, size, mode)


@contextmanager
def _attached(request: Request, pipe: Any, loader: Loader) -> Iterator[None]:
    """The request's units on ``pipe``, one at a time, so that an error names the unit that does not fit."""
    units: list[tuple[str, Callable[..., Unit]]] = [
        *((f"controls[{i}]", partial(_control, spec)) for i, spec in enumerate(request.controls)),
        *((f"image_prompts[{i}]", partial(_image_prompt, spec)) for i, spec in enumerate(request.image_prompts)),
    ]
    with ExitStack() as stack:
        for name, build in units:
            try:
                stack.enter_context(attach(pipe, build(request, pipe, loader)))
            except MahlstickError as error:
                raise MahlstickError(f"{name}: {error}") from error
        yield


def _control(spec: ControlSpec, request: Request, pipe: Any, loader: Loader) -> Control:
    image: Any = _padded(spec.image, pipe.vae_scale_factor)
    if spec.annotator == INPAINT:
        from mahlstick.annotators import inpaint_condition

        image = inpaint_condition(image.convert("RGB"), ImageOps.invert(image.getchannel("A")))
    return Control(
        adapter_of(spec, pipe, loader),
        image,
        scale=spec.scale,
        start=spec.start,
        end=spec.end,
        window=spec.window,
        mask=_unit_mask(spec.mask, request, pipe),
        mode=spec.mode,
    )


def _image_prompt(spec: ImagePromptSpec, request: Request, pipe: Any, loader: Loader) -> ImagePrompt:
    return ImagePrompt(
        adapter_of(spec, pipe, loader),
        [spec.images],  # one group, so that no list is taken for one reference a picture
        scale=spec.scale,
        start=spec.start,
        end=spec.end,
        window=spec.window,
        mask=_unit_mask(spec.mask, request, pipe),
        blocks=spec.blocks,
        negative=spec.negative,
        resize=spec.resize,
        prompt=request.prompt,
    )


def adapter_of(spec: ControlSpec | ImagePromptSpec, pipe: Any, loader: Loader) -> Any:
    """``image_encoder`` is None where the adapter or the pipeline brings its own."""
    if not isinstance(spec.adapter, str):
        return spec.adapter
    encoder = getattr(spec, "image_encoder", None)
    return loader.adapter(adapter_path(spec.adapter), image_encoder=encoder, dtype=pipe.dtype, base=pipe.unet)


def _unit_mask(picture: Image.Image | None, request: Request, pipe: Any) -> Image.Image | None:
    """As it is, unless the canvas is larger than the result; then it must not stretch over the margin."""
    size, factor = _size(request), pipe.vae_scale_factor
    if picture is None or (size[0] % factor == 0 and size[1] % factor == 0):
        return picture
    return _padded(resize(picture, size), factor)


@contextmanager
def prepared(pipe: Any, request: Request | VideoRequest, progress: bool) -> Iterator[None]:
    """``pipe`` with a fresh scheduler and our progress bar, and as it was afterwards."""
    before = pipe.scheduler, getattr(pipe, "_progress_bar_config", {})
    pipe.scheduler = schedulers.build(request.scheduler, pipe.scheduler)
    pipe.set_progress_bar_config(disable=not progress)
    try:
        yield
    finally:
        pipe.scheduler = before[0]
        pipe.set_progress_bar_config(**before[1])


def _run(pipe: Any, request: Request, callback: StepCallback | None) -> list[Image.Image]:
    assert request.seeds is not None and request.guidance is not None
    arguments: dict[str, Any] = prompts.encode(
        pipe, request.prompt, request.negative_prompt or None, guided=request.guidance > 1
    )
    arguments |= {"num_inference_steps": request.steps, "guidance_scale": request.guidance, "output_type": "np"}
    arguments |= _canvas(request, pipe.vae_scale_factor)
    if callback is not None:
        arguments["callback_on_step_end"] = callback
    images: list[Image.Image] = []
    for start in range(0, request.images, request.batch):
        seeds = request.seeds[start : start + request.batch]
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        pixels = pipe(**arguments, num_images_per_prompt=len(seeds), generator=generators).images
        images += _pictures(pipe, pixels, request)
    return images


def _canvas(request: Request, factor: int) -> dict[str, Any]:
    """The pipeline's arguments for size, picture and mask."""
    if request.init is None:
        return {"width": request.width, "height": request.height}
    init = _padded(request.init, factor)
    arguments = {"image": init, "strength": request.strength}
    if request.mask is not None:
        arguments |= {"mask_image": _padded(request.mask, factor), "width": init.width, "height": init.height}
    return arguments


def _padded(picture: Image.Image, factor: int) -> Image.Image:
    """Edge pixels repeated to the right and below until both sides are multiples of the VAE's ``factor``."""
    right, below = -picture.width % factor, -picture.height % factor
    if not right and not below:
        return picture
    pixels = np.asarray(picture)
    return Image.fromarray(np.pad(pixels, [(0, below), (0, right)] + [(0, 0)] * (pixels.ndim - 2), mode="edge"))


def broken(base: str, dtype: torch.dtype) -> MahlstickError:
    """What to say of pictures that hold NaN."""
    return MahlstickError(
        f"base: {base} gave NaN pictures; its weights are broken, or {dtype} is too narrow for them (use float32)"
    )


def _pictures(pipe: Any, pixels: np.ndarray[Any, Any], request: Request) -> list[Image.Image]:
    """(n, height, width, 3) in [0, 1] -> pictures of the wanted size, those of inpainting laid over what was there."""
    if not np.isfinite(pixels).all():
        raise broken(request.base, pipe.dtype)
    images: list[Image.Image] = pipe.image_processor.numpy_to_pil(pixels)
    if request.init is not None:
        images = [image.crop((0, 0, *request.init.size)) for image in images]
    if request.init is not None and request.mask is not None:
        images = [Image.composite(image, request.init, request.mask) for image in images]
    return images
