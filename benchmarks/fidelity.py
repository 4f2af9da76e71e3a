"""How far mahlstick's numbers are from the reference implementations': ``python -m benchmarks.fidelity``.

Each case computes the same thing twice, float32 on the CPU, on tiny random models: with the reference's own classes,
and with units attached to the stock pipeline. The table goes to docs/fidelity.md; tests/test_parity.py holds every
case to its bound.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file

import mahlstick as ms
from benchmarks import tiny

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT.parent / "shared" / "goldens"
STEPS = 5


@dataclass(frozen=True)
class Case:
    """One comparison: ``measure`` gives the distance, ``effect`` how much the units changed the result at all."""

    name: str
    reference: str
    bound: float
    measure: Callable[[], tuple[float, float]]


_PIPELINES = {
    ("sd", "text"): ("StableDiffusionPipeline", "StableDiffusionControlNetPipeline"),
    ("sd", "pag"): ("StableDiffusionPAGPipeline", "StableDiffusionControlNetPAGPipeline"),
    ("sd", "img2img"): ("StableDiffusionImg2ImgPipeline", "StableDiffusionControlNetImg2ImgPipeline"),
    ("sd", "inpaint"): ("StableDiffusionInpaintPipeline", "StableDiffusionControlNetInpaintPipeline"),
    ("sdxl", "text"): ("StableDiffusionXLPipeline", "StableDiffusionXLControlNetPipeline"),
    ("sdxl", "img2img"): ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLControlNetImg2ImgPipeline"),
    ("sdxl", "inpaint"): ("StableDiffusionXLInpaintPipeline", "StableDiffusionXLControlNetInpaintPipeline"),
}


def pipelines(family: str, task: str, nets: list[Any], kind: str = "DDIMScheduler", **unet: Any) -> tuple[Any, Any]:
    """The stock pipeline, and diffusers' ControlNet pipeline on equal components."""
    plain, controlled = _PIPELINES["sdxl" if family == "sdxl" else "sd", task]
    net = nets if len(nets) > 1 else nets[0] if nets else None
    stock = getattr(diffusers, plain)(**tiny.components(family, kind, **unet))
    if net is None:
        return tiny.quiet(stock), tiny.quiet(getattr(diffusers, plain)(**tiny.components(family, kind, **unet)))
    reference = getattr(diffusers, controlled)(**tiny.components(family, kind, **unet), controlnet=net)
    return tiny.quiet(stock), tiny.quiet(reference)


def call(task: str, batch: int = 1, **more: Any) -> dict[str, Any]:
    """Arguments that the stock pipeline and the reference share."""
    arguments: dict[str, Any] = {
        "prompt": ["a fox", "a red apple"][:batch] if batch > 1 else "a fox",
        "num_inference_steps": STEPS,
        "guidance_scale": 5.0,
        "height": tiny.SIZE,
        "width": tiny.SIZE,
        "output_type": "np",
    }
    if task in ("img2img", "inpaint"):
        arguments |= {"image": tiny.picture(7), "strength": 0.7}
    if task == "img2img":
        del arguments["height"], arguments["width"]
    if task == "inpaint":
        arguments |= {"mask_image": tiny.half_mask()}
    return arguments | more


def control_argument(task: str) -> str:
    """What diffusers' ControlNet pipelines call the control picture."""
    return "control_image" if task in ("img2img", "inpaint") else "image"


