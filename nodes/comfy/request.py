"""A request as a workflow: the same picture by nodes, and what nodes cannot say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mahlstick.errors import MahlstickError
from mahlstick.nodes import builtin
from mahlstick.nodes.comfy.api import Api
from mahlstick.nodes.comfy.script import Output, Workflow
from mahlstick.pipelines import prompts, schedulers
from mahlstick.pipelines.generate import EMBEDDED_GUIDANCE, INPAINT
from mahlstick.pipelines.load import embedded_adapters, embedded_folder, read_json
from mahlstick.pipelines.request import ControlSpec, ImagePromptSpec, Request

_GUIDANCE = 7.5  # diffusers' default
_SIDE = 512  # pixels, of a base whose configs are not here

# diffusers' class -> ComfyUI's sampler, and whether it takes the same steps
_SAMPLERS = {
    "DDIMScheduler": ("ddim", False),
    "DDPMScheduler": ("ddpm", False),
    "DEISMultistepScheduler": ("deis", False),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", True),
    "DPMSolverSinglestepScheduler": ("dpmpp_2s_ancestral", False),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", False),
    "EulerDiscreteScheduler": ("euler", True),
    "HeunDiscreteScheduler": ("heun", True),
    "KDPM2AncestralDiscreteScheduler": ("dpm_2_ancestral", False),
    "KDPM2DiscreteScheduler": ("dpm_2", True),
    "LCMScheduler": ("lcm", False),
    "LMSDiscreteScheduler": ("lms", True),
    "PNDMScheduler": ("ipndm", False),
    "UniPCMultistepScheduler": ("uni_pc_bh2", False),
}
_SDE = {2: "dpmpp_2m_sde", 3: "dpmpp_3m_sde"}  # by the order of the solver


def from_request(request: Request) -> tuple[Api, list[str]]:
    """API JSON that makes the request's first picture, and what of the request it does not say.

    Pictures of the request are paths; the workflow names the files, and looks for them in the input folder. The noise
    levels are written out as the request's scheduler takes them, so that a prompt with drawings and references gives
    the request's picture but for rounding. Raises ``MahlstickError`` for pictures that are no files, and for more
    steps than the scheduler has.
    """
    return _Writer(request).write()


class _Writer:
    """The nodes of one request, in their order."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.folder = _folder(request.base)
        self.left_out: list[str] = []

    def write(self) -> tuple[Api, list[str]]:
        request = self.request
        self._note_what_is_lost()
        timesteps, sigmas, sampler = self._steps()
        with Workflow() as workflow:
            model, clip, vae = self._call(
                "CheckpointLoaderSimple", ckpt_name=self._weights(request.base, "checkpoints")
            )
            (positive,) = self._call("CLIPTextEncode", text=request.prompt, clip=clip, _title="Positive")
            (negative,) = self._call("CLIPTextEncode", text=request.negative_prompt, clip=clip, _title="Negative")
            for prompt in request.image_prompts:
                model = self._image_prompt(prompt, model, timesteps)
            for control in request.controls:
                positive, negative = self._control(control, positive, negative, timesteps)
            latents, init, mask = self._latents(vae)
            (noise,) = self._call("RandomNoise", noise_seed=request.seeds[0] if request.seeds else request.seed or 0)
            (guider,) = self._call("CFGGuider", model=model, positive=positive, negative=negative, cfg=self._guidance())
            (chosen,) = self._call("KSamplerSelect", sampler_name=sampler)
            (levels,) = self._call("ManualSigmas", sigmas=", ".join(f"{sigma:.9g}" for sigma in sigmas))
            samples, _ = self._call(
                "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=chosen, sigmas=levels, latent_image=latents
            )
            (images,) = self._call("VAEDecode", samples=samples, vae=vae)
            if mask is not None:
                (images,) = self._call("ImageCompositeMasked", destination=init, source=images, mask=mask)
            self._call("SaveImage", images=images, filename_prefix="mahlstick")
        return workflow.api, self.left_out

    def _call(self, kind: str, **inputs: Any) -> tuple[Any, ...]:
        found: tuple[Any, ...] = builtin.all_nodes()[kind](**inputs)
        return found

    def _note_what_is_lost(self) -> None:
        request = self.request
        if request.images > 1:
            self.left_out.append("the pictures after the first")
        if request.seed is None and request.seeds is None:
            self.left_out.append("a new seed each time")
        if any(
            prompts.parse_weights(text) not in ([], [(text, 1.0)]) for text in (request.prompt, request.negative_prompt)
        ):
            self.left_out.append("prompt weights as compel reads them, for here they act as in ComfyUI")
        if request.init is not None:
            self.left_out.append("the very noise of a picture that begins from another")

    # The steps.

    def _steps(self) -> tuple[list[float], list[float], str]:
        """The timesteps from the noisiest on, the noise levels with the last, and ComfyUI's sampler."""
        import diffusers

        config: dict[str, Any] = (
            read_json(self.folder / "scheduler" / "scheduler_config.json") if self.folder else _USUAL_SCHEDULER
        )
        kind = getattr(diffusers, config["_class_name"])
        scheduler = schedulers.build(self.request.scheduler, kind.from_config(config))
        schedulers.check_steps(schedulers.build(self.request.scheduler, scheduler), self.request.steps)
        scheduler.set_timesteps(self.request.steps)
        levels = _levels(scheduler)
        timesteps = [float(t) for t in _without_repeats(scheduler.timesteps)]
        sampler, is_same = self._sampler(scheduler)
        if not is_same:
            self.left_out.append(f"the very steps of {type(scheduler).__name__}, for {sampler} is only like it")
        skipped = 0
        if self.request.init is not None:
            skipped = self.request.steps - int(self.request.steps * self.request.effective_strength)
        return timesteps, levels[skipped:], sampler

    def _sampler(self, scheduler: Any) -> tuple[str, bool]:
        if str(scheduler.config.get("algorithm_type", "")).startswith("sde"):
            return _SDE.get(scheduler.config.solver_order, "dpmpp_sde"), False
        return _SAMPLERS.get(type(scheduler).__name__, ("euler", False))

    def _percents(self, spec: ControlSpec | ImagePromptSpec, timesteps: list[float]) -> dict[str, float]:
        """Start and end as fractions of the noise, between two steps where they are between two."""
        if spec.window == "noise" or (spec.start, spec.end) == (0.0, 1.0):
            return {"start_percent": spec.start, "end_percent": spec.end}
        n = len(timesteps)
        first, behind = math.ceil(spec.start * n - 1e-9), math.floor(spec.end * n + 1e-9)
        return {"start_percent": _between(timesteps, first), "end_percent": _between(timesteps, behind)}

    def _guidance(self) -> float:
        if self.request.guidance is not None:
            return self.request.guidance
        return EMBEDDED_GUIDANCE if self.request.base == "embedded" else _GUIDANCE

    # Pictures.

    def _latents(self, vae: Output) -> tuple[Any, Any, Any]:
        """What is sampled from, and the picture and mask that it begins with."""
        width, height = self._size()
        if self.request.init is None:
            return (*self._call("EmptyLatentImage", width=width, height=height), None, None)
        init = self._scaled(self._load(self.request.init, "init"), (width, height), "disabled")
        (latents,) = self._call("VAEEncode", pixels=init, vae=vae)
        if self.request.mask is None:
            return latents, init, None
        image = self._scaled(self._load(self.request.mask, "mask"), (width, height), "disabled")
        (mask,) = self._call("ImageToMask", image=image, channel="red")
        return (*self._call("SetLatentNoiseMask", samples=latents, mask=mask), init, mask)

    def _size(self) -> tuple[int, int]:
        if self.request.width and self.request.height:
            return self.request.width, self.request.height
        if self.request.init is not None:
            with Image.open(_path(self.request.init, "init")) as picture:
                return picture.size
        if self.folder is None:
            return _SIDE, _SIDE
        sample = read_json(self.folder / "unet" / "config.json")["sample_size"]
        factor = 2 ** (len(read_json(self.folder / "vae" / "config.json")["block_out_channels"]) - 1)
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return width * factor, height * factor

    def _load(self, picture: Any, name: str) -> Output:
        return self._call("LoadImage", image=_path(picture, name).name)[0]

    def _scaled(self, image: Output, size: tuple[int, int], crop: str) -> Output:
        inputs = {"image": image, "upscale_method": "lanczos", "width": size[0], "height": size[1], "crop": crop}
        return self._call("ImageScale", **inputs)[0]

    def _mask(self, mask: Any, name: str) -> dict[str, Output]:
        if mask is None:
            return {}
        return {"mask": self._call("LoadImageMask", image=_path(mask, name).name, channel="red")[0]}

    # Units.

    def _control(self, spec: ControlSpec, positive: Any, negative: Any, timesteps: list[float]) -> tuple[Any, ...]:
        name = f"controls[{self.request.controls.index(spec)}]"
        if spec.annotator == INPAINT:
            self.left_out.append(f"{name}, whose picture has a hole")
            return positive, negative
        (net,) = self._call("ControlNetLoader", control_net_name=self._weights(spec.adapter, "controlnet"))
        image = self._control_picture(spec, name)
        strength = spec.scale
        if isinstance(strength, list):
            self.left_out.append(f"{name}.scale, which is one for each residual")
            strength = 1.0
        inputs = {"positive": positive, "negative": negative, "control_net": net, "image": image, "strength": strength}
        inputs |= self._percents(spec, timesteps)
        if spec.mask is None and spec.mode == "balanced":
            return self._call("ControlNetApplyAdvanced", **inputs)
        return self._call("MahlstickControl", **inputs, mode=spec.mode, **self._mask(spec.mask, f"{name}.mask"))

    def _control_picture(self, spec: ControlSpec, name: str) -> Output:
        path = _path(spec.image, f"{name}.image")
        image = self._load(path, name)
        with Image.open(path) as picture:
            size = picture.size
        if spec.annotator:
            options = json.dumps(spec.options)
            inputs = {"annotator": spec.annotator, "resolution": min(size), "options": options}
            (image,) = self._call("MahlstickAnnotate", image=image, **inputs)
        if size == self._size():
            return image
        if spec.resize == "pad" and size[0] * self._size()[1] != size[1] * self._size()[0]:
            self.left_out.append(f"the margins of {name}, which is cropped here")
        return self._scaled(image, self._size(), "disabled" if spec.resize == "stretch" else "center")

    def _image_prompt(self, spec: ImagePromptSpec, model: Any, timesteps: list[float]) -> Output:
        name = f"image_prompts[{self.request.image_prompts.index(spec)}]"
        if spec.negative is not None:
            self.left_out.append(f"{name}.negative")
        blocks = spec.blocks
        if isinstance(blocks, dict):
            self.left_out.append(f"{name}.blocks, which is a weight for each")
            blocks = "all"
        (adapter,) = self._call("IPAdapterModelLoader", ipadapter_file=self._weights(spec.adapter, "ipadapter"))
        image = self._load(spec.images[0], name)
        for other in spec.images[1:]:
            (image,) = self._call("ImageBatch", image1=image, image2=self._load(other, name))
        inputs = {"model": model, "ipadapter": adapter, "image": image, "weight": spec.scale, "blocks": blocks}
        inputs |= self._percents(spec, timesteps) | self._mask(spec.mask, f"{name}.mask")
        inputs["prompt"] = self.request.prompt  # of which only an adapter that reads it takes notice
        return self._call("MahlstickImagePrompt", **inputs)[0]

    def _weights(self, source: Any, kind: str) -> str:
        """The name by which a loader finds weights; files elsewhere have to be put into the models folder."""
        if source in embedded_adapters():
            return f"embedded:{source}"
        if source == "embedded":
            return "embedded"
        self.left_out.append(f"where {Path(source).name} is: put it into models/{kind}")
        return Path(source).name


