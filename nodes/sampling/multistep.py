"""Samplers that remember the estimates of the steps before.

Each goes from ``x`` at ``sigmas[0]`` to ``sigmas[-1]``, with ``denoiser(x, sigma) -> x0``; ``callback(step, x0)`` hears
of each step. ``eta`` scales the noise that a step adds (0: none, 1: as much as in the diffusion process run backwards),
``s_noise`` multiplies it besides.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mahlstick.nodes.sampling.noise import NoiseSampler
from mahlstick.nodes.sampling.schedules import percent_to_sigma, training_sigmas
from mahlstick.nodes.sampling.steps import (
    Callback,
    adams_weights,
    ancestral_step,
    combine,
    estimate,
    estimates,
    phi_2,
    silent,
    towards,
)
from mahlstick.nodes.values import Denoiser

#: Weights of the slopes, the newest first, from the sigmas where they were taken, the newest first, and the next sigma.
_Weights = Callable[[list[float], float], list[float]]

#: Adams and Bashforth's weights for even steps, the newest slope first.
_EVEN = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def lms(denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, callback: Callback = silent, order: int = 4) -> Tensor:
    """Linear multistep: the polynomial through the last slopes, integrated over sigma (Adams and Bashforth)."""
    return _adams_bashforth(
        denoiser, x, sigmas, callback, order, lambda past, sigma: adams_weights(past, past[0], sigma)
    )


def ipndm(denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, callback: Callback = silent, max_order: int = 4) -> Tensor:
    """Adams and Bashforth's weights for even steps, whatever the steps (Zhang and Chen 2023, "Fast Sampling of
    Diffusion Models with Exponential Integrator", iPNDM)."""
    return _adams_bashforth(
        denoiser,
        x,
        sigmas,
        callback,
        max_order,
        lambda past, sigma: [(sigma - past[0]) * weight for weight in _EVEN[len(past) - 1]],
    )


def ipndm_v(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, callback: Callback = silent, max_order: int = 4
) -> Tensor:
    """:func:`ipndm` with weights for the steps as they are (Zhou et al. 2024, "Fast ODE-based Sampling for Diffusion
    Models in Around 5 Steps", diff-sampler's ``ipndm_v``)."""
    return _adams_bashforth(denoiser, x, sigmas, callback, max_order, _uneven)


def deis(denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, callback: Callback = silent, max_order: int = 3) -> Tensor:
    """The polynomial through the last slopes in the time of the variance-preserving process, integrated over sigma
    (Zhang and Chen 2023, tAB-DEIS, equations 14 and 15)."""
    # The process that goes from sigma 0.002 at time 0.001 to sigma 80 at time 1, as EDM has it.
    low, high = math.log1p(0.002**2), math.log1p(80.0**2)
    beta_d = 2 * (low / 1e-3 - high) / (1e-3 - 1)
    beta_min = high - beta_d / 2

    def time(sigma: float) -> float:
        return (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(sigma**2)) - beta_min) / beta_d

    def speed(t: np.ndarray) -> np.ndarray:
        variance = np.expm1(beta_d * t**2 / 2 + beta_min * t)
        return (beta_d * t + beta_min) * (variance + 1) / (2 * np.sqrt(variance))

    def weights(past: list[float], sigma: float) -> list[float]:
        if len(past) == 1:
            return [sigma - past[0]]
        return adams_weights([time(each) for each in past], time(past[0]), time(sigma), speed)

    return _adams_bashforth(denoiser, x, sigmas, callback, max_order, weights)


def _adams_bashforth(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, callback: Callback, order: int, weights: _Weights
) -> Tensor:
    slopes: deque[Tensor] = deque(maxlen=order)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = estimate(denoiser, x, sigma)
        callback(i, x0)
        if sigma_next == 0:
            return x0
        slopes.appendleft((x - x0) / sigma)
        past = sigmas[i + 1 - len(slopes) : i + 1].flip(0).tolist()
        x = x + combine(weights(past, float(sigma_next)), slopes)
    return x