def run(pipe: Any, arguments: dict[str, Any]) -> np.ndarray[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both sides warn alike about the tiny sizes
        return np.asarray(pipe(**arguments, generator=torch.Generator().manual_seed(0)).images)


def ours(net: diffusers.ControlNetModel) -> ms.ControlNet:
    """The same weights in our class."""
    adapter = ms.ControlNet(dict(net.config))
    adapter.load_state_dict(net.state_dict())
    return adapter.eval().requires_grad_(False)


def control(
    family: str,
    task: str,
    nets: int = 1,
    *,
    kind: str = "DDIMScheduler",
    net_config: dict[str, Any] | None = None,
    unit: dict[str, Any] | None = None,
    reference: dict[str, Any] | None = None,
    unet: dict[str, Any] | None = None,
    **more: Any,
) -> tuple[float, float]:
    """ControlNet units against diffusers' ControlNet pipeline."""
    models = [tiny.controlnet(family, seed=10 + i, **(net_config or {})) for i in range(nets)]
    images = [tiny.picture(20 + i) for i in range(nets)]
    stock, theirs = pipelines(family, task, models, kind, **(unet or {}))
    arguments = call(task, **more)
    plain = run(stock, arguments)
    units = [
        ms.Control(ours(model), image, **{"scale": 0.8, **(unit or {})})
        for model, image in zip(models, images, strict=True)
    ]
    with ms.attach(stock, *units):
        attached = run(stock, arguments)
    pictures: Any = images if nets > 1 else images[0]
    given = {control_argument(task): pictures}
    given["controlnet_conditioning_scale"] = [0.8] * nets if nets > 1 else 0.8
    return distance(attached, run(theirs, arguments | given | (reference or {})), plain)


def image_prompt(
    family: str,
    task: str = "text",
    projector: str = "linear",
    *,
    unit: dict[str, Any] | None = None,
    reference: dict[str, Any] | None = None,
    references: int = 1,
    scale: float = 0.7,
    set_scale: Any = None,
    nets: int = 0,
    **more: Any,
) -> tuple[float, float]:
    """ImagePrompt units (beside ControlNets) against diffusers' ``load_ip_adapter``."""
    models = [tiny.controlnet(family, seed=10 + i) for i in range(nets)]
    stock, theirs = pipelines(family, task, models)
    adapter = ip_adapter(stock.unet, projector)
    arguments = call(task, **more)
    plain = run(stock, arguments)
    images = [tiny.picture(40 + i) for i in range(references)]
    prompt = ms.ImagePrompt(adapter, [images] if references > 1 else images, **{"scale": scale, **(unit or {})})
    with ms.attach(stock, *(ms.Control(ours(model), tiny.picture(20)) for model in models), prompt):
        attached = run(stock, arguments)
    with tempfile.TemporaryDirectory() as folder:
        file = adapter.save_pretrained(Path(folder) / "ip.safetensors")
        theirs.load_ip_adapter(folder, subfolder="", weight_name=file.name, image_encoder_folder=None)
    theirs.set_ip_adapter_scale(scale if set_scale is None else set_scale)
    given = {"ip_adapter_image": [images] if references > 1 else images[0], **(reference or {})}
    if nets:
        given |= {control_argument(task): tiny.picture(20), "controlnet_conditioning_scale": 1.0}
    return distance(attached, run(theirs, arguments | given), plain)


def ip_adapter(unet: Any, projector: str) -> ms.IPAdapter:
    torch.manual_seed(30)
    sizes = {"depth": 4, "heads": 1, "head_dim": 64} if projector == "resampler" else {}
    adapter = ms.IPAdapter.from_unet(unet, projector=projector, tokens=4, feature_dim=tiny.WIDTH, **sizes)
    with torch.no_grad():  # away from the text's weights, from which they start
        for parameter in adapter.ip_adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapter.requires_grad_(False)


FRAMES = 4


def diffusers_motion(module: ms.MotionAdapter) -> diffusers.MotionAdapter:
    """The same weights in diffusers' class, through a saved folder."""
    with tempfile.TemporaryDirectory() as folder:
        return diffusers.MotionAdapter.from_pretrained(module.save_pretrained(folder)).eval()


def video_pipeline(kind: str, family: str, module: ms.MotionAdapter, **more: Any) -> Any:
    """diffusers' own video pipeline on the parts of the stock one."""
    parts = tiny.components(family) | more
    for name in ("safety_checker", "requires_safety_checker"):
        parts.pop(name, None)
    unet = parts["unet"]
    pipe = tiny.quiet(getattr(diffusers, kind)(**parts, motion_adapter=diffusers_motion(module)))
    if family == "sdxl":  # diffusers 0.42 leaves these weights random when it copies the UNet
        pipe.unet.add_embedding.load_state_dict(unet.add_embedding.state_dict())
    return pipe


def clip_latents(frames: int = FRAMES) -> torch.Tensor:
    return torch.randn(frames, 4, tiny.SIZE // 8, tiny.SIZE // 8, generator=torch.Generator().manual_seed(3))


def as_clip(frames: torch.Tensor) -> torch.Tensor:
    """(frames, channels, h, w) as diffusers' video pipelines have it."""
    return frames.transpose(0, 1)[None]


@torch.no_grad()
def motion(kind: str, family: str, task: str = "text", nets: int = 0) -> tuple[float, float]:
    """A Motion unit on the stock pipeline against diffusers' video pipelines."""
    stock, _ = pipelines(family, task, [])
    module, models = tiny.motion_adapter(stock.unet), [tiny.controlnet(family, seed=10 + i) for i in range(nets)]
    theirs = video_pipeline(kind, family, module, **({"controlnet": models[0]} if nets else {}))
    arguments = {name: value for name, value in call(task).items() if name not in ("image", "strength")}
    arguments |= {"output_type": "latent", "num_inference_steps": 3}
    frames, start = [tiny.picture(seed) for seed in range(FRAMES)], clip_latents()
    wanted, given = dict(arguments), arguments | {"num_images_per_prompt": FRAMES}
    if task == "img2img":  # both add noise to encoded pictures, each in its own order: here both begin alike
        theirs.prepare_latents = lambda *_, **__: as_clip(start).clone()
        stock.prepare_latents = lambda *_, **__: start.clone()
        wanted |= {"video": frames, "strength": 0.7}
        given |= {"image": frames[0], "strength": 0.7}
    else:
        wanted |= {"num_frames": FRAMES, "latents": as_clip(start)}
        given |= {"latents": start}
    if nets:
        wanted |= {"conditioning_frames": frames, "controlnet_conditioning_scale": 0.7}
    plain = run_latents(stock, given)
    with ms.attach(stock, ms.Motion(module), *(ms.Control(ours(model), frames, scale=0.7) for model in models)):
        attached = run_latents(stock, given)
    return relative(attached, theirs(**wanted).frames[0].transpose(0, 1), plain)


def run_latents(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one picture for several prompts
        latents: torch.Tensor = pipe(**arguments).images
    return latents


def distance(found: Any, wanted: Any, plain: Any) -> tuple[float, float]:
    return float(np.abs(found - wanted).max()), float(np.abs(found - plain).max())


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference in fractions of the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def relative(found: torch.Tensor, wanted: torch.Tensor, plain: torch.Tensor) -> tuple[float, float]:
    return error(found, wanted), error(plain, wanted)


# The original programs ----------------------------------------------------------------------------------------------


@torch.no_grad()
def golden_control(name: str, output: str, heads: int | None = None, **unit: Any) -> tuple[float, float]:
    weights, io = GOLDENS / f"{name}.weights.safetensors", load_file(GOLDENS / f"{name}.io.safetensors")
    net = ms.ControlNet.from_pretrained(weights, dtype=torch.float32, **({"heads": heads} if heads else {}))
    known = signature(diffusers.UNet2DConditionModel.__init__).parameters
    fields = {name: value for name, value in net.config.items() if name in known}
    ups = [kind.replace("Down", "Up") for kind in reversed(net.config["down_block_types"])]
    unet = diffusers.UNet2DConditionModel(**fields | {"up_block_types": ups}).eval()
    unet.load_state_dict(convert_ldm_unet_checkpoint(load_file(weights), dict(unet.config)))
    with ms.attach(unet, ms.Control(net, io["hint"], **unit)):
        eps = unet(io["x"], io["timesteps"], io["context"]).sample
    return relative(eps, io[output], io["eps_plain"])


@torch.no_grad()
def golden_image_prompt(variant: str, scale: float, **config: Any) -> tuple[float, float]:
    io, unet = load_file(GOLDENS / "ipa_io.safetensors"), golden_unet()
    adapter = ms.IPAdapter.from_pretrained(GOLDENS / f"ipa_{variant}.safetensors", **config)
    features = io["image_embeds" if variant == "base" else "hidden_states"]
    with ms.attach(unet, ms.ImagePrompt(adapter, features=features, scale=scale)):
        eps = unet(io["x"], io["timesteps"], io["text"]).sample
    return relative(eps, io[f"eps_{variant}_{scale}"], io["eps_plain"])


@torch.no_grad()
def golden_motion(frames: int, output: str) -> tuple[float, float]:
    io, unet = load_file(GOLDENS / "anim_io.safetensors"), golden_unet()
    module = ms.MotionAdapter.from_pretrained(GOLDENS / "anim_v2.safetensors")
    plain = unet(io["x"], io["timestep"], io["text"]).sample
    with ms.attach(unet, ms.Motion(module, frames=frames)):
        eps = unet(io["x"], io["timestep"], io["text"]).sample
    return relative(eps, io[output], plain)


def golden_unet() -> diffusers.UNet2DConditionModel:
    with safe_open(GOLDENS / "ipa_unet.safetensors", "pt") as file:
        unet = diffusers.UNet2DConditionModel(**json.loads(file.metadata()["config"])).eval()
    unet.load_state_dict(load_file(GOLDENS / "ipa_unet.safetensors"))
    return unet


# The cases ----------------------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    yield from _control_cases()
    yield from _image_prompt_cases()
    yield from _motion_cases()
    if GOLDENS.is_dir():
        yield from _golden_cases()


def _control_cases() -> Iterator[Case]:
    def case(name: str, *args: Any, **kwargs: Any) -> Case:
        return Case(f"ControlNet, {name}", "diffusers", 1e-5, lambda: control(*args, **kwargs))

    for family in tiny.FAMILIES:
        for task in ("text", "img2img", "inpaint"):
            for nets in (1, 2):
                yield case(f"{family}, {task}, {nets} net{'s' * (nets - 1)}", family, task, nets)
    window: dict[str, Any] = {
        "unit": {"start": 0.2, "end": 0.7},
        "reference": {"control_guidance_start": 0.2, "control_guidance_end": 0.7},
    }
    for kind in (
        "DDIMScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ):
        yield case(f"window 0.2 to 0.7, {kind}", "sd1", "text", kind=kind, **window)
    yield case("window 0.2 to 0.7, img2img, DDIM", "sd1", "img2img", **window)
    yield case("window 0.2 to 0.7, img2img, Euler", "sdxl", "img2img", kind="EulerDiscreteScheduler", **window)
    yield case("window 0.2 to 0.7, img2img, PNDM", "sd1", "img2img", kind="PNDMScheduler", **window)
    guess: dict[str, Any] = {"unit": {"mode": "guess"}, "reference": {"guess_mode": True}}
    for family in ("sd1", "sdxl"):
        for task in ("text", "img2img", "inpaint"):
            yield case(f"guess mode, {family}, {task}", family, task, **guess)
    yield case("without guidance", "sd1", "text", guidance_scale=1.0)
    yield case("global pooling", "sd1", "text", net_config={"global_pool_conditions": True})
    yield case("BGR channel order", "sd1", "text", net_config={"controlnet_conditioning_channel_order": "bgr"})
    yield case("two prompts", "sd1", "text", batch=2)
    yield case("two pictures a prompt", "sdxl", "text", num_images_per_prompt=2)
    yield case("perturbed-attention guidance", "sd1", "pag")
    yield case("9-channel inpainting UNet", "sd1", "inpaint", unet={"in_channels": 9})


def _image_prompt_cases() -> Iterator[Case]:
    def case(name: str, *args: Any, **kwargs: Any) -> Case:
        return Case(f"IP-Adapter, {name}", "diffusers", 1e-5, lambda: image_prompt(*args, **kwargs))

    for family in tiny.FAMILIES:
        for projector in ("linear", "resampler", "mlp"):
            yield case(f"{family}, {projector}", family, projector=projector)
    for family in ("sd1", "sdxl"):
        for task in ("img2img", "inpaint"):
            yield case(f"{family}, {task}", family, task)
    mask = torch.zeros(1, 1, tiny.SIZE, tiny.SIZE)
    mask[..., tiny.SIZE // 2 :] = 1
    for family in ("sd1", "sdxl"):
        yield case(
            f"mask, {family}",
            family,
            unit={"mask": mask},
            reference={"cross_attention_kwargs": {"ip_adapter_masks": [mask]}},
        )
    yield case("two references", "sd1", references=2)
    yield case("two prompts", "sd1", batch=2)
    yield case("without guidance", "sd1", guidance_scale=1.0)
    style = {"up": {"block_0": [0.0, 0.7, 0.0]}}
    yield case("style blocks", "sdxl", unit={"blocks": "style"}, set_scale=style)
    yield case("perturbed-attention guidance", "sd1", "pag")
    yield case("with a ControlNet", "sd1", nets=1)
    yield case("with a ControlNet, SDXL img2img", "sdxl", "img2img", nets=1)


def _motion_cases() -> Iterator[Case]:
    def case(name: str, *args: Any, **kwargs: Any) -> Case:
        return Case(f"Motion, {name}", "diffusers", 1e-4, lambda: motion(*args, **kwargs))

    yield case("sd1, text", "AnimateDiffPipeline", "sd1")
    yield case("sdxl, text", "AnimateDiffSDXLPipeline", "sdxl")
    yield case("sd1, video to video", "AnimateDiffVideoToVideoPipeline", "sd1", "img2img")
    yield case("sd1, with a ControlNet", "AnimateDiffControlNetPipeline", "sd1", nets=1)


def _golden_cases() -> Iterator[Case]:
    def case(name: str, program: str, bound: float, measure: Callable[..., Any], *args: Any, **kwargs: Any) -> Case:
        return Case(name, program, bound, lambda: measure(*args, **kwargs))

    cldm, ipa = "the original ControlNet", "the original IP-Adapter"
    for name, heads, bound in (("cldm_small", 4, 1e-4), ("cldm_family", None, 1e-3)):
        yield case(f"{name}", cldm, bound, golden_control, name, "eps_control", heads)
        yield case(f"{name}, scale 0.5", cldm, bound, golden_control, name, "eps_control_half", heads, scale=0.5)
    yield case(
        "cldm_family, soft weights", cldm, 1e-3, golden_control, "cldm_family", "eps_soft_weights", mode="prompt"
    )
    for variant, config in (("base", {}), ("plus", {"heads": 4})):
        for scale in (0.6, 1.0):
            yield case(f"{variant}, scale {scale}", ipa, 1e-4, golden_image_prompt, variant, scale, **config)
    for name, frames, output in (("a clip", 8, "eps_v2"), ("two clips", 4, "eps_v2_2x4")):
        yield case(f"anim_v2, {name}", "the original AnimateDiff", 1e-4, golden_motion, frames, output)


def main() -> None:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    rows = []
    for case in cases():
        found, effect = case.measure()
        verdict = "" if found <= case.bound else " **over the bound**"
        rows.append(f"| {case.name} | {case.reference} | {found:.1e}{verdict} | {case.bound:.0e} | {effect:.2f} |")
        print(rows[-1], flush=True)
    table = "| case | reference | largest difference | bound | effect |\n|---|---|---|---|---|\n" + "\n".join(rows)
    versions = f"torch {torch.__version__.split('+')[0]}, diffusers {diffusers.__version__}."
    (ROOT / "docs" / "fidelity.md").write_text(f"{HEAD}\n{versions}\n\n{table}\n", encoding="utf-8")


HEAD = """# Fidelity

Made by `python -m benchmarks.fidelity`: float32 on the CPU, tiny random models of the real classes. The difference is
the largest over all pixels of pictures in [0, 1] (against diffusers), over a clip's latents relative to their largest
value, or so over the UNet's output (against the original programs; cldm_family's weights are stored in fp16).
The effect is how much the same
run differs from one without units, so that a small difference means something.
"""


if __name__ == "__main__":
    main()
