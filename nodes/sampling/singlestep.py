"""Samplers whose steps know nothing of those before.

Each goes from ``x`` at ``sigmas[0]`` to ``sigmas[-1]``, with ``denoiser(x, sigma) -> x0``; ``callback(step, x0)`` hears
of each step. ``eta`` scales the noise that a step adds (0: none, 1: as much as in the diffusion process run backwards),
``s_noise`` multiplies it besides.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import Tensor

from mahlstick.nodes.sampling.noise import NoiseSampler
from mahlstick.nodes.sampling.steps import Callback, ancestral_step, estimate, estimates, phi_2, silent, towards
from mahlstick.nodes.values import Denoiser


def euler(denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, callback: Callback = silent) -> Tensor:
    """Euler's method for ``dx/dsigma = (x - x0) / sigma``, which is DDIM (Karras et al. 2022, "Elucidating the Design
    Space of Diffusion-Based Generative Models", equations 1 and 3)."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = estimate(denoiser, x, sigma)
        callback(i, x0)
        x = x + (x - x0) / sigma * (sigma_next - sigma)
    return x


def euler_ancestral(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSampler,
    callback: Callback = silent,
    eta: float = 1.0,
    s_noise: float = 1.0,
    cfg_pp: bool = False,
) -> Tensor:
    """A step of Euler's further down than the next sigma, and noise to make up for it (Song et al. 2021, "Denoising
    Diffusion Implicit Models", equation 12). With ``eta`` 1 it is DDPM."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0, anchor = estimates(denoiser, x, sigma, cfg_pp)
        callback(i, x0)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        x = x0 + (x - anchor) / sigma * sigma_down
        if sigma_down > 0:
            x = x + noise(sigma, sigma_next) * s_noise * sigma_up
    return x


def lcm(denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, noise: NoiseSampler, callback: Callback = silent) -> Tensor:
    """All the way to the estimate, and noise upon it (Luo et al. 2023, "Latent Consistency Models")."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x = estimate(denoiser, x, sigma)
        callback(i, x)
        if sigma_next > 0:
            x = x + noise(sigma, sigma_next) * sigma_next
    return x


def heun(denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, callback: Callback = silent) -> Tensor:
    """Heun's method: the mean of the slopes at both ends (Karras et al. 2022, algorithm 1)."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = estimate(denoiser, x, sigma)
        callback(i, x0)
        d, h = (x - x0) / sigma, sigma_next - sigma
        if sigma_next > 0:
            ahead = x + d * h
            d = (d + (ahead - estimate(denoiser, ahead, sigma_next)) / sigma_next) / 2
        x = x + d * h
    return x


def heunpp2(denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, callback: Callback = silent) -> Tensor:
    """Heun's method with the slopes of up to two further sigmas, weighed by sigma: Heun++ of the Automatic1111
    community, without a paper."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = estimate(denoiser, x, sigma)
        callback(i, x0)
        slopes = [(x - x0) / sigma]
        ahead = x
        # The slope at the last sigma of all is never asked for: at 0 there is none.
        visited = [sigma, *sigmas[i + 1 : min(i + 3, len(sigmas) - 1)]]
        for here, there in pairwise(visited):
            ahead = ahead + slopes[-1] * (there - here)
            slopes.append((ahead - estimate(denoiser, ahead, there)) / there)
        weights = [there / (len(visited) * sigmas[0]) for there in visited[1:]]
        d = sum((w * d for w, d in zip(weights, slopes[1:], strict=True)), start=(1 - sum(weights)) * slopes[0])
        x = x + d * (sigma_next - sigma)
    return x


def dpm_2(denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, callback: Callback = silent) -> Tensor:
    """The slope at the geometric middle of each step: DPM-Solver-2 with Karras's coordinates (Lu et al. 2022,
    "DPM-Solver", algorithm 1)."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = estimate(denoiser, x, sigma)
        callback(i, x0)
        x = _midpoint(denoiser, x, x0, sigma, sigma_next)
    return x


def dpm_2_ancestral(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSampler,
    callback: Callback = silent,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """:func:`dpm_2` with steps further down and noise, as in :func:`euler_ancestral`."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = estimate(denoiser, x, sigma)
        callback(i, x0)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        x = _midpoint(denoiser, x, x0, sigma, sigma_down)
        if sigma_down > 0:
            x = x + noise(sigma, sigma_next) * s_noise * sigma_up
    return x