def _uneven(past: list[float], sigma: float) -> list[float]:
    """Adams and Bashforth's weights up to order 4 for uneven steps, in the form and with the slips of diff-sampler's
    code, whose numbers ComfyUI has: a parenthesis in ``c`` and the last ratio of steps. Even steps do not show them."""
    h, *rest = [after - before for after, before in pairwise([sigma, *past])]
    weights = [1.0]
    if len(past) > 1:
        h1 = rest[0]
        weights = [1 + h / h1 / 2, -h / h1 / 2]
    if len(past) > 2:
        h2 = rest[1]
        a = h / (3 * (h + h1))
        c = (1 - a * h * (h + h1) / (h1 * (h1 + h2))) / 2
        weights = [weights[0] + c, weights[1] - (1 + h1 / h2) * c, c * h1 / h2]
    if len(past) > 3:
        h3 = rest[2]
        e = (1 - a) / 2 + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
        e *= h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
        k = h1 * (h1 + h2) / (h2 * (h2 + h3))
        weights[0] += e
        weights[1] -= (1 + h1 / h2 + k) * e
        weights[2] += (h1 / h2 + k * (1 + h2 / h3)) * e
        weights.append(-k * h1 / h2 * e)
    return [h * weight for weight in weights]


def gradient_estimation(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: Callback = silent,
    ge_gamma: float = 2.0,
    cfg_pp: bool = False,
) -> Tensor:
    """Euler's method with the slope drawn on by ``ge_gamma - 1`` of its change (Permenter and Yuan 2024, "Interpreting
    and Improving Diffusion Models from an Optimization Perspective")."""
    slope: Tensor | None = None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0, anchor = estimates(denoiser, x, sigma, cfg_pp)
        callback(i, x0)
        last, slope = slope, (x - anchor) / sigma
        x = x0 + slope * sigma_next
        if last is not None and sigma_next > 0:
            x = x + (ge_gamma - 1) * (slope - last) * (sigma_next - sigma)
    return x


def dpmpp_2m(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, callback: Callback = silent, cfg_pp: bool = False
) -> Tensor:
    """DPM-Solver++(2M): the estimate drawn on to the middle of the step (Lu et al. 2022, "DPM-Solver++", algorithm
    2)."""
    last = None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0, anchor = estimates(denoiser, x, sigma, cfg_pp)
        callback(i, x0)
        h = (sigma / sigma_next).log()
        x0_middle = x0
        if last is not None and sigma_next > 0:
            x0_middle = x0 + (x0 - last) * h / (2 * (sigmas[i - 1] / sigma).log())
        x, last = towards(x, x0_middle, h) + (-h).exp() * (x0 - anchor), anchor
    return x


def dpmpp_2m_sde(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSampler,
    callback: Callback = silent,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: Literal["midpoint", "heun"] = "midpoint",
) -> Tensor:
    """DPM-Solver++(2M) for the stochastic equation (Lu et al. 2022, "DPM-Solver++"; as in k-diffusion).

    ``heun`` weighs the slope of the estimate as the exponential integrator does, ``midpoint`` as if the estimate were
    constant over the step.
    """

    def slopes(h: Tensor, steps: list[Tensor], x0s: list[Tensor]) -> Tensor:
        weight = phi_2(h) if solver_type == "heun" else -(-h).expm1() / 2
        return weight * (x0s[0] - x0s[1]) * steps[0] / steps[1]

    return _dpmpp_sde(denoiser, x, sigmas, noise, callback, eta, s_noise, slopes, 2)


