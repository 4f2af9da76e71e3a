"""Samplers, noise schedules and noise as values of their own, for SamplerCustom and SamplerCustomAdvanced."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from diffusers.schedulers import AysSchedules
from torch import Tensor

from mahlstick.nodes.sampling import noise as noises
from mahlstick.nodes.sampling import schedules
from mahlstick.nodes.sampling.multistep import stochastic_window
from mahlstick.nodes.sampling.samplers import SAMPLERS, named
from mahlstick.nodes.schema import Widget, node
from mahlstick.nodes.values import LatentT, ModelT, NoiseT, Prediction, SamplerT, SigmasT

_SAMPLERS, _SCHEDULERS = "sampling/custom_sampling/samplers", "sampling/custom_sampling/schedulers"
_SIGMAS, _NOISE = "sampling/custom_sampling/sigmas", "sampling/custom_sampling/noise"
_HIGH_AND_LOW = ("high_sigmas", "low_sigmas")
_DISTILLED = 50  # training steps of latent consistency models

StepsT = Annotated[int, Widget(min=1, max=10000)]
DenoiseT = Annotated[float, Widget(min=0.0, max=1.0, step=0.01)]
PercentT = Annotated[float, Widget(min=0.0, max=1.0, step=0.001)]
SigmaT = Annotated[float, Widget(min=0.0, max=5000.0, step=0.01)]
SettingT = Annotated[float, Widget(min=0.0, max=100.0, step=0.01)]
DeviceT = Literal["gpu", "cpu"]


@node(_SAMPLERS)
def KSamplerSelect(*, sampler_name: Annotated[str, Widget(choices=tuple(SAMPLERS))]) -> SamplerT:
    """A sampler with the settings that it has in KSampler."""
    return named(sampler_name)


@node(_SAMPLERS)
def SamplerEulerAncestral(*, eta: SettingT = 1.0, s_noise: SettingT = 1.0) -> SamplerT:
    """Euler's method with noise after each step."""
    return named("euler_ancestral", eta=eta, s_noise=s_noise)


@node(_SAMPLERS, display_name="SamplerEulerAncestralCFG++")
def SamplerEulerAncestralCFGPP(
    *,
    eta: Annotated[float, Widget(min=0.0, max=1.0, step=0.01)] = 1.0,
    s_noise: Annotated[float, Widget(min=0.0, max=10.0, step=0.01)] = 1.0,
) -> SamplerT:
    """Euler's method with noise after each step, and CFG++'s guidance, which wants a scale of about 1."""
    return named("euler_ancestral_cfg_pp", eta=eta, s_noise=s_noise)


@node(_SAMPLERS)
def SamplerLMS(*, order: Annotated[int, Widget(min=1, max=100)] = 4) -> SamplerT:
    """Linear multistep, through as many steps as the order says."""
    return named("lms", order=order)


@node(_SAMPLERS)
def SamplerDPMPP_3M_SDE(*, eta: SettingT = 1.0, s_noise: SettingT = 1.0, noise_device: DeviceT) -> SamplerT:
    """DPM-Solver++(3M) with noise."""
    return _on("dpmpp_3m_sde", noise_device, eta=eta, s_noise=s_noise)


@node(_SAMPLERS)
def SamplerDPMPP_2M_SDE(
    *, solver_type: Literal["midpoint", "heun"], eta: SettingT = 1.0, s_noise: SettingT = 1.0, noise_device: DeviceT
) -> SamplerT:
    """DPM-Solver++(2M) with noise."""
    return _on("dpmpp_2m_sde", noise_device, eta=eta, s_noise=s_noise, solver_type=solver_type)


@node(_SAMPLERS)
def SamplerDPMPP_SDE(
    *, eta: SettingT = 1.0, s_noise: SettingT = 1.0, r: SettingT = 0.5, noise_device: DeviceT
) -> SamplerT:
    """DPM-Solver++ with noise, and an estimate within each step."""
    return _on("dpmpp_sde", noise_device, eta=eta, s_noise=s_noise, r=r)


@node(_SAMPLERS)
def SamplerDPMPP_2S_Ancestral(*, eta: SettingT = 1.0, s_noise: SettingT = 1.0) -> SamplerT:
    """DPM-Solver++(2S) with noise after each step."""
    return named("dpmpp_2s_ancestral", eta=eta, s_noise=s_noise)