def _midpoint(denoiser: Denoiser, x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    d = (x - x0) / sigma
    if sigma_next > 0:
        middle = (sigma * sigma_next).sqrt()
        ahead = x + d * (middle - sigma)
        d = (ahead - estimate(denoiser, ahead, middle)) / middle
    return x + d * (sigma_next - sigma)


def dpmpp_2s_ancestral(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSampler,
    callback: Callback = silent,
    eta: float = 1.0,
    s_noise: float = 1.0,
    cfg_pp: bool = False,
) -> Tensor:
    """DPM-Solver++(2S) with noise (Lu et al. 2022, "DPM-Solver++", algorithm 1 with the middle in time)."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0, anchor = estimates(denoiser, x, sigma, cfg_pp)
        callback(i, x0)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        if sigma_down > 0:
            h = (sigma / sigma_down).log()
            ahead = towards(x + x0 - anchor, x0, h / 2)
            x0_middle, anchor_middle = estimates(denoiser, ahead, (sigma * sigma_down).sqrt(), cfg_pp)
            # The second unconditional estimate against the first guided one: so ComfyUI's code has it.
            x = towards(x + x0 - anchor_middle if cfg_pp else x, x0_middle, h)
        else:
            x = x0
        if sigma_next > 0:
            x = x + noise(sigma, sigma_next) * s_noise * sigma_up
    return x


def dpmpp_sde(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSampler,
    callback: Callback = silent,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Tensor:
    """DPM-Solver++ for the stochastic equation, with an estimate at the part ``r`` of each step (Lu et al. 2022,
    "DPM-Solver++"; as in k-diffusion)."""

    def leap(x0: Tensor, start: Tensor, end: Tensor) -> Tensor:
        sigma_down, sigma_up = ancestral_step(start, end, eta)
        down = towards(x, x0, (start / sigma_down).log())
        return down + noise(start, end) * s_noise * sigma_up if eta > 0 and s_noise > 0 else down

    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = estimate(denoiser, x, sigma)
        callback(i, x0)
        if sigma_next == 0:
            return x0
        # Rounded as in ComfyUI, since a Brownian path is rough: the noise of a sigma a little beside is another.
        middle = (-(-sigma.log() + r * (sigma.log() - sigma_next.log()))).exp()
        x0_middle = estimate(denoiser, leap(x0, sigma, middle), middle)
        x = leap(x0 + (x0_middle - x0) / (2 * r), sigma, sigma_next)
    return x


def seeds_2(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSampler,
    callback: Callback = silent,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
    solver_type: Literal["phi_1", "phi_2"] = "phi_1",
) -> Tensor:
    """SEEDS-2, an exponential method with two estimates a step (Gonzalez et al. 2023, "SEEDS: Exponential SDE Solvers
    for Fast High-Quality Sampling from Diffusion Models"). With ``r`` 1 and ``phi_2``: Heun's exponential method."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = estimate(denoiser, x, sigma)
        callback(i, x0)
        if sigma_next == 0:
            return x0
        path = _Path(noise, sigma, sigma_next, eta, s_noise)
        slope = (estimate(denoiser, path.reach(r, x, x0), path.sigma(r)) - x0) / r
        h = path.h * (1 + eta)
        x = path.reach(1.0, x, x0) + (-(-h).expm1() / 2 if solver_type == "phi_1" else phi_2(h)) * slope
    return x


def seeds_3(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSampler,
    callback: Callback = silent,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r_1: float = 1 / 3,
    r_2: float = 2 / 3,
) -> Tensor:
    """SEEDS-3, an exponential method with three estimates a step (Gonzalez et al. 2023)."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = estimate(denoiser, x, sigma)
        callback(i, x0)
        if sigma_next == 0:
            return x0
        path = _Path(noise, sigma, sigma_next, eta, s_noise)
        h = path.h * (1 + eta)
        slope = (estimate(denoiser, path.reach(r_1, x, x0), path.sigma(r_1)) - x0) / r_1
        ahead = path.reach(r_2, x, x0) + r_2 * phi_2(r_2 * h) * slope
        slope = (estimate(denoiser, ahead, path.sigma(r_2)) - x0) / r_2
        x = path.reach(1.0, x, x0) + phi_2(h) * slope
    return x


class _Path:
    """One random path over a step, so that its stages and its end meet the same noise."""

    def __init__(self, noise: NoiseSampler, start: Tensor, end: Tensor, eta: float, s_noise: float) -> None:
        self.noise, self.start, self.eta, self.s_noise = noise, start, eta, s_noise
        self.h = (start / end).log()
        self.part = 0.0
        self.walked: Tensor | float = 0.0

    def sigma(self, part: float) -> Tensor:
        """Where a part of the step's time is over."""
        return self.start * (-part * self.h).exp()

    def reach(self, part: float, x: Tensor, x0: Tensor) -> Tensor:
        """From ``x`` at the step's start to where a part of its time is over, with the noise met so far."""
        x = towards(x, x0, part * self.h * (1 + self.eta))
        if self.eta > 0 and self.s_noise > 0:
            kept = (self.part - part) * self.h * self.eta
            fresh = self.noise(self.sigma(self.part), self.sigma(part))
            self.walked = self.walked * kept.exp() + fresh * (-(2 * kept).expm1()).sqrt()
            self.part = part
            x = x + self.walked * self.sigma(part) * self.s_noise
        return x
