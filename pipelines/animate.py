"""From a request to a clip: the stock pipeline makes its latents, and here they are begun, decoded and written."""

from __future__ import annotations

import copy
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mahlstick import pictures
from mahlstick.adapters import formats
from mahlstick.adapters.context import Context
from mahlstick.adapters.motion import MotionAdapter, MotionAttachment
from mahlstick.errors import MahlstickError
from mahlstick.pipelines import generate as still
from mahlstick.pipelines import noise, prompts, schedulers
from mahlstick.pipelines.attach import attach
from mahlstick.pipelines.load import Loader, adapter_path, for_task, unet_config
from mahlstick.pipelines.measures import ClipFigures, ClipMeasures, frame_encoder
from mahlstick.pipelines.recipe import is_in_memory
from mahlstick.pipelines.request import (
    FRAME_LIMIT,
    ClipControlSpec,
    ImagePromptSpec,
    VideoRequest,
    open_mask,
    open_picture,
)
from mahlstick.pipelines.units import Control, ImagePrompt, Motion, PromptTravel, Unit
from mahlstick.pipelines.video import (
    Frames,
    VideoInfo,
    VideoWriter,
    check_video_target,
    is_video,
    iterate_video,
    video_info,
)

FRAMES, FPS = 16, 8.0  # where nothing tells
CHUNK = 4  # frames that are encoded or decoded at once
COMMENT_LIMIT = 60_000  # characters of a request that a file's comment takes


@dataclass(frozen=True)
class Animation:
    """A clip that was written, and how it came out.

    ``windows``: frames of a window and how many two share, or None where the clip was made whole.
    """

    path: Path
    request: VideoRequest
    figures: ClipFigures
    windows: tuple[int, int] | None


def animate(
    request: VideoRequest,
    out: str | os.PathLike[str],
    *,
    pipe: Any = None,
    loader: Loader | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
    callback: still.StepCallback | None = None,
) -> Animation:
    """Makes the request's clip and writes it to ``out``, whole or not at all.

    Args:
        request: what to make.
        out: a .mp4, .webm, .gif or .webp, or a folder for numbered pictures.
        pipe: a diffusers pipeline to use in place of ``request.base``; it comes back as it was.
        loader: keeps bases and adapters between calls; without one nothing is kept.
        device: left open, the best there is; with ``pipe``, where that is.
        dtype: left open, float32 on a CPU and float16 elsewhere; with ``pipe``, that pipeline's.
        progress: show progress bars.
        callback: diffusers' ``callback_on_step_end``.

    Frames are read, encoded, decoded and written a few at a time, and the UNet sees a window of them, so that a long
    clip takes hardly more memory than a short one. Raises :class:`MahlstickError` before anything is loaded where a
    file, an adapter or a number does not do.
    """
    loader = loader or Loader()
    check_video_target(out)
    found = [still.looked_up(spec, f"image_prompts[{i}]") for i, spec in enumerate(request.image_prompts)]
    request, sources = _settled(request.model_copy(update={"image_prompts": found}) if found else request)
    _check_adapters(request, None if pipe is None else pipe.unet.config)
    if pipe is None:
        base = loader.pipeline(request.base, device=device, dtype=dtype, config=request.base_config)
    else:
        base, request = pipe, request.model_copy(update={"base": f"<{type(pipe).__name__} in memory>"})
    worker = copy.copy(for_task(base, "text" if request.init is None else "img2img"))
    request = _sized(request, worker, sources)
    schedulers.check_steps(schedulers.build(request.scheduler, worker.scheduler), request.steps)
    fps = cast(float, request.fps)
    writer = VideoWriter(out, fps, _size(request), audio=request.audio, comment=_comment(request))
    with still.prepared(worker, request, progress), _attached(request, worker, loader, progress) as motion:
        windowed = motion.windowed(cast(int, request.frames))
        context = motion.context if windowed else None
        latents = _latents(worker, request, motion, progress, callback)
    figures = _write(worker, request, latents, writer, context.borders(len(latents)) if context else (), progress)
    return Animation(Path(out), request, figures, (context.length, context.overlap) if context else None)


