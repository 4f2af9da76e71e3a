"""The noise of each sampling step: ComfyUI's schedules of sigmas.

``sigma`` is the noise's standard deviation beside a picture of unit scale (Karras et al. 2022): with
:math:`\\bar\\alpha` of DDPM, ``sigma² = (1 - ᾱ) / ᾱ``. A model's table holds the sigma of each training step, rising.
A schedule falls, from the noise at which sampling begins to 0, in float32 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mahlstick.errors import MahlstickError

#: The names of samplers for which ComfyUI makes one step more and leaves out the last sigma before 0.
DISCARD_PENULTIMATE_SIGMA = frozenset({"dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"})

#: ᾱ of the last training step where the signal is meant to be zero: a sigma of 4519 in place of infinity.
_ZERO_TERMINAL = 4.8973451890853435e-08


def training_sigmas(
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    steps: int = 1000,
    beta_schedule: str = "scaled_linear",
    betas: Any = None,
    zero_terminal_snr: bool = False,
) -> Tensor:
    """The sigma of each training step, rising: ``(steps,)``, float32. Stable Diffusion 1 and 2, and XL, by default.

    ``betas`` are the variances themselves; ``zero_terminal_snr`` as :func:`zero_terminal`. Computed in float64 as
    ComfyUI does. Raises ``MahlstickError`` for a ``beta_schedule`` that is not known.
    """
    if betas is None:
        betas = _betas(beta_schedule, beta_start, beta_end, steps)
    bar = torch.cumprod(1 - torch.as_tensor(betas, dtype=torch.float64), dim=0)
    sigmas = ((1 - bar) / bar).sqrt()
    return zero_terminal(sigmas) if zero_terminal_snr else sigmas.float()


def zero_terminal(sigmas: Tensor) -> Tensor:
    """The table with the signal shifted and scaled until none is left at the last step, in float32 (Lin et al. 2024,
    "Common Diffusion Noise Schedules and Sample Steps Are Flawed", algorithm 1)."""
    root = (1 / (sigmas.double() ** 2 + 1)).sqrt()
    bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    bar[-1] = _ZERO_TERMINAL
    return ((1 - bar) / bar).sqrt().float()


def sigmas_from_config(config: Mapping[str, Any]) -> Tensor:
    """The sigma of each training step from the config of a diffusers scheduler, as :func:`training_sigmas`."""
    return training_sigmas(
        beta_start=config.get("beta_start", 0.00085),
        beta_end=config.get("beta_end", 0.012),
        steps=config.get("num_train_timesteps", 1000),
        beta_schedule=config.get("beta_schedule", "scaled_linear"),
        betas=config.get("trained_betas"),
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr")),
    )


def sigma_at(sigmas: Tensor, timestep: Tensor, stride: int = 1) -> Tensor:
    """The sigma of a training step, interpolated in its logarithm between those of the table.

    Here and below the table may hold only every ``stride``-th training step, up to the last.
    """
    log_sigmas = sigmas.log()
    place = ((timestep.float() - (stride - 1)) / stride).clamp(0, len(sigmas) - 1).to(sigmas.device)
    low, high, part = place.floor().long(), place.ceil().long(), place.frac()
    return ((1 - part) * log_sigmas[low] + part * log_sigmas[high]).exp()


def timestep_at(sigmas: Tensor, sigma: Tensor, stride: int = 1) -> Tensor:
    """The training step of the table whose sigma is nearest in its logarithm, of the shape of ``sigma``."""
    place = (sigma.to(sigmas.device).log() - sigmas.log()[:, None]).abs().argmin(dim=0).view(sigma.shape)
    return place * stride + stride - 1


def percent_to_sigma(sigmas: Tensor, percent: float, stride: int = 1) -> float:
    """The sigma at a fraction of the training steps, counted from the noisiest: ComfyUI's start and end percent.

    At 0 it is above every sigma and at 1 below, so that a window from 0 to 1 is never closed.
    """
    if percent <= 0:
        return 999999999.9
    if percent >= 1:
        return 0.0
    return sigma_at(sigmas, torch.tensor((1 - percent) * (len(sigmas) * stride - 1)), stride).item()


def schedule(name: str, sigmas: Tensor, steps: int, *, denoise: float = 1.0, sampler: str = "") -> Tensor:
    """The falling sigmas of a schedule over a model's table, mostly ``(steps + 1,)``.

    ``denoise`` below 1 gives the last ``steps`` of a schedule of ``steps / denoise``, and none at all at 0. For a
    ``sampler`` of :data:`DISCARD_PENULTIMATE_SIGMA` the last sigma before 0 is left out and one more step made.
    Raises ``MahlstickError`` for an unknown name or no steps.
    """
    if name not in SCHEDULERS:
        raise MahlstickError(f"{name!r}: no such scheduler; choose one of {', '.join(SCHEDULERS)}.")
    if steps < 1:
        raise MahlstickError(f"A schedule of {steps} steps makes nothing; give 1 or more.")
    if denoise <= 0:
        return torch.zeros(0)
    extra = int(sampler in DISCARD_PENULTIMATE_SIGMA)
    whole = denoise > 0.9999
    found = SCHEDULERS[name](sigmas.cpu(), (steps if whole else int(steps / denoise)) + extra)
    if extra:
        found = torch.cat([found[:-2], found[-1:]])
    return found if whole else found[-(steps + 1) :]


def sigmas(scheduler: str, steps: int) -> Tensor:
    """The falling sigmas of a schedule for Stable Diffusion 1.5, ``(steps + 1,)``."""
    return schedule(scheduler, training_sigmas(), steps)


def normal(sigmas: Tensor, steps: int) -> Tensor:
    """Training steps at even distances, both ends among them."""
    to_zero = math.isclose(float(sigmas[0]), 0, abs_tol=1e-5)
    found = sigma_at(sigmas, torch.linspace(len(sigmas) - 1, 0, steps + to_zero))
    return found if to_zero else _to_zero(found)


def sgm_uniform(sigmas: Tensor, steps: int) -> Tensor:
    """Training steps at even distances, as far as the last before the end (Stability's generative models)."""
    return _to_zero(sigma_at(sigmas, torch.linspace(len(sigmas) - 1, 0, steps + 1)[:-1]))


def simple(sigmas: Tensor, steps: int) -> Tensor:
    """Every n-th sigma of the table, from the noisiest."""
    stride = len(sigmas) / steps
    return _to_zero(sigmas[[-(1 + int(step * stride)) for step in range(steps)]])


def ddim_uniform(sigmas: Tensor, steps: int) -> Tensor:
    """Every n-th sigma of the table, from the second upwards, as DDIM's authors do (Song et al. 2021).

    Where the table does not divide evenly there are some steps more.
    """
    is_zero = math.isclose(float(sigmas[1]), 0, abs_tol=1e-5)
    found = sigmas[1 :: max(len(sigmas) // (steps + is_zero), 1)].flip(0)
    return found if is_zero else _to_zero(found)


def beta(sigmas: Tensor, steps: int, alpha: float = 0.6, beta: float = 0.6) -> Tensor:
    """Training steps at quantiles of a beta distribution, dense at both ends (Lee et al. 2024, "Beta Sampling is All
    You Need"). Steps that fall together are made once."""
    from scipy import stats

    if alpha <= 0 or beta <= 0:
        raise MahlstickError(f"a beta distribution needs alpha and beta above 0; got {alpha:g} and {beta:g}.")
    quantiles = stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), alpha, beta)
    timesteps = np.rint(quantiles * (len(sigmas) - 1)).astype(int)
    return _to_zero(sigmas[[step for i, step in enumerate(timesteps) if i == 0 or step != timesteps[i - 1]]])


def linear_quadratic(sigmas: Tensor, steps: int, threshold: float = 0.025) -> Tensor:
    """Small even steps for the first half, then growing with the square (Mochi's schedule, Genmo 2024)."""
    half = steps // 2
    if half == 0:
        return _to_zero(sigmas[-1:])
    step, rest = torch.arange(steps, dtype=torch.float64), steps - half
    even = threshold / half * step
    curve = (half - threshold * steps) / (half * rest**2)
    slope = threshold / half - 2 * (half - threshold * steps) / rest**2
    found = torch.where(step < half, even, curve * step**2 + slope * step + curve * half**2)
    return _to_zero((1 - found).float() * sigmas[-1])


def _on_ends(curve: Callable[[int, float, float], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """A schedule that knows only the lowest and highest sigma of the table."""
    return lambda sigmas, steps: curve(steps, float(sigmas[0]), float(sigmas[-1]))


def karras(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Even steps in ``sigma^(1/rho)`` (Karras et al. 2022, "Elucidating the Design Space", equation 5)."""
    ramp = torch.linspace(0, 1, steps)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _to_zero((high + ramp * (low - high)) ** rho)


def exponential(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Even steps in the logarithm of sigma."""
    return _to_zero(torch.linspace(math.log(sigma_max), math.log(sigma_min), steps).exp())


def polyexponential(steps: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> Tensor:
    """The logarithm of sigma falls with the power ``rho`` of the steps that are left."""
    ramp = torch.linspace(1, 0, steps) ** rho
    return _to_zero((ramp * (math.log(sigma_max) - math.log(sigma_min)) + math.log(sigma_min)).exp())


def kl_optimal(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Even steps in the arc tangent of sigma, best for normally distributed pictures (Sabour et al. 2024, "Align Your
    Steps: Optimizing Sampling Schedules in Diffusion Models")."""
    ramp = torch.arange(steps, dtype=torch.float32) / max(steps - 1, 1)
    return _to_zero((ramp * math.atan(sigma_min) + (1 - ramp) * math.atan(sigma_max)).tan())


def variance_preserving(steps: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3) -> Tensor:
    """Even steps in the time of the continuous variance-preserving process (Karras et al. 2022, table 1, VP)."""
    t = torch.linspace(1, eps_s, steps)
    return _to_zero(torch.special.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt())


def laplace(steps: int, sigma_min: float, sigma_max: float, mu: float = 0.0, beta: float = 0.5) -> Tensor:
    """The logarithm of sigma at quantiles of a Laplace distribution (Hang et al. 2024, "Improved Noise Schedule for
    Diffusion Training"), ``(steps,)``: as in ComfyUI it does not end at 0."""
    x = torch.linspace(0, 1, steps)
    log_sigma = mu - beta * torch.sign(0.5 - x) * torch.log(1 - 2 * (0.5 - x).abs() + 1e-5)
    return log_sigma.exp().clamp(sigma_min, sigma_max)


def _to_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _betas(name: str, start: float, end: float, steps: int) -> Tensor:
    """Diffusers' variances of training steps, in float64."""
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if name == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if name == "squaredcos_cap_v2":
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    raise MahlstickError(
        f"{name!r}: no such beta_schedule; use scaled_linear, linear or squaredcos_cap_v2, or give trained betas."
    )


#: ComfyUI's schedules by name: each from a model's rising table and a number of steps.
SCHEDULERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "simple": simple,
    "sgm_uniform": sgm_uniform,
    "karras": _on_ends(karras),
    "exponential": _on_ends(exponential),
    "ddim_uniform": ddim_uniform,
    "beta": beta,
    "normal": normal,
    "linear_quadratic": linear_quadratic,
    "kl_optimal": _on_ends(kl_optimal),
}