@node(_SAMPLERS)
def SamplerDPMAdaptative(
    *,
    order: Annotated[int, Widget(min=2, max=3)] = 3,
    rtol: SettingT = 0.05,
    atol: SettingT = 0.0078,
    h_init: SettingT = 0.05,
    pcoeff: SettingT = 0.0,
    icoeff: SettingT = 1.0,
    dcoeff: SettingT = 0.0,
    accept_safety: SettingT = 0.81,
    eta: SettingT = 0.0,
    s_noise: SettingT = 1.0,
) -> SamplerT:
    """DPM-Solver with steps of its own choosing, as small as the tolerances ask."""
    return named(
        "dpm_adaptive",
        order=order,
        rtol=rtol,
        atol=atol,
        h_init=h_init,
        pcoeff=pcoeff,
        icoeff=icoeff,
        dcoeff=dcoeff,
        accept_safety=accept_safety,
        eta=eta,
        s_noise=s_noise,
    )


@node(_SAMPLERS)
def SamplerER_SDE(
    *,
    solver_type: Literal["ER-SDE", "Reverse-time SDE", "ODE"],
    max_stage: Annotated[int, Widget(min=1, max=3)] = 3,
    eta: Annotated[float, Widget(min=0.0, max=100.0, step=0.01, tooltip="How much noise; not for ER-SDE.")] = 1.0,
    s_noise: SettingT = 1.0,
) -> SamplerT:
    """Extended reverse-time SDE solver, of up to three stages."""
    if solver_type == "ER-SDE":
        return named("er_sde", s_noise=s_noise, max_stage=max_stage)
    eta = 0.0 if solver_type == "ODE" else eta
    scaler = partial(_power, 1 + eta)
    return named("er_sde", s_noise=s_noise if eta else 0.0, noise_scaler=scaler, max_stage=max_stage)


@node(_SAMPLERS)
def SamplerSASolver(
    *,
    model: ModelT,
    eta: Annotated[float, Widget(min=0.0, max=10.0, step=0.01)] = 1.0,
    sde_start_percent: PercentT = 0.2,
    sde_end_percent: PercentT = 0.8,
    s_noise: SettingT = 1.0,
    predictor_order: Annotated[int, Widget(min=1, max=6)] = 3,
    corrector_order: Annotated[int, Widget(min=0, max=6)] = 4,
    use_pece: bool,
    simple_order_2: bool,
) -> SamplerT:
    """Stochastic Adams solver, with noise between two places of the noise schedule."""
    return named(
        "sa_solver",
        eta=eta,
        s_noise=s_noise,
        window=stochastic_window(model.table, sde_start_percent, sde_end_percent, model.stride),
        predictor_order=predictor_order,
        corrector_order=corrector_order,
        use_pece=use_pece,
        simple_order_2=simple_order_2,
    )


@node(_SAMPLERS)
def SamplerSEEDS2(
    *,
    solver_type: Literal["phi_1", "phi_2"],
    eta: Annotated[float, Widget(min=0.0, max=100.0, step=0.01, tooltip="How much noise.")] = 1.0,
    s_noise: SettingT = 1.0,
    r: Annotated[float, Widget(min=0.01, max=1.0, step=0.01, tooltip="Where in a step the second estimate is.")] = 0.5,
) -> SamplerT:
    """SEEDS-2. With phi_2 and r 1 it is exp_heun_2_x0_sde, and with eta 0 besides exp_heun_2_x0."""
    return named("seeds_2", eta=eta, s_noise=s_noise, r=r, solver_type=solver_type)


@node(_SCHEDULERS)
def BasicScheduler(
    *,
    model: ModelT,
    scheduler: Annotated[str, Widget(choices=tuple(schedules.SCHEDULERS))],
    steps: StepsT = 20,
    denoise: DenoiseT = 1.0,
) -> SigmasT:
    """A schedule by its name, for the noise of a model."""
    return schedules.schedule(scheduler, model.table, steps, denoise=denoise)[-(steps + 1) :]


@node(_SCHEDULERS)
def KarrasScheduler(
    *, steps: StepsT = 20, sigma_max: SigmaT = 14.614642, sigma_min: SigmaT = 0.0291675, rho: SettingT = 7.0
) -> SigmasT:
    """Steps that grow smaller towards the end, the more so the greater rho."""
    return schedules.karras(steps, sigma_min, sigma_max, rho)


@node(_SCHEDULERS)
def ExponentialScheduler(
    *, steps: StepsT = 20, sigma_max: SigmaT = 14.614642, sigma_min: SigmaT = 0.0291675
) -> SigmasT:
    """Each step takes the same share of the noise."""
    return schedules.exponential(steps, sigma_min, sigma_max)