# what the request leaves open


def _settled(request: VideoRequest) -> tuple[VideoRequest, list[VideoInfo]]:
    """The request with frames, frame rate, seed and sound, and the videos that it names, init's first.

    Raises MahlstickError for a file that is not there or does not do, and for a number that does not fit the clip.
    """
    if request.init is not None and not is_video(request.init) and Path(request.init).exists():
        raise MahlstickError(f"init: {request.init} is no video; give a video or a folder of frames")
    followed = [spec.image for spec in request.controls]
    references = [spec.images[0] for spec in request.image_prompts if len(spec.images) == 1]
    leading = [video_info(source) for source in (request.init, *followed) if source == request.init or is_video(source)
               if source is not None]  # fmt: skip
    sources = leading + [video_info(source) for source in references if is_video(source)]
    fps = request.fps or (float(leading[0].fps) if leading and leading[0].fps else FPS)
    frames = request.frames or (min(*(source.frames_at(fps) for source in leading), FRAME_LIMIT) if leading else FRAMES)
    for source in sources:
        if source.note and source.fps is not None:  # its rate varies; a folder has none
            warnings.warn(f"{source.path}: {source.note}", stacklevel=3)
        held = source.frames_at(fps)
        if held < max(frames, 2):
            raise MahlstickError(
                f"{source.path} has {held} frames at {fps:g} a second, and {max(frames, 2)} are asked for: ask for "
                "fewer, or for a higher fps"
            )
    for i, image in enumerate(followed):
        if isinstance(image, list) and request.controls[i].at is None and len(image) not in (1, frames):
            raise MahlstickError(f"controls[{i}]: {len(image)} pictures for {frames} frames; give one, or one for each")
    request = VideoRequest(**_fields(request) | {"frames": frames, "fps": fps})  # with all that hangs on the frames
    _check_files(request)
    audio = request.audio or (request.init if request.init is not None and leading[0].has_audio else None)
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    return request.model_copy(update={"audio": audio, "seed": seed}), leading


def _fields(request: VideoRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.model_fields_set}