_USUAL_SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False,
}  # fmt: skip


def _folder(base: str) -> Path | None:
    """The base's diffusers folder, where it is one here."""
    folder = embedded_folder() if base == "embedded" else Path(base)
    return folder if (folder / "model_index.json").is_file() else None


def _path(picture: Any, name: str) -> Path:
    if not isinstance(picture, str | Path) or str(picture).startswith("data:"):
        raise MahlstickError(f"{name}: a workflow names files; save the picture and give its path")
    return Path(picture)


def _levels(scheduler: Any) -> list[float]:
    """The falling sigmas of a scheduler with its steps set, with the last one, where a picture is."""
    if hasattr(scheduler, "sigmas"):
        return [float(sigma) for sigma in _without_repeats(scheduler.sigmas)]
    alphas = scheduler.alphas_cumprod[scheduler.timesteps.long()]
    last = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0)).reshape(1)
    alphas = torch.cat([alphas.float(), last])
    return [float(sigma) for sigma in _without_repeats(((1 - alphas) / alphas).sqrt())]


def _without_repeats(values: torch.Tensor) -> torch.Tensor:
    """Schedulers with two calls a step name each step twice."""
    return torch.unique_consecutive(values)


def _between(timesteps: list[float], place: int) -> float:
    """The fraction of the noise behind which lie the steps from ``place`` on; 0 and 1 at the ends."""
    if not 0 < place < len(timesteps):
        return float(place > 0)
    return round(1 - (timesteps[place - 1] + timesteps[place]) / 2 / 999, 3)
