"""Nodes that sample: KSampler and its custom relatives, guiders, and RescaleCFG."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from mahlstick.errors import MahlstickError
from mahlstick.nodes.sampling.denoise import Guider, classifier_free, denoise, guided
from mahlstick.nodes.sampling.noise import EmptyNoise, RandomNoise
from mahlstick.nodes.sampling.samplers import SAMPLERS, named
from mahlstick.nodes.sampling.schedules import SCHEDULERS, schedule
from mahlstick.nodes.schema import Widget, node
from mahlstick.nodes.values import (
    ConditioningT,
    GuiderT,
    LatentT,
    Model,
    ModelT,
    NoiseT,
    Sampler,
    SamplerT,
    SigmasT,
)

SeedT = Annotated[int, Widget(min=0, max=2**64 - 1, seed=True, tooltip="The same seed gives the same noise.")]
StepsT = Annotated[int, Widget(min=1, max=10000, tooltip="How many steps take the noise away.")]
CfgT = Annotated[
    float, Widget(min=0.0, max=100.0, step=0.1, tooltip="How closely the text is followed; at 1 without the negative.")
]
SamplerNameT = Annotated[str, Widget(choices=tuple(SAMPLERS), tooltip="How each step is taken.")]
SchedulerNameT = Annotated[str, Widget(choices=tuple(SCHEDULERS), tooltip="How much noise each step takes away.")]
StepT = Annotated[int, Widget(min=0, max=10000)]

_OUTPUTS = ("output", "denoised_output")


@node("sampling", display_name="KSampler")
def KSampler(
    *,
    model: ModelT,
    seed: SeedT = 0,
    steps: StepsT = 20,
    cfg: CfgT = 8.0,
    sampler_name: SamplerNameT,
    scheduler: SchedulerNameT,
    positive: ConditioningT,
    negative: ConditioningT,
    latent_image: LatentT,
    denoise: Annotated[float, Widget(min=0.0, max=1.0, step=0.01, tooltip="How much is made anew.")] = 1.0,
) -> LatentT:
    """Makes latents from noise, guided towards the positive and away from the negative."""
    sigmas = schedule(scheduler, model.table, steps, denoise=denoise, sampler=sampler_name)
    return _sampled(
        guided(model, positive, negative, cfg), RandomNoise(seed), named(sampler_name), sigmas, latent_image
    )[0]


@node("sampling", display_name="KSampler (Advanced)")
def KSamplerAdvanced(
    *,
    model: ModelT,
    add_noise: Literal["enable", "disable"] = "enable",
    noise_seed: SeedT = 0,
    steps: StepsT = 20,
    cfg: CfgT = 8.0,
    sampler_name: SamplerNameT,
    scheduler: SchedulerNameT,
    positive: ConditioningT,
    negative: ConditioningT,
    latent_image: LatentT,
    start_at_step: StepT = 0,
    end_at_step: StepT = 10000,
    return_with_leftover_noise: Literal["disable", "enable"] = "disable",
) -> LatentT:
    """Takes some of the steps of a KSampler, so that several can share the way from noise to picture."""
    sigmas = schedule(scheduler, model.table, steps, sampler=sampler_name)
    sigmas = _between(sigmas, start_at_step, end_at_step, return_with_leftover_noise == "enable")
    noise = RandomNoise(noise_seed) if add_noise == "enable" else EmptyNoise(noise_seed)
    return _sampled(guided(model, positive, negative, cfg), noise, named(sampler_name), sigmas, latent_image)[0]


@node("sampling/custom_sampling", outputs=_OUTPUTS)
def SamplerCustom(
    *,
    model: ModelT,
    add_noise: bool = True,
    noise_seed: SeedT = 0,
    cfg: CfgT = 8.0,
    positive: ConditioningT,
    negative: ConditioningT,
    sampler: SamplerT,
    sigmas: SigmasT,
    latent_image: LatentT,
) -> tuple[LatentT, LatentT]:
    """Samples with a sampler and a noise schedule of your own. The second output is the last estimate without noise."""
    noise = RandomNoise(noise_seed) if add_noise else EmptyNoise(noise_seed)
    return _sampled(guided(model, positive, negative, cfg), noise, sampler, sigmas, latent_image)


@node("sampling/custom_sampling", outputs=_OUTPUTS)
def SamplerCustomAdvanced(
    *, noise: NoiseT, guider: GuiderT, sampler: SamplerT, sigmas: SigmasT, latent_image: LatentT
) -> tuple[LatentT, LatentT]:
    """Samples with noise, guidance, sampler and noise schedule of your own. The second output is the last estimate
    without noise."""
    return _sampled(guider, noise, sampler, sigmas, latent_image)


@node("sampling/custom_sampling/guiders")
def BasicGuider(*, model: ModelT, conditioning: ConditioningT) -> GuiderT:
    """Follows one conditioning as it is, without a negative."""
    return guided(model, conditioning, [], 1.0)


@node("sampling/custom_sampling/guiders")
def CFGGuider(*, model: ModelT, positive: ConditioningT, negative: ConditioningT, cfg: CfgT = 8.0) -> GuiderT:
    """Guides towards the positive and away from the negative."""
    return guided(model, positive, negative, cfg)


@node("sampling/custom_sampling/guiders")
def DualCFGGuider(
    *,
    model: ModelT,
    cond1: ConditioningT,
    cond2: ConditioningT,
    negative: ConditioningT,
    cfg_conds: CfgT = 8.0,
    cfg_cond2_negative: CfgT = 8.0,
    style: Literal["regular", "nested"] = "regular",
) -> GuiderT:
    """Guides by two scales: from the second conditioning to the first, and from the negative to the second."""
    guide = model.guide or classifier_free

    def regular(found: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> Tensor:
        towards = guide(found["middle"], found["negative"], cfg_cond2_negative, x, sigma)
        return towards + (found["positive"] - found["middle"]) * cfg_conds

    def nested(found: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> Tensor:
        text = guide(found["positive"], found["middle"], cfg_conds, x, sigma)
        return classifier_free(text, found["negative"], cfg_cond2_negative, x, sigma)

    conditionings = {"positive": cond1, "middle": cond2, "negative": negative}
    if style == "nested":
        return Guider(model, conditionings, nested)
    alone = math.isclose(cfg_cond2_negative, 1.0)
    both = alone and math.isclose(cfg_conds, 1.0)
    return Guider(model, conditionings, regular, frozenset(["negative"] * alone + ["middle"] * both))


@node("advanced/model")
def RescaleCFG(*, model: ModelT, multiplier: Annotated[float, Widget(min=0.0, max=1.0, step=0.01)] = 0.7) -> ModelT:
    """Keeps strong guidance from making pictures too bright and too full of contrast."""
    return replace(model, guide=partial(_rescaled, multiplier))


def _rescaled(multiplier: float, cond: Tensor, uncond: Tensor, scale: float, x: Tensor, sigma: Tensor) -> Tensor:
    """Guidance whose standard deviation is that of the conditional estimate (Lin et al., arXiv 2305.08891, equations
    15 and 16), taken in v as the paper does, whatever the model predicts."""
    sigma = sigma.view(-1, 1, 1, 1)
    to_v = torch.sqrt(sigma**2 + 1) / sigma
    kept = x / (sigma**2 + 1)
    v_cond, v_uncond = (kept - cond) * to_v, (kept - uncond) * to_v
    v = classifier_free(v_cond, v_uncond, scale, x, sigma)
    rescaled = v * v_cond.std(dim=(1, 2, 3), keepdim=True) / v.std(dim=(1, 2, 3), keepdim=True)
    return kept - torch.lerp(v, rescaled, multiplier) / to_v


def _between(sigmas: Tensor, start: int, end: int, leave_noise: bool) -> Tensor:
    """The steps from ``start`` to ``end``, the last one to 0 unless some noise is to be left; none where there are
    none."""
    if end < len(sigmas) - 1:
        sigmas = sigmas[: end + 1] if leave_noise else torch.cat([sigmas[:end], sigmas.new_zeros(1)])
    return sigmas[start:] if start < len(sigmas) - 1 else sigmas[:0]


def _sampled(
    guider: Guider, noise: Any, sampler: Sampler, sigmas: Tensor, latent: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The LATENT that comes out, and the one with the last estimate."""
    samples = _for_model(guider.model, latent)
    latent = {**latent, "samples": samples}
    latent.pop("downscale_ratio_spacial", None)
    order = guider.model.noise_order
    placed = {} if order is None else {"batch_index": order(len(samples), noise.seed)}
    drawn = noise.draw(placed | latent)
    made, estimate = denoise(guider, drawn, samples, sampler, sigmas, noise.seed, latent.get("noise_mask"))
    return {**latent, "samples": made}, {**latent, "samples": estimate}


def _for_model(model: Model, latent: Mapping[str, Any]) -> Tensor:
    """The latents; empty ones get the model's channels and its size for the picture that was asked for."""
    samples, channels = latent["samples"], model.unet.config.out_channels
    batch, found, height, width = samples.shape
    if not samples.any():
        ratio = latent.get("downscale_ratio_spacial", model.factor) / model.factor
        return samples.new_zeros(batch, channels, round(height * ratio), round(width * ratio))
    if found != channels:
        raise MahlstickError(
            f"latent_image has {found} channels and the model takes {channels}: encode it with the model's own VAE."
        )
    return samples
