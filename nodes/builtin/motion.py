"""Motion modules, under the names and inputs of AnimateDiff-Evolved's nodes.

A module becomes a unit of the model (`mahlstick.pipelines.units.Motion`): a batch that is sampled with it is one clip.
Of what those nodes offer, the suite has windows over long clips, motion LoRA, a strength that may be a mask, a part of
the run in which a module acts, and noise that frames share. Whatever else is connected is refused, not passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import torch
from torch import Tensor

from mahlstick.adapters import formats
from mahlstick.adapters.context import Context, Fuse, Schedule
from mahlstick.adapters.motion import MotionAdapter
from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders
from mahlstick.nodes.schema import Socket, Widget, node
from mahlstick.nodes.values import MaskT, ModelT
from mahlstick.pipelines.load import adapter_path, embedded_adapters
from mahlstick.pipelines.noise import free_noise
from mahlstick.pipelines.units import Motion

_EMBEDDED = "embedded:"
_ANIMATEDIFF, _ANIMATEDIFF_XL, _KEPT = "sqrt_linear (AnimateDiff)", "linear (AnimateDiff-SDXL)", "use existing"
_DEFAULT, _AVERAGE = "linear (HotshotXL/default)", "avg(sqrt_linear,linear)"
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
# AnimateDiff-Evolved's names of noise schedules, as diffusers' schedulers know them. (In Stable Diffusion's own code
# "linear" means linear in the root, and "sqrt_linear" linear.)
_SCHEDULES: dict[str, Mapping[str, Any]] = {
    _ANIMATEDIFF: _BETAS | {"beta_schedule": "linear"},
    _ANIMATEDIFF_XL: _BETAS | {"beta_schedule": "scaled_linear", "beta_end": 0.02},
    _DEFAULT: _BETAS | {"beta_schedule": "scaled_linear"},
    "sqrt": {"trained_betas": torch.linspace(0.00085, 0.012, 1000).sqrt().tolist()},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
}
_SCHEDULE_NAMES = (
    "autoselect", _KEPT, _ANIMATEDIFF, _ANIMATEDIFF_XL, _DEFAULT, _AVERAGE, "lcm avg(sqrt_linear,linear)", "lcm",
    "lcm[100_ots]", "lcm >> sqrt_linear", "sqrt", "cosine", "squaredcos_cap_v2",
)  # fmt: skip
_FUSIONS = (
    "pyramid", "flat", "overlap-linear", "🔬delayed reverse sawtooth", "🔬pyramid-sigma", "🔬pyramid-sigma inverse",
    "🔬gauss-sigma", "🔬gauss-sigma inverse", "🔬random",
)  # fmt: skip
_FUSIONS_OF_STATIC = ("pyramid", "relative", *_FUSIONS[1:])
_MANY = 2**53 - 1


@dataclass(frozen=True)
class MotionModel:
    """A motion module, the noise schedule that it was trained with, and its dose: arguments of ``Motion``."""

    module: MotionAdapter
    schedule: str = _KEPT
    dose: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleSettings:
    """Which noise the frames of a clip begin with, and how many frames' noise is passed over before it."""

    noise_type: str
    batch_offset: int


Loras = tuple[tuple[str, float], ...]
Multival = float | Tensor

MotionModelT = Annotated[MotionModel, Socket("MOTION_MODEL_ADE")]
MotionModelsT = Annotated[tuple[MotionModel, ...], Socket("M_MODELS")]
LoraT = Annotated[Loras, Socket("MOTION_LORA")]
ContextT = Annotated[Context, Socket("CONTEXT_OPTIONS")]
MultivalT = Annotated[Multival, Socket("MULTIVAL")]
ViewT = Annotated[Any, Socket("VIEW_OPTS")]
SettingsT = Annotated[Any, Socket("AD_SETTINGS")]
KeyframesT = Annotated[Any, Socket("AD_KEYFRAMES")]
SampleSettingsT = Annotated[SampleSettings, Socket("SAMPLE_SETTINGS")]
PerBlockT = Annotated[Any, Socket("PER_BLOCK")]

Length = Annotated[int, Widget(min=1, max=128)]
Stride = Annotated[int, Widget(min=1, max=32)]
Overlap = Annotated[int, Widget(min=0, max=128)]
Fusion = Annotated[str, Widget(choices=_FUSIONS, optional=True)]
StaticFusion = Annotated[str, Widget(choices=_FUSIONS_OF_STATIC, optional=True)]
OnEqualLength = Annotated[bool, Widget(optional=True)]
LaterStart = Annotated[float, Widget(min=0.0, max=1.0, step=0.001, optional=True)]
GuaranteedSteps = Annotated[int, Widget(min=0, max=_MANY, optional=True)]
Percent = Annotated[float, Widget(min=0.0, max=1.0, step=0.001)]


