"""The denoiser that samplers call: a UNet under several conditionings, weighed, guided and masked as ComfyUI does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mahlstick.nodes import progress
from mahlstick.nodes.resample import repeat_to, resample
from mahlstick.nodes.sampling.conditions import Condition, resolve
from mahlstick.nodes.sampling.network import Network, clipped_on, column
from mahlstick.nodes.sampling.noise import prepare_noise
from mahlstick.nodes.values import Model, Sampler
from mahlstick.pipelines.preview import preview

#: One estimate of the estimates by the names of their conditionings, with x and sigma.
Combine = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Guider:
    """A model with conditionings by name (``positive``, ``negative``), and how the estimates under each make one.

    Those of the names in ``unused`` count for nothing and are not computed.
    """

    model: Model
    conditionings: Mapping[str, Sequence[Any]]
    combine: Combine
    unused: frozenset[str] = frozenset()


def classifier_free(cond: Tensor, uncond: Tensor, scale: float, x: Tensor, sigma: Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598): uncond + scale · (cond - uncond)."""
    return uncond + (cond - uncond) * scale


def guided(model: Model, positive: Sequence[Any], negative: Sequence[Any], cfg: float) -> Guider:
    """Guidance by the scale ``cfg``; at 1 the negative is not computed."""
    guide = model.guide or classifier_free
    return Guider(
        model,
        {"positive": positive, "negative": negative},
        lambda found, x, sigma: guide(found["positive"], found["negative"], cfg, x, sigma),
        frozenset({"negative"}) if math.isclose(cfg, 1.0) else frozenset(),
    )


@torch.no_grad()
def denoise(
    guider: Guider,
    noise: Tensor,
    latents: Tensor,
    sampler: Sampler,
    sigmas: Tensor,
    seed: int,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample from ``noise`` on ``latents`` ``(batch, channels, h, w)`` down ``sigmas``.

    ``mask`` ``(n, …, H, W)`` is 1 where something new is made; elsewhere the latents stay. ``seed`` is for the noise of
    the steps. Returns the latents and the last estimate of x0, both on the CPU. The UNet is afterwards what it was,
    also where the sampling is interrupted.
    """
    if not len(sigmas):
        return latents, latents
    model = guider.model
    given = latents.to(model.unet.device, torch.float32)
    # An empty latent stays empty, whatever the shift.
    start = model.scaled(given) if bool(given.any()) else given
    noise, sigmas = noise.to(start), sigmas.to(start)
    inpainting = None if mask is None else _inpainting(mask, start, noise, seed if sampler.new_noise else None)
    conditions = resolve(model, guider.conditionings, start, None if inpainting is None else inpainting.mask)
    with clipped_on(model, sigmas) as network:
        run = _Run(network, guider, conditions, inpainting)
        x = _noised(model, noise, start, sigmas[0])
        x = sampler.run(run, x, sigmas, seed=seed, in_run=True, **sampler.options)
    result = model.unscaled(x)
    if inpainting is not None and sigmas[-1] == 0:
        result = torch.where(inpainting.mask == 0, given, result)  # free of rounding
    return result.cpu(), model.unscaled(x if run.estimate is None else run.estimate).cpu()


def _noised(model: Model, noise: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
    """Latents under noise. At the highest sigma nothing of them counts, and noise has the variance that x has there."""
    highest = float(model.sigmas[-1])
    whole = math.isclose(float(sigma), highest, rel_tol=1e-5) or float(sigma) > highest
    return noise * (torch.sqrt(1.0 + sigma**2) if whole else sigma) + latents


@dataclass(frozen=True)
class _Inpainting:
    """Keeps the latents where ``mask`` is 0."""

    mask: Tensor
    latents: Tensor
    noise: Tensor

    def before(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x * self.mask + (self.latents + self.noise * column(sigma)) * (1 - self.mask)

    def after(self, estimate: Tensor) -> Tensor:
        return estimate * self.mask + self.latents * (1 - self.mask)


def _inpainting(mask: Tensor, latents: Tensor, noise: Tensor, seed: int | None) -> _Inpainting:
    """For a mask of any size; what it keeps is under the same noise, or with a ``seed`` under that of the next one."""
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).to(latents)
    mask = resample(mask, latents.shape[-1], latents.shape[-2], "bilinear")
    if seed is not None:
        noise = prepare_noise(latents, (seed + 1) % 2**64).to(latents)
    return _Inpainting(repeat_to(mask, len(latents)).expand_as(latents), latents, noise)


class _Run:
    """The denoiser of one sampling: ``(x, sigma) -> x0``. Keeps the last estimate and tells of the progress."""

    def __init__(
        self,
        network: Network,
        guider: Guider,
        conditions: Mapping[str, Sequence[Condition]],
        inpainting: _Inpainting | None,
    ) -> None:
        self.network, self.guider, self.inpainting = network, guider, inpainting
        self.conditions = conditions
        self.used = {name: () if name in guider.unused else each for name, each in conditions.items()}
        self.estimate: Tensor | None = None

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self._estimates(x, sigma, self.used)[0]

    def both(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """x0 with guidance, and under the negative alone."""
        estimate, found = self._estimates(x, sigma, self.conditions)
        return estimate, found["negative"]

    def _estimates(
        self, x: Tensor, sigma: Tensor, conditions: Mapping[str, Sequence[Condition]]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self.inpainting is not None:
            x = self.inpainting.before(x, sigma)
        found = self.network.estimates(x, sigma, conditions)
        estimate = self.guider.combine(found, x, sigma)
        if self.inpainting is not None:
            estimate = self.inpainting.after(estimate)
        self.estimate = estimate
        self._tell(estimate)
        return estimate, found

    def _tell(self, estimate: Tensor) -> None:
        model = self.network.model
        step, steps = self.network.clock.position(0)
        shows = model.autoencoder is not None and progress.heard()
        progress.report(step + 1, steps, preview(model.unscaled(estimate), model.autoencoder) if shows else None)