def _check_files(request: VideoRequest) -> None:
    """Open every picture and find every annotator and LoRA, so that none of them is missed after the work."""
    from mahlstick import annotators

    for i, spec in enumerate(request.controls):
        with _naming(f"controls[{i}]"):
            for picture in spec.image if isinstance(spec.image, list) else [spec.image]:
                if not is_video(picture):
                    open_picture(picture, "control picture")
            if spec.annotator is not None:
                annotators.get(spec.annotator)
            if spec.mask is not None:
                open_mask(spec.mask, "mask")
    for i, prompt in enumerate(request.image_prompts):
        with _naming(f"image_prompts[{i}]"):
            if len(prompt.images) > 1 and any(map(is_video, prompt.images)):
                raise MahlstickError(
                    "a video is a reference for each frame and stands alone; give pictures or the video"
                )
            for picture in (*prompt.images, prompt.negative):
                if picture is not None and not is_video(picture):
                    open_picture(picture, "picture")
            if prompt.mask is not None:
                open_mask(prompt.mask, "mask")
    for lora in request.motion_loras:
        formats.read_motion_lora(lora.path)
    if request.context is not None:
        Context(request.context, request.context // 4 if request.overlap is None else request.overlap)


def _check_adapters(request: VideoRequest, config: Any) -> None:
    """Kind and base of every adapter from its header, before a tensor is loaded."""
    config = config or unet_config(request.base)
    nets = ("controlnet", "sparse_controlnet")
    named: list[tuple[str, str | tuple[str, ...], Any]] = [("motion", "motion_adapter", request.motion)]
    named += [(f"controls[{i}]", nets, spec.adapter) for i, spec in enumerate(request.controls)]
    named += [(f"image_prompts[{i}]", "ip_adapter", spec.adapter) for i, spec in enumerate(request.image_prompts)]
    for field, kinds, source in named:
        if isinstance(source, str):
            still.check_adapter(field, kinds, source, config)


def _sized(request: VideoRequest, pipe: Any, sources: Sequence[VideoInfo]) -> VideoRequest:
    """The request with size, strength and guidance: the size is the base's own, in the shape of init."""
    channels, made = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels != made:
        raise MahlstickError(f"base: {request.base} is an inpainting model; give one that makes pictures from words")
    update: dict[str, Any] = {"guidance": still.guidance(request, pipe)}
    if request.init is not None:
        update["strength"] = request.effective_strength
    if request.width is None:
        width, height = still.own_size(pipe)
        if request.init is not None:
            width, height = _in_shape(sources[0], width * height, pipe.vae_scale_factor)
        update |= {"width": width, "height": height}
    return request.model_copy(update=update)


def _in_shape(source: VideoInfo, area: int, step: int) -> tuple[int, int]:
    """Width and height of about this area in the video's shape, in multiples of ``step`` pixels."""
    scale = (area / (source.width * source.height)) ** 0.5
    width, height = (max(step, round(side * scale / step) * step) for side in (source.width, source.height))
    return width, height


# units


@contextmanager
def _attached(request: VideoRequest, pipe: Any, loader: Loader, progress: bool) -> Iterator[MotionAttachment]:
    """The request's units on ``pipe``, the motion module's attachment given. Each is attached alone, so that an error
    names the one that does not fit."""
    with ExitStack() as stack:
        units: list[tuple[str, Callable[[], Unit]]] = [
            (f"controls[{i}]", partial(_control, spec, request, pipe, loader, stack, progress))
            for i, spec in enumerate(request.controls)
        ]
        units += [
            (f"image_prompts[{i}]", partial(_image_prompt, spec, request, pipe, loader, stack))
            for i, spec in enumerate(request.image_prompts)
        ]
        if request.prompts:
            travel = PromptTravel({0: request.prompt} | request.prompts, request.frames)
            units.append(("prompts", lambda: travel))
        units.append(("motion", partial(_motion, request, pipe, loader)))
        for name, build in units:
            with _naming(name):
                attached = stack.enter_context(attach(pipe, build()))
        yield cast(MotionAttachment, attached.attachments[0])


@contextmanager
def _naming(field: str) -> Iterator[None]:
    try:
        yield
    except MahlstickError as error:
        raise MahlstickError(f"{field}: {error}") from error


def _motion(request: VideoRequest, pipe: Any, loader: Loader) -> Motion:
    module = request.motion
    if isinstance(module, str):
        module = cast(MotionAdapter, loader.adapter(adapter_path(module), dtype=pipe.unet.dtype))
    for lora in request.motion_loras:
        module = module.with_lora(lora.path, lora.scale)
    return Motion(
        module,
        frames=request.frames,
        scale=request.motion_scale,
        norm=request.norm,
        context=request.context,
        overlap=request.overlap,
        schedule=request.schedule,
        extend=request.extend,
    )


def _control(
    spec: ClipControlSpec, request: VideoRequest, pipe: Any, loader: Loader, stack: ExitStack, progress: bool
) -> Control:
    size = _size(request)
    followed = spec.image
    if is_video(followed):
        source = iterate_video(followed, request.fps)
        pictures_of = tqdm(source, "reading", request.frames, disable=not progress, leave=False)
    else:
        each = followed if isinstance(followed, list) else [followed]
        pictures_of = [open_picture(one, "control picture") for one in each]
    from mahlstick import annotators

    frames = stack.enter_context(Frames())
    for _, picture in zip(range(cast(int, request.frames)), pictures_of, strict=False):
        if spec.annotator is not None:
            picture = annotators.annotate(spec.annotator, picture, **spec.options)
        frames.append(pictures.resize(picture, size, spec.resize))
    return Control(
        still.adapter_of(spec, pipe, loader),
        cast(Any, frames),
        scale=spec.scale,
        start=spec.start,
        end=spec.end,
        window=spec.window,
        mask=None if spec.mask is None else open_mask(spec.mask, "mask"),
        mode=spec.mode,
        at=spec.at,
        frames=request.frames,
    )


def _image_prompt(
    spec: ImagePromptSpec, request: VideoRequest, pipe: Any, loader: Loader, stack: ExitStack
) -> ImagePrompt:
    """Its references for all frames together; a video's frames one for each, or all where a projector takes a video."""
    adapter = still.adapter_of(spec, pipe, loader)
    if is_video(spec.images[0]):
        frames = stack.enter_context(Frames())
        for _, frame in zip(range(cast(int, request.frames)), iterate_video(spec.images[0], request.fps), strict=False):
            frame.thumbnail((still.REFERENCE_SIDE, still.REFERENCE_SIDE), Image.Resampling.LANCZOS)
            frames.append(frame)
        given: dict[str, Any] = {"video" if adapter.config["projector"] == "video" else "images": frames}
    else:
        given = {"images": [[open_picture(one, "picture") for one in spec.images]]}
    return ImagePrompt(
        adapter,
        **given,
        scale=spec.scale,
        start=spec.start,
        end=spec.end,
        window=spec.window,
        mask=None if spec.mask is None else open_mask(spec.mask, "mask"),
        blocks=spec.blocks,
        negative=None if spec.negative is None else open_picture(spec.negative, "negative"),
        resize=spec.resize,
        prompt=request.prompt,
    )


def _size(request: VideoRequest) -> tuple[int, int]:
    assert request.width is not None and request.height is not None
    return request.width, request.height


# latents


@torch.no_grad()
def _latents(
    pipe: Any, request: VideoRequest, motion: MotionAttachment, progress: bool, callback: still.StepCallback | None
) -> Tensor:
    """The clip's denoised latents (frames, channels, h, w), on the CPU."""
    random = torch.Generator("cpu").manual_seed(cast(int, request.seed))
    first = _noise(pipe, request, motion, random)
    arguments: dict[str, Any] = prompts.encode(
        pipe, request.prompt, request.negative_prompt or None, guided=cast(float, request.guidance) > 1
    )
    arguments |= {"num_inference_steps": request.steps, "guidance_scale": request.guidance, "output_type": "latent"}
    arguments["generator"] = random  # of samplers that add noise
    if callback is not None:
        arguments["callback_on_step_end"] = callback
    if request.init is not None:
        return _from_video(pipe, request, first, arguments, progress)
    width, height = _size(request)
    arguments |= {"width": width, "height": height}
    # One row of text serves all frames: the motion module's hook gives each window its own.
    clip: Tensor = pipe(**arguments, latents=first.to(pipe.unet.dtype)).images.cpu()
    for _ in range(request.free_init):
        fresh = _noise(pipe, request, motion, random)
        signal = float(pipe.scheduler.alphas_cumprod[-1])
        start = noise.free_init(clip.float(), first, fresh, signal)
        clip = pipe(**arguments, latents=start.to(pipe.unet.dtype)).images.cpu()
    return clip


def _noise(pipe: Any, request: VideoRequest, motion: MotionAttachment, random: torch.Generator) -> Tensor:
    frames, windowed = cast(int, request.frames), motion.windowed(cast(int, request.frames))
    width, height = (side // pipe.vae_scale_factor for side in _size(request))
    shape = (pipe.unet.config.in_channels, height, width)
    if not (windowed if request.free_noise is None else request.free_noise):
        return noise.independent(frames, shape, random)
    context = motion.context
    one = noise.independent(min(context.length, frames), shape, random)
    return noise.free_noise(one, frames, max(1, context.length - context.overlap), random)


def _from_video(pipe: Any, request: VideoRequest, first: Tensor, arguments: dict[str, Any], progress: bool) -> Tensor:
    """As image to image, with every frame's own latents. The pipeline would encode all of them at once."""
    frames, size = cast(int, request.frames), _size(request)
    source = iterate_video(cast(str, request.init), request.fps)
    bar = tqdm(source, "encoding", frames, disable=not progress, leave=False)
    taken = (pictures.resize(picture, size, "crop") for _, picture in zip(range(frames), bar, strict=False))
    clean = torch.cat([_encode(pipe, chunk) for chunk in _chunks(taken)])

    def prepare_latents(image: Any, timestep: Tensor, *_: Any, **__: Any) -> Tensor:
        at, to = timestep[:1].expand(frames), {"device": pipe._execution_device, "dtype": pipe.unet.dtype}
        noised: Tensor = pipe.scheduler.add_noise(clean.to(**to), first.to(**to), at.to(to["device"]))
        return noised

    pipe.prepare_latents = prepare_latents  # of our own copy of the pipeline
    placeholder = Image.new("RGB", size)
    made: Tensor = pipe(**arguments, image=placeholder, strength=request.strength).images
    return made.cpu()


def _chunks(frames: Iterator[Image.Image]) -> Iterator[list[Image.Image]]:
    chunk: list[Image.Image] = []
    for frame in frames:
        chunk.append(frame)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@contextmanager
def _wide(vae: Any) -> Iterator[None]:
    """SDXL's VAE overflows in halves and asks for float32."""
    dtype = vae.dtype
    widen = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if widen:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if widen:
            vae.to(dtype)


def _encode(pipe: Any, frames: list[Image.Image]) -> Tensor:
    """Frames as latents (n, channels, h, w): the posterior's mode, for what is drawn from it would flicker."""
    vae = pipe.vae
    with _wide(vae):
        pixels = pipe.image_processor.preprocess(frames).to(pipe._execution_device, vae.dtype)
        latents: Tensor = vae.encode(pixels).latent_dist.mode().float()
    mean, deviation = _statistics(vae)
    return (latents.cpu() - mean) * (vae.config.scaling_factor / deviation)


def _decode(pipe: Any, latents: Tensor, base: str) -> list[Image.Image]:
    vae = pipe.vae
    mean, deviation = _statistics(vae)
    with _wide(vae):
        scaled = latents.float() * (deviation / vae.config.scaling_factor) + mean
        pixels = vae.decode(scaled.to(pipe._execution_device, vae.dtype), return_dict=False)[0]
    if not bool(torch.isfinite(pixels).all()):
        raise still.broken(base, pipe.dtype)
    made: list[Image.Image] = pipe.image_processor.postprocess(pixels.float(), output_type="pil")
    return made


def _statistics(vae: Any) -> tuple[Any, Any]:
    """Mean and deviation of a VAE's latents where its config has them, (1, channels, 1, 1), else 0 and 1."""
    mean, deviation = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None or deviation is None:
        return 0.0, 1.0
    return torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(deviation).view(1, -1, 1, 1)


# the file


@torch.no_grad()
def _write(
    pipe: Any, request: VideoRequest, latents: Tensor, writer: VideoWriter, borders: Sequence[int], progress: bool
) -> ClipFigures:
    measures = ClipMeasures(frame_encoder(pipe))
    with tqdm(total=len(latents), desc="writing", disable=not progress, leave=False) as bar, writer:
        for chunk in latents.split(CHUNK):
            for frame in _decode(pipe, chunk, request.base):
                measures.add(frame)
                writer.write(frame)
                bar.update()
    return measures.result(borders)


def _comment(request: VideoRequest) -> str | None:
    """The request as JSON, for whoever finds the file; None where it holds what cannot be written, or too much."""
    if is_in_memory(request.base):
        return None
    try:
        text = request.to_json(indent=None)
    except MahlstickError:
        return None
    return text if len(text) <= COMMENT_LIMIT else None