def _module_names() -> list[str]:
    embedded = [f"{_EMBEDDED}{name}" for name in embedded_adapters() if name.startswith("motion")]
    return embedded + folders.listed("animatediff_models")


def _module_path(name: str) -> Path:
    return Path(adapter_path(name)) if name.startswith(_EMBEDDED) else folders.find("animatediff_models", name)


def _lora_path(name: str) -> Path:
    return folders.find("animatediff_motion_lora", name)


def _stamp_of_module(model_name: str | None) -> str:
    return "" if model_name is None else folders.stamp(_module_path(model_name))


def _stamp_of_lora(name: str | None) -> str:
    return "" if name is None else folders.stamp(_lora_path(name))


ModuleName = Annotated[str, Widget(choices=_module_names)]
ScheduleName = Annotated[str, Widget(choices=_SCHEDULE_NAMES)]


# what a node is made of


def _refuse(**given: Any) -> None:
    """Raises ``MahlstickError`` where one of these inputs is connected, for the suite has nothing that does it."""
    for name, value in given.items():
        if value is not None:
            raise MahlstickError(
                f"{name} is connected, and mahlstick has nothing that does what it asks; leave it open."
            )


def _leave(reason: str, **is_other: bool) -> None:
    """Raises ``MahlstickError`` where one of these widgets is not as it was."""
    for name, changed in is_other.items():
        if changed:
            raise MahlstickError(f"{name}: {reason}; leave it as it was.")


def _loaded(name: str) -> MotionModel:
    """AnimateDiff's own files were trained with its noise schedule, all others with that of their base."""
    path = _module_path(name)
    module = MotionAdapter.from_pretrained(path)
    if formats.inspect(path).layout != "original":
        return MotionModel(module)
    is_xl = len(module.config["block_out_channels"]) == 3
    return MotionModel(module, _ANIMATEDIFF_XL if is_xl else _ANIMATEDIFF)


def _dosed(
    motion_model: MotionModel, loras: Loras | None, scale: Multival | None, start: float = 0.0, end: float = 1.0
) -> MotionModel:
    module = motion_model.module
    for name, strength in loras or ():
        module = module.with_lora(_lora_path(name), strength)
    return replace(motion_model, module=module, dose={"start": start, "end": end, "window": "noise", **_scale(scale)})


def _scale(multival: Multival | None) -> dict[str, Any]:
    """A number, or a mask ``([n,] H, W)`` of numbers: the greatest of them as scale, and a mask in [0, 1]."""
    if not isinstance(multival, Tensor):
        return {"scale": 1.0 if multival is None else multival}
    greatest = float(multival.max())
    return {"scale": greatest, "mask": multival / greatest if greatest else None}


def _animated(
    model: ModelT,
    motion_models: tuple[MotionModel, ...],
    beta_schedule: str,
    context: Context | None,
    sample_settings: SampleSettings | None,
) -> ModelT:
    windows: dict[str, Any] = {}
    if context is not None:
        windows = {"context": context.length, "overlap": context.overlap}
        windows |= {"schedule": context.schedule, "fuse": context.fuse}
    if beta_schedule == "autoselect":
        beta_schedule = motion_models[0].schedule if motion_models else _KEPT
    if beta_schedule != _KEPT:
        model = replace(model, sigmas=_sigmas(beta_schedule).to(model.sigmas))
    if sample_settings is not None:
        model = replace(model, noise_order=partial(_noise_order, sample_settings, context))
    return model.with_units(*(Motion(each.module, **each.dose, **windows) for each in motion_models))


def _noise_order(settings: SampleSettings, context: Context | None, frames: int, seed: int) -> list[int]:
    """The number of the noise that each frame begins with; without windows only "constant" differs from "default"."""
    order = torch.arange(frames)
    if settings.noise_type == "constant":
        order = torch.zeros_like(order)
    elif settings.noise_type == "repeated_context" and context is not None:
        order %= context.length
    elif settings.noise_type == "FreeNoise" and context is not None:
        stride = context.length - context.overlap
        order = free_noise(order[: context.length], frames, stride, torch.Generator().manual_seed(seed))
    return (order + settings.batch_offset).tolist()