@node(_SCHEDULERS)
def PolyexponentialScheduler(
    *, steps: StepsT = 20, sigma_max: SigmaT = 14.614642, sigma_min: SigmaT = 0.0291675, rho: SettingT = 1.0
) -> SigmasT:
    """Like ExponentialScheduler, with smaller steps towards the end for a rho above 1."""
    return schedules.polyexponential(steps, sigma_min, sigma_max, rho)


@node(_SCHEDULERS)
def LaplaceScheduler(
    *,
    steps: StepsT = 20,
    sigma_max: SigmaT = 14.614642,
    sigma_min: SigmaT = 0.0291675,
    mu: Annotated[float, Widget(min=-10.0, max=10.0, step=0.1)] = 0.0,
    beta: Annotated[float, Widget(min=0.0, max=10.0, step=0.1)] = 0.5,
) -> SigmasT:
    """Many steps where the logarithm of sigma is near mu, fewer with a greater beta."""
    return schedules.laplace(steps, sigma_min, sigma_max, mu, beta)


@node(_SCHEDULERS)
def VPScheduler(
    *,
    steps: StepsT = 20,
    beta_d: SigmaT = 19.9,
    beta_min: SigmaT = 0.1,
    eps_s: Annotated[float, Widget(min=0.0, max=1.0, step=0.0001)] = 0.001,
) -> SigmasT:
    """Even steps in the time of the continuous variance-preserving process."""
    return schedules.variance_preserving(steps, beta_d, beta_min, eps_s)


@node(_SCHEDULERS)
def BetaSamplingScheduler(
    *,
    model: ModelT,
    steps: StepsT = 20,
    alpha: Annotated[float, Widget(min=0.0, max=50.0, step=0.01)] = 0.6,
    beta: Annotated[float, Widget(min=0.0, max=50.0, step=0.01)] = 0.6,
) -> SigmasT:
    """Steps at quantiles of a beta distribution: small alpha and beta put many at both ends."""
    return schedules.beta(model.table.cpu(), steps, alpha, beta)


@node(_SCHEDULERS)
def SDTurboScheduler(
    *, model: ModelT, steps: Annotated[int, Widget(min=1, max=10)] = 1, denoise: DenoiseT = 1.0
) -> SigmasT:
    """The ten sigmas for which SD Turbo was trained, from the highest."""
    start = 10 - int(10 * denoise)
    timesteps = torch.arange(999, 0, -100)[start : start + steps]
    return torch.cat([schedules.sigma_at(model.table.cpu(), timesteps, model.stride), torch.zeros(1)])


@node(_SCHEDULERS)
def AlignYourStepsScheduler(
    *, model_type: Literal["SD1", "SDXL", "SVD"], steps: StepsT = 10, denoise: DenoiseT = 1.0
) -> SigmasT:
    """Steps found best for a family of models with few steps (Sabour et al. 2024, "Align Your Steps")."""
    if denoise <= 0:
        return torch.zeros(0)
    known = _aligned(model_type).log()
    places = np.linspace(0, len(known) - 1, steps + 1)
    sigmas = torch.from_numpy(np.interp(places, np.arange(len(known)), known)).exp().float()
    sigmas[-1] = 0
    return sigmas[-(round(steps * denoise) + 1) :]


def _aligned(model_type: str) -> Tensor:
    """The published sigmas of ten steps, from the highest."""
    if model_type == "SVD":
        return torch.tensor([*AysSchedules["StableDiffusionVideoSigmas"][:-1], 0.002])
    timesteps = AysSchedules["StableDiffusionTimesteps" if model_type == "SD1" else "StableDiffusionXLTimesteps"]
    return schedules.training_sigmas()[[*timesteps, 0]]


@node(_SIGMAS, outputs=_HIGH_AND_LOW)
def SplitSigmas(*, sigmas: SigmasT, step: Annotated[int, Widget(min=0, max=10000)] = 0) -> tuple[SigmasT, SigmasT]:
    """Parts a schedule at a step."""
    return sigmas[: step + 1], sigmas[step:]


@node(_SIGMAS, outputs=_HIGH_AND_LOW)
def SplitSigmasDenoise(*, sigmas: SigmasT, denoise: DenoiseT = 1.0) -> tuple[SigmasT, SigmasT]:
    """Parts a schedule so that the second part holds a fraction of the steps."""
    steps = round(max(len(sigmas) - 1, 0) * denoise)
    return sigmas[:-steps], sigmas[-(steps + 1) :]


@node(_SIGMAS)
def FlipSigmas(*, sigmas: SigmasT) -> SigmasT:
    """The schedule backwards, to go from a picture to noise."""
    flipped = sigmas.flip(0)
    # No sampler can start from a sigma of 0.
    flipped[:1] = torch.where(flipped[:1] == 0, 0.0001, flipped[:1])
    return flipped


