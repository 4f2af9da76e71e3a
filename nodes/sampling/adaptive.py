"""DPM-Solver with steps of its own choosing (Lu et al. 2022, "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic
Model Sampling in Around 10 Steps").

Of the sigmas that they are given these samplers use the first and the last above 0, where they end.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mahlstick.errors import MahlstickError
from mahlstick.nodes.sampling.noise import NoiseSampler
from mahlstick.nodes.sampling.steps import Callback, ancestral_step, estimate, silent
from mahlstick.nodes.values import Denoiser


def dpm_fast(denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, callback: Callback = silent) -> Tensor:
    """Steps even in time, of order 3 as far as the number of estimates goes; one for each given step."""
    count = len(sigmas) - 1
    orders = [3] * (count // 3 - 1) + [2, 1] if count % 3 == 0 else [3] * (count // 3) + [count % 3]
    start, end = _span(sigmas)
    times = torch.linspace(float(start), float(end), len(orders) + 1)
    for i, order in enumerate(orders):
        slope = _slope(denoiser, x, times[i])
        callback(i, x - (-times[i]).exp() * slope)
        x, _ = _singlestep(denoiser, x, slope, times[i], times[i + 1], order)
    return x


def dpm_adaptive(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSampler,
    callback: Callback = silent,
    order: Literal[2, 3] = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Steps as long as two solutions of orders ``order`` and one below agree, by a PID controller as in
    k-diffusion.

    ``rtol`` and ``atol`` are the relative and absolute error a step may make; ``h_init`` is the first step in time;
    ``accept_safety`` is how much the controller may shorten the next step before this one is made again. The callback
    hears of rejected steps too.
    """
    time, end = _span(sigmas)
    direction = 1.0 if end >= time else -1.0
    if eta and direction < 0:
        raise MahlstickError("dpm_adaptive adds no noise on its way to more noise; set eta to 0.")
    controller = _Controller(h_init, pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
    before, step = x, 0
    while direction * (end - time) > 1e-5:
        reached = time + direction * min(controller.h, abs(float(end - time)))
        aim = reached
        if eta:
            aim = torch.minimum(end, -ancestral_step((-time).exp(), (-reached).exp(), eta)[0].log())
        slope = _slope(denoiser, x, time)
        callback(step, x - (-time).exp() * slope)
        high, low = _singlestep(denoiser, x, slope, time, aim, order)
        allowed = torch.maximum(torch.full_like(x, atol), rtol * torch.maximum(low.abs(), before.abs()))
        if controller.accepts(float(torch.linalg.norm((low - high) / allowed)) / x.numel() ** 0.5):
            x, before = high, low
            if eta:
                sigma_up = ((-2 * reached).exp() - (-2 * aim).exp()).clamp(min=0).sqrt()
                x = x + noise((-time).exp(), (-reached).exp()) * s_noise * sigma_up
            time = reached
        step += 1
    return x


class _Controller:
    """Proportional, integral and derivative control of the step ``h``."""

    def __init__(self, h: float, p: float, i: float, d: float, order: float, accept_safety: float) -> None:
        self.h, self.accept_safety = abs(h), accept_safety
        self.powers = ((p + i + d) / order, -(p + 2 * d) / order, d / order)
        self.errors: tuple[float, ...] = ()

    def accepts(self, error: float) -> bool:
        """Whether a step with this error, relative to the allowed one, stands. Sets the next step."""
        inverse = 1 / (error + 1e-8)
        last = self.errors or (inverse, inverse)
        factor = math.prod(each**power for each, power in zip((inverse, *last), self.powers, strict=True))
        factor = 1 + math.atan(factor - 1)
        self.h *= factor
        accepted = factor >= self.accept_safety
        self.errors = (inverse, last[0]) if accepted else last
        return accepted


def _span(sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """Times of the first sigma and the last above 0."""
    return -sigmas[0].log(), -(sigmas[-1] if sigmas[-1] > 0 else sigmas[-2]).log()


def _slope(denoiser: Denoiser, x: Tensor, time: Tensor) -> Tensor:
    """The noise in ``x``."""
    sigma = (-time).exp()
    return (x - estimate(denoiser, x, sigma)) / sigma


def _singlestep(
    denoiser: Denoiser, x: Tensor, slope: Tensor, start: Tensor, end: Tensor, order: int
) -> tuple[Tensor, Tensor]:
    """A step of DPM-Solver of an order, and of the one below by the same estimates (algorithms 1 and 2)."""
    h = end - start

    def first(part: float, slope: Tensor = slope) -> Tensor:
        return x - (-(start + part * h)).exp() * (part * h).expm1() * slope

    if order == 1:
        return first(1.0), first(1.0)
    r = 1 / order
    change = _slope(denoiser, first(r), start + r * h) - slope
    second = first(1.0) - (-end).exp() / (2 * r) * h.expm1() * change
    if order == 2:
        return second, first(1.0)

    def curved(part: float, by: float, change: Tensor) -> Tensor:
        return first(part) - (-(start + part * h)).exp() * (part / by) * ((part * h).expm1() / (part * h) - 1) * change

    change = _slope(denoiser, curved(2 / 3, r, change), start + 2 / 3 * h) - slope
    return curved(1.0, 2 / 3, change), second