def _sigmas(name: str) -> Tensor:
    """The noise of each training step, √((1 − ᾱ) / ᾱ), of one of AnimateDiff-Evolved's noise schedules."""
    from diffusers import DDIMScheduler

    if name == _AVERAGE:
        return (_sigmas(_ANIMATEDIFF) + _sigmas(_DEFAULT)) / 2
    if name not in _SCHEDULES:
        raise MahlstickError(f"beta_schedule {name!r} is not known here; use {', '.join([_KEPT, *_SCHEDULES])}.")
    signal = DDIMScheduler(**_SCHEDULES[name]).alphas_cumprod
    return ((1 - signal) / signal).sqrt()


def _context(
    schedule: Schedule,
    length: int,
    overlap: int,
    fuse_method: str = "pyramid",
    stride: int = 1,
    use_on_equal_length: bool = False,
    start_percent: float = 0.0,
    **unknown: Any,
) -> Context:
    _refuse(**unknown)
    if fuse_method not in get_args(Fuse):
        raise MahlstickError(f"fuse_method {fuse_method!r} is not known here; use {' or '.join(get_args(Fuse))}.")
    _leave(
        "windows here hold frames side by side, all along the run",
        context_stride=stride != 1,
        use_on_equal_length=use_on_equal_length,
        start_percent=start_percent != 0.0,
    )
    return Context(length, overlap, schedule, cast(Fuse, fuse_method))


# one node that does all


@node("animatediff", display_name="AnimateDiff Loader (Gen 1)", fingerprint=_stamp_of_module)
def ADE_AnimateDiffLoaderGen1(
    *,
    model: ModelT,
    model_name: ModuleName,
    beta_schedule: ScheduleName = "autoselect",
    context_options: ContextT | None = None,
    motion_lora: LoraT | None = None,
    ad_settings: SettingsT | None = None,
    ad_keyframes: KeyframesT | None = None,
    sample_settings: SampleSettingsT | None = None,
    scale_multival: MultivalT | None = None,
    effect_multival: MultivalT | None = None,
    per_block: PerBlockT | None = None,
) -> ModelT:
    """Loads a motion module and puts it on a model: what is sampled with it, the whole batch, is one clip."""
    _refuse(
        ad_settings=ad_settings,
        ad_keyframes=ad_keyframes,
        effect_multival=effect_multival,
        per_block=per_block,
    )
    motion_model = _dosed(_loaded(model_name), motion_lora, scale_multival)
    return _animated(model, (motion_model,), beta_schedule, context_options, sample_settings)


@node("animatediff", display_name="AnimateDiff Loader (legacy)", fingerprint=_stamp_of_module)
def ADE_AnimateDiffLoaderWithContext(
    *,
    model: ModelT,
    model_name: ModuleName,
    beta_schedule: ScheduleName = "autoselect",
    context_options: ContextT | None = None,
    motion_lora: LoraT | None = None,
    ad_settings: SettingsT | None = None,
    sample_settings: SampleSettingsT | None = None,
    motion_scale: Annotated[float, Widget(min=0.0, step=0.001, optional=True)] = 1.0,
    apply_v2_models_properly: Annotated[bool, Widget(optional=True)] = True,
    ad_keyframes: KeyframesT | None = None,
) -> ModelT:
    """As the loader of generation 1, for older workflows. Every module is normalised as its file implies, whatever
    apply_v2_models_properly says."""
    _refuse(ad_settings=ad_settings, ad_keyframes=ad_keyframes)
    motion_model = _dosed(_loaded(model_name), motion_lora, motion_scale)
    return _animated(model, (motion_model,), beta_schedule, context_options, sample_settings)


# the same in parts


@node("animatediff", display_name="Load AnimateDiff Model", outputs=("MOTION_MODEL",), fingerprint=_stamp_of_module)
def ADE_LoadAnimateDiffModel(*, model_name: ModuleName, ad_settings: SettingsT | None = None) -> MotionModelT:
    """Loads a motion module."""
    _refuse(ad_settings=ad_settings)
    return _loaded(model_name)


@node("animatediff", display_name="Apply AnimateDiff Model")
def ADE_ApplyAnimateDiffModelSimple(
    *,
    motion_model: MotionModelT,
    motion_lora: LoraT | None = None,
    scale_multival: MultivalT | None = None,
    effect_multival: MultivalT | None = None,
    ad_keyframes: KeyframesT | None = None,
    per_block: PerBlockT | None = None,
) -> MotionModelsT:
    """Gives a motion module its strength, and motion LoRA."""
    _refuse(effect_multival=effect_multival, ad_keyframes=ad_keyframes, per_block=per_block)
    return (_dosed(motion_model, motion_lora, scale_multival),)