@node(_SIGMAS)
def SetFirstSigma(
    *, sigmas: SigmasT, sigma: Annotated[float, Widget(min=0.0, max=20000.0, step=0.001)] = 136.0
) -> SigmasT:
    """The schedule with another sigma to begin with."""
    return torch.cat([sigmas.new_tensor([sigma]), sigmas[1:]])


@node(_SIGMAS)
def ExtendIntermediateSigmas(
    *,
    sigmas: SigmasT,
    steps: Annotated[int, Widget(min=1, max=100)] = 2,
    start_at_sigma: Annotated[float, Widget(min=-1.0, max=20000.0, step=0.01)] = -1.0,
    end_at_sigma: Annotated[float, Widget(min=0.0, max=20000.0, step=0.01)] = 12.0,
    spacing: Literal["linear", "cosine", "sine"],
) -> SigmasT:
    """Makes several steps of each step that begins between two sigmas; a start of -1 is above all."""
    part = torch.arange(steps) / steps
    curves = {"linear": part, "cosine": (part * math.pi / 2).sin(), "sine": 1 - (part * math.pi / 2).cos()}
    here, there = sigmas[:-1, None], sigmas[1:, None]
    parted = here + curves[spacing] * (there - here)
    extended = (here >= end_at_sigma) & (here <= (start_at_sigma if start_at_sigma >= 0 else math.inf))
    return torch.cat([parted[extended | (torch.arange(steps) == 0)], sigmas[-1:]])


@node(_SIGMAS)
def ManualSigmas(*, sigmas: str = "1, 0.5") -> SigmasT:
    """A schedule of the numbers in a text."""
    return torch.tensor([float(number) for number in re.findall(r"[-+]?\d*\.?\d+", sigmas)])


@node(_SIGMAS, outputs=("sigma_value",))
def SamplingPercentToSigma(
    *,
    model: ModelT,
    sampling_percent: Annotated[float, Widget(min=0.0, max=1.0, step=0.0001)] = 0.0,
    return_actual_sigma: Annotated[
        bool, Widget(tooltip="At 0 and 1 the model's own sigmas, not those beyond that close no window.")
    ] = False,
) -> float:
    """The sigma at a fraction of a model's noise schedule."""
    if return_actual_sigma and sampling_percent in (0.0, 1.0):
        return float(model.table[-1 if sampling_percent == 0 else 0])
    return schedules.percent_to_sigma(model.table, sampling_percent, model.stride)


@node(_NOISE)
def RandomNoise(*, noise_seed: Annotated[int, Widget(min=0, max=2**64 - 1, seed=True)] = 0) -> NoiseT:
    """The noise of a seed."""
    return noises.RandomNoise(noise_seed)


@node(_NOISE)
def DisableNoise() -> NoiseT:
    """No noise: sampling goes on from the latents as they are."""
    return noises.EmptyNoise()


@node(_NOISE)
def AddNoise(*, model: ModelT, noise: NoiseT, sigmas: SigmasT, latent_image: LatentT) -> LatentT:
    """Latents under as much noise as a schedule takes away."""
    if not len(sigmas):
        return latent_image
    z = latent_image["samples"]
    x = model.scaled(z) if z.any() else z
    sigma = (sigmas[0] - sigmas[-1]).abs() if len(sigmas) > 1 else sigmas[0]
    x = x + noise.draw(latent_image).to(x) * sigma.to(x)
    return {**latent_image, "samples": torch.nan_to_num(model.unscaled(x), nan=0.0, posinf=0.0, neginf=0.0)}


@node("advanced/model")
def ModelSamplingDiscrete(
    *, model: ModelT, sampling: Literal["eps", "v_prediction", "lcm", "x0"], zsnr: bool = False
) -> ModelT:
    """Says what a model predicts (with lcm the noise too, at 50 of the training steps), and whether its last training
    step knew nothing but noise (zero terminal SNR)."""
    prediction = cast(Prediction, {"eps": "epsilon", "x0": "sample"}.get(sampling, sampling))
    sigmas = schedules.zero_terminal(model.sigmas) if zsnr else model.sigmas
    stride = max(1, len(sigmas) // _DISTILLED) if sampling == "lcm" else 1
    return replace(model, prediction=prediction, sigmas=sigmas, stride=stride)


def _on(sampler: str, device: str, **settings: Any) -> Any:
    return named(sampler if device == "cpu" else f"{sampler}_gpu", **settings)


def _power(exponent: float, sigma: Tensor) -> Tensor:
    return sigma**exponent