def dpmpp_3m_sde(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSampler,
    callback: Callback = silent,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """DPM-Solver++(3M) for the stochastic equation: :func:`dpmpp_2m_sde` with a parabola through three estimates (as
    in k-diffusion)."""

    def slopes(h: Tensor, steps: list[Tensor], x0s: list[Tensor]) -> Tensor:
        first = (x0s[0] - x0s[1]) * steps[0] / steps[1]
        if len(x0s) < 3:
            return phi_2(h) * first
        r_0, r_1 = steps[1] / steps[0], steps[2] / steps[0]
        second = (first - (x0s[1] - x0s[2]) / r_1) / (r_0 + r_1)
        return phi_2(h) * (first + second * r_0) - (phi_2(h) / h - 0.5) * second

    return _dpmpp_sde(denoiser, x, sigmas, noise, callback, eta, s_noise, slopes, 3)


def _dpmpp_sde(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    noise: NoiseSampler,
    callback: Callback,
    eta: float,
    s_noise: float,
    slopes: Callable[[Tensor, list[Tensor], list[Tensor]], Tensor],
    order: int,
) -> Tensor:
    """``slopes`` adds what the change of the last estimates does, from steps and estimates, the newest first."""
    steps: deque[Tensor] = deque(maxlen=order)
    x0s: deque[Tensor] = deque(maxlen=order)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = estimate(denoiser, x, sigma)
        callback(i, x0)
        if sigma_next == 0:
            return x0
        h = (sigma / sigma_next).log()
        steps.appendleft(h)
        x0s.appendleft(x0)
        x = (-h * (1 + eta)).exp() * x - (-h * (1 + eta)).expm1() * x0
        if len(x0s) > 1:
            x = x + slopes(h * (1 + eta), list(steps), list(x0s))
        if eta > 0 and s_noise > 0:
            x = x + noise(sigma, sigma_next) * sigma_next * (-(-2 * h * eta).expm1()).sqrt() * s_noise
    return x


def res_multistep(
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
    """An exponential method through the last two estimates (Zhang et al. 2023, "Improved Order Analysis and Design of
    Exponential Integrator for Diffusion Models Sampling", RES)."""
    last: Tensor | None = None
    last_down = sigmas[0]
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0, anchor = estimates(denoiser, x, sigma, cfg_pp)
        callback(i, x0)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        if last is None or sigma_down == 0:
            x = x0 + (x - anchor) / sigma * sigma_down
        else:
            h = (sigma / sigma_down).log()
            slope = (anchor - last) / (sigmas[i - 1] / last_down).log()
            x = towards(x + x0 - anchor, anchor, h) + h * phi_2(h) * slope
        if sigma_next > 0:
            x = x + noise(sigma, sigma_next) * s_noise * sigma_up
        last, last_down = anchor, sigma_down
    return x


def er_sde(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSampler,
    callback: Callback = silent,
    s_noise: float = 1.0,
    noise_scaler: Callable[[Tensor], Tensor] | None = None,
    max_stage: int = 3,
) -> Tensor:
    """Extended reverse-time SDE solver of up to three stages (Cui et al. 2023, "Elucidating the Solution Space of
    Extended Reverse-Time SDE for Diffusion Models").

    ``noise_scaler`` is the paper's function of sigma that says how much noise there is: ``sigma`` solves the ordinary
    differential equation, ``sigma^(1 + eta)`` the reverse-time stochastic one; left out, the paper's ER-SDE 5.
    """
    scale = noise_scaler or (lambda sigma: sigma * ((sigma**0.3).exp() + 10))
    points = torch.arange(200.0)
    x0, slope = x, x
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        last, last_slope = x0, slope
        x0 = estimate(denoiser, x, sigma)
        callback(i, x0)
        if sigma_next == 0:
            return x0
        r, h = scale(sigma_next) / scale(sigma), sigma_next - sigma
        x = r * x + (1 - r) * x0
        between = sigma_next - points * h / len(points)
        densities = -h / len(points) / scale(between) * scale(sigma_next)
        if min(max_stage, i + 1) > 1:
            slope = (x0 - last) / (sigma - sigmas[i - 1])
            x = x + (h + densities.sum()) * slope
        if min(max_stage, i + 1) > 2:
            curvature = (slope - last_slope) / ((sigma - sigmas[i - 2]) / 2)
            x = x + (h**2 / 2 + (densities * (between - sigma)).sum()) * curvature
        if s_noise > 0:
            x = x + noise(sigma, sigma_next) * s_noise * (sigma_next**2 - (sigma * r) ** 2).clamp(min=0).sqrt()
    return x


def stochastic_window(sigmas: Tensor, start: float = 0.2, end: float = 0.8, stride: int = 1) -> tuple[float, float]:
    """The sigmas of a model's table between which :func:`sa_solver` adds noise, from fractions as ComfyUI's percent."""
    return percent_to_sigma(sigmas, start, stride), percent_to_sigma(sigmas, end, stride)


def sa_solver(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSampler,
    callback: Callback = silent,
    eta: float = 1.0,
    s_noise: float = 1.0,
    window: tuple[float, float] | None = None,
    predictor_order: int = 3,
    corrector_order: int = 4,
    use_pece: bool = False,
    simple_order_2: bool = False,
) -> Tensor:
    """Stochastic Adams solver, a predictor with a corrector (Xue et al. 2023, "SA-Solver: Stochastic Adams Solver for
    Fast Sampling of Diffusion Models", algorithm 1).

    Noise of strength ``eta`` (the paper's tau) is added to steps that end in ``window``, from the higher sigma to the
    lower; left out, it is Stable Diffusion's (:func:`stochastic_window`). ``use_pece`` estimates the corrected picture
    once more. ``simple_order_2``: the paper's simpler weights (appendix D) where there are two.
    """
    high, low = window or stochastic_window(training_sigmas())
    times = (-sigmas.double().log()).tolist()
    x0s: deque[Tensor] = deque(maxlen=max(predictor_order, corrector_order))
    left = len(sigmas) - 1 if sigmas[-1] == 0 else math.inf
    tau, added = 0.0, torch.zeros_like(x)

    def integrate(x: Tensor, i: int, order: int, corrects: bool) -> Tensor:
        """``x`` of step ``i`` a step on, by the last estimates."""
        start, end, last = times[i], times[i + 1], i + corrects
        weights = _stochastic_adams(times[last + 1 - order : last + 1], start, end, tau, simple_order_2, corrects)
        return math.exp((1 + tau**2) * (start - end)) * x + combine(weights, list(x0s)[-order:])

    start = x
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = estimate(denoiser, x, sigma)
        callback(i, x0)
        x0s.append(x0)
        order = int(min(corrector_order, len(x0s), left - i))
        if i > 0 and order > 0 and (sigma_next > 0 or use_pece):
            x = integrate(start, i - 1, order, corrects=True) + added
            if use_pece:
                x0 = x0s[-1] = estimate(denoiser, x, sigma)
        if sigma_next == 0:
            return x0
        start, tau = x, eta if high >= sigma_next >= low else 0.0
        x = integrate(start, i, int(min(predictor_order, len(x0s), left - 1 - i)), corrects=False)
        added = torch.zeros_like(x)
        if tau > 0 and s_noise > 0:
            variance = -math.expm1(-2 * tau**2 * (times[i + 1] - times[i]))
            added = noise(sigma, sigma_next) * sigma_next * math.sqrt(variance) * s_noise
        x = x + added
    return x


def _stochastic_adams(
    nodes: list[float], start: float, end: float, tau: float, simple: bool, corrects: bool
) -> list[float]:
    """The weights of SA-Solver's estimates at ``nodes`` for a step in time (its equations 15 and 18)."""
    speed = 1 + tau**2
    if simple and len(nodes) == 2:
        total, h = -math.expm1(-speed * (end - start)), end - start
        slope = speed * h / 2 if corrects else speed * h**2 / 2 / (nodes[0] - start)
        return [total - slope, slope] if corrects else [slope, total - slope]
    return adams_weights(nodes, start, end, lambda time: speed * np.exp(speed * (time - end)))


def uni_pc(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: Callback = silent,
    variant: Literal["bh1", "bh2"] = "bh1",
) -> Tensor:
    """UniPC of order 3: a predictor whose corrector needs no further estimate (Zhao et al. 2023, "UniPC: A Unified
    Predictor-Corrector Framework", algorithms 1 and 2; B(h) is ``h`` for ``bh1``, ``expm1(h)`` for ``bh2``).

    It cannot reach sigma 0, so as in ComfyUI it ends at 0.001.
    """
    steps = len(sigmas) - 1
    times = -sigmas.double().clamp(min=0.001).log()
    order = min(3, max(steps - 1, 1))
    start, x0s = x, [estimate(denoiser, x, sigmas[0])]
    callback(0, x0s[0])
    for i in range(1, steps + 1):
        now = min(i, order, steps + 1 - i)
        h = times[i] - times[i - 1]
        ratios = [(times[i - 1 - k] - times[i - 1]) / h for k in range(1, now)]
        slopes = [(x0s[-1 - k] - x0s[-1]) / ratio for k, ratio in zip(range(1, now), ratios, strict=True)]
        base, scale = towards(start, x0s[-1], h), h if variant == "bh1" else -(-h).expm1()
        predictor, corrector = _unified_weights(ratios, h, scale)
        x = base + scale * combine(predictor, slopes) if slopes else base
        if i == steps:
            return x
        x0 = estimate(denoiser, x, sigmas[i])
        callback(i, x0)
        start = base + scale * combine(corrector, [*slopes, x0 - x0s[-1]])
        x0s = [*x0s[-2:], x0]
    return x


def _unified_weights(ratios: list[Tensor], h: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of the slopes in UniPC's predictor, and in its corrector that has one slope more."""
    half, order = h.new_tensor([0.5]), len(ratios) + 1
    nodes = torch.stack([*ratios, torch.ones_like(h)])
    powers = torch.stack([nodes**k for k in range(order)])
    phi, moments = (-h).expm1() / -h - 1, []
    for k in range(1, order + 1):
        moments.append(-phi * math.factorial(k) / scale)
        phi = phi / -h - 1 / math.factorial(k + 1)
    wanted = torch.stack(moments)
    corrector = torch.linalg.solve(powers, wanted) if order > 1 else half
    # As the authors' code does, low orders take the limit for small steps.
    predictor = torch.linalg.solve(powers[:-1, :-1], wanted[:-1]) if order > 2 else half
    return predictor, corrector