@node("animatediff", display_name="Apply AnimateDiff Model (Adv.)")
def ADE_ApplyAnimateDiffModel(
    *,
    motion_model: MotionModelT,
    start_percent: Percent = 0.0,
    end_percent: Percent = 1.0,
    motion_lora: LoraT | None = None,
    scale_multival: MultivalT | None = None,
    effect_multival: MultivalT | None = None,
    ad_keyframes: KeyframesT | None = None,
    prev_m_models: MotionModelsT | None = None,
    per_block: PerBlockT | None = None,
) -> MotionModelsT:
    """Gives a motion module its strength, motion LoRA and the part of the run in which it acts. Several may act."""
    _refuse(effect_multival=effect_multival, ad_keyframes=ad_keyframes, per_block=per_block)
    return (_dosed(motion_model, motion_lora, scale_multival, start_percent, end_percent), *(prev_m_models or ()))


@node("animatediff", display_name="Use Evolved Sampling")
def ADE_UseEvolvedSampling(
    *,
    model: ModelT,
    beta_schedule: ScheduleName = "autoselect",
    m_models: MotionModelsT | None = None,
    context_options: ContextT | None = None,
    sample_settings: SampleSettingsT | None = None,
) -> ModelT:
    """Puts motion modules on a model: what is sampled with it, the whole batch, is one clip."""
    return _animated(model, m_models or (), beta_schedule, context_options, sample_settings)


@node("animatediff", display_name="Sample Settings", outputs=("settings",))
def ADE_AnimateDiffSamplingSettings(
    *,
    batch_offset: Annotated[int, Widget(min=0, max=4096)] = 0,  # all the noise before it is drawn as well
    noise_type: Annotated[str, Widget(choices=("default", "constant", "empty", "repeated_context", "FreeNoise"))],
    seed_gen: Annotated[str, Widget(choices=("comfy", "comfy [gpu]", "auto1111", "auto1111 [gpu]"))],
    seed_offset: Annotated[int, Widget(min=-_MANY, max=_MANY)] = 0,
    noise_layers: Annotated[Any, Socket("NOISE_LAYERS")] | None = None,
    iteration_opts: Annotated[Any, Socket("ITERATION_OPTS")] | None = None,
    seed_override: Annotated[int, Socket("INT")] | None = None,
    adapt_denoise_steps: Annotated[bool, Widget(optional=True)] = False,
    custom_cfg: Annotated[Any, Socket("CUSTOM_CFG")] | None = None,
    sigma_schedule: Annotated[Any, Socket("SIGMA_SCHEDULE")] | None = None,
    image_inject: Annotated[Any, Socket("IMAGE_INJECT")] | None = None,
    ancestral_opts: Annotated[Any, Socket("ANCESTRAL_OPTS")] | None = None,
) -> SampleSettingsT:
    """Which noise the frames of a clip begin with: each its own, all the same (constant), in every window that of the
    first (repeated_context), or that of the first shuffled (FreeNoise)."""
    _refuse(
        noise_layers=noise_layers,
        iteration_opts=iteration_opts,
        seed_override=seed_override,
        custom_cfg=custom_cfg,
        sigma_schedule=sigma_schedule,
        image_inject=image_inject,
        ancestral_opts=ancestral_opts,
    )
    _leave(
        "noise is what the sampler draws for its seed",
        noise_type=noise_type == "empty",
        seed_gen=seed_gen != "comfy",
        seed_offset=seed_offset != 0,
        adapt_denoise_steps=adapt_denoise_steps,
    )
    return SampleSettings(noise_type, batch_offset)


@node("animatediff", display_name="Load AnimateDiff LoRA", fingerprint=_stamp_of_lora)
def ADE_AnimateDiffLoRALoader(
    *,
    name: Annotated[str, Widget(choices=lambda: folders.listed("animatediff_motion_lora"))],
    strength: Annotated[float, Widget(min=0.0, max=10.0, step=0.001)] = 1.0,
    prev_motion_lora: LoraT | None = None,
) -> LoraT:
    """Chooses a motion LoRA, such as a movement of the camera."""
    _lora_path(name)
    return (*(prev_motion_lora or ()), (name, strength))


