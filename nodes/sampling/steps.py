"""What the samplers share: an estimate of the picture, the parts of a step, and weights of Adams methods.

In all of them ``x`` is the picture with noise of standard deviation ``sigma`` (Karras et al. 2022), ``x0`` the
denoiser's estimate of the picture, and time half the logarithm of the signal-to-noise ratio, ``lambda = -log(sigma)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mahlstick.nodes.values import Denoiser

#: Hears of each step: its number and the estimate x0. What it raises ends the sampling.
Callback = Callable[[int, Tensor], None]


def silent(step: int, x0: Tensor) -> None:
    """A callback that hears nothing."""


def estimate(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
    """The estimate of the picture with one sigma for the whole batch."""
    return denoiser(x, sigma * x.new_ones(len(x)))


def estimates(denoiser: Denoiser, x: Tensor, sigma: Tensor, cfg_pp: bool) -> tuple[Tensor, Tensor]:
    """The estimate of the picture, and the one whose noise a step adds back.

    For CFG++ (Chung et al. 2024, "CFG++: Manifold-constrained Classifier Free Guidance") the second is unconditional: a
    guided denoiser gives both by its method ``both``. Without guidance, and in all other samplers, they are the same.
    """
    both = getattr(denoiser, "both", None)
    if cfg_pp and both is not None:
        x0, unconditional = both(x, sigma * x.new_ones(len(x)))
        return x0, unconditional
    x0 = estimate(denoiser, x, sigma)
    return x0, x0


def ancestral_step(sigma: Tensor, sigma_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """The sigma to step down to, and that of the noise to add then, which together make ``sigma_next``.

    With ``eta`` 1 the noise is that of DDPM's posterior, with 0 there is none (Song et al. 2021, "Denoising Diffusion
    Implicit Models", equation 16).
    """
    variance = sigma_next**2 * (sigma**2 - sigma_next**2).clamp(min=0) / sigma**2
    sigma_up = torch.minimum(sigma_next, eta * variance.sqrt())
    return (sigma_next**2 - sigma_up**2).sqrt(), sigma_up


def towards(x: Tensor, x0: Tensor, h: Tensor) -> Tensor:
    """Where ``x`` comes in a time ``h`` if the estimate stays ``x0``: the exponential integrator's step of order 1
    (Lu et al. 2022, "DPM-Solver++", proposition 4.1)."""
    return (-h).exp() * x - (-h).expm1() * x0


def phi_2(h: Tensor) -> Tensor:
    """``1 - (1 - exp(-h)) / h``: what weighs the estimate's slope in an exponential integrator."""
    return (-h).expm1() / h + 1


def adams_weights(
    nodes: Sequence[float],
    start: float,
    end: float,
    density: Callable[[NDArray[Any]], NDArray[Any]] = np.ones_like,
) -> list[float]:
    """The integrals from ``start`` to ``end`` of each Lagrange polynomial over ``nodes``, times a density.

    They weigh the values at the nodes in an Adams method. By Gauss and Legendre's quadrature, exact for polynomials.
    """
    points, weights = _gauss_legendre()
    t = start + (end - start) * (points + 1) / 2
    weighted = weights * density(t) * (end - start) / 2

    def lagrange(node: float) -> NDArray[Any]:
        return prod(((t - other) / (node - other) for other in nodes if other != node), start=np.ones_like(t))

    return [float(weighted @ lagrange(node)) for node in nodes]


@cache
def _gauss_legendre() -> tuple[NDArray[Any], NDArray[Any]]:
    points, weights = np.polynomial.legendre.leggauss(32)
    return points, weights


def combine(weights: Sequence[float] | Tensor, values: Sequence[Tensor]) -> Tensor:
    """The weighted sum."""
    return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum(0)