@node("animatediff", display_name="Multival")
def ADE_MultivalDynamic(
    *, float_val: Annotated[float, Widget(min=0.0, step=0.001)] = 1.0, mask_optional: MaskT | None = None
) -> MultivalT:
    """How strongly a module acts: a number, or with a mask a number for each place and frame."""
    return float_val if mask_optional is None else mask_optional * float_val


# windows


@node("animatediff", display_name="Context Options: Standard Static", outputs=("CONTEXT_OPTS",))
def ADE_StandardStaticContextOptions(
    *,
    context_length: Length = 16,
    context_overlap: Overlap = 4,
    fuse_method: StaticFusion = "pyramid",
    use_on_equal_length: OnEqualLength = False,
    start_percent: LaterStart = 0.0,
    guarantee_steps: GuaranteedSteps = 1,
    prev_context: ContextT | None = None,
    view_opts: ViewT | None = None,
) -> ContextT:
    """A longer clip is made in windows whose borders stay where they are."""
    return _context("static", context_length, context_overlap, fuse_method, 1, use_on_equal_length, start_percent,
                    prev_context=prev_context, view_opts=view_opts)  # fmt: skip


@node("animatediff", display_name="Context Options: Standard Uniform", outputs=("CONTEXT_OPTS",))
def ADE_StandardUniformContextOptions(
    *,
    context_length: Length = 16,
    context_stride: Stride = 1,
    context_overlap: Overlap = 4,
    fuse_method: Fusion = "pyramid",
    use_on_equal_length: OnEqualLength = False,
    start_percent: LaterStart = 0.0,
    guarantee_steps: GuaranteedSteps = 1,
    prev_context: ContextT | None = None,
    view_opts: ViewT | None = None,
) -> ContextT:
    """A longer clip is made in windows whose borders move from step to step."""
    return _context("uniform", context_length, context_overlap, fuse_method, context_stride, use_on_equal_length,
                    start_percent, prev_context=prev_context, view_opts=view_opts)  # fmt: skip


@node("animatediff", display_name="Context Options: Looped Uniform", outputs=("CONTEXT_OPTS",))
def ADE_LoopedUniformContextOptions(
    *,
    context_length: Length = 16,
    context_stride: Stride = 1,
    context_overlap: Overlap = 4,
    closed_loop: bool = False,
    fuse_method: Fusion = "pyramid",
    use_on_equal_length: OnEqualLength = False,
    start_percent: LaterStart = 0.0,
    guarantee_steps: GuaranteedSteps = 1,
    prev_context: ContextT | None = None,
    view_opts: ViewT | None = None,
) -> ContextT:
    """A longer clip is made in windows whose borders move. With closed_loop its end flows into its beginning; without,
    no window holds both, where AnimateDiff-Evolved still has some that do."""
    schedule: Schedule = "looped" if closed_loop else "uniform"
    return _context(schedule, context_length, context_overlap, fuse_method, context_stride, use_on_equal_length,
                    start_percent, prev_context=prev_context, view_opts=view_opts)  # fmt: skip


@node("animatediff", display_name="Context Options: Looped Uniform (legacy)", outputs=("CONTEXT_OPTS",))
def ADE_AnimateDiffUniformContextOptions(
    *,
    context_length: Length = 16,
    context_stride: Stride = 1,
    context_overlap: Overlap = 4,
    context_schedule: Annotated[str, Widget(choices=("uniform",))] = "uniform",
    closed_loop: bool = False,
    fuse_method: Fusion = "flat",
    use_on_equal_length: OnEqualLength = False,
    start_percent: LaterStart = 0.0,
    guarantee_steps: GuaranteedSteps = 1,
    prev_context: ContextT | None = None,
    view_opts: ViewT | None = None,
) -> ContextT:
    """As Looped Uniform, for older workflows."""
    schedule: Schedule = "looped" if closed_loop else "uniform"
    return _context(schedule, context_length, context_overlap, fuse_method, context_stride, use_on_equal_length,
                    start_percent, prev_context=prev_context, view_opts=view_opts)  # fmt: skip


@node("animatediff", display_name="Context Options: Batched", outputs=("CONTEXT_OPTS",))
def ADE_BatchedContextOptions(
    *,
    context_length: Length = 16,
    start_percent: LaterStart = 0.0,
    guarantee_steps: GuaranteedSteps = 1,
    prev_context: ContextT | None = None,
) -> ContextT:
    """A longer clip is made in windows that share nothing, but for the last, which is as long as the others."""
    return _context("static", context_length, 0, start_percent=start_percent, prev_context=prev_context)
