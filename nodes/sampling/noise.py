"""The noise that sampling begins with and adds: ComfyUI's numbers for a seed, without touching torch's random state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Noise of unit variance for the step from one sigma to the next.
NoiseSampler = Callable[[Tensor, Tensor], Tensor]


def prepare_noise(samples: Tensor, seed: int, batch_index: Sequence[int] | None = None) -> Tensor:
    """The noise that sampling begins with, of the shape and type of ``samples`` and on the CPU, as ComfyUI draws it.

    With ``batch_index`` each item gets the noise that it would have at this place of a longer batch; the same index
    twice gives the same noise.
    """
    generator = torch.Generator().manual_seed(seed)
    if batch_index is None:
        return torch.randn(samples.shape, generator=generator).to(samples.dtype)
    drawn = [torch.randn((1, *samples.shape[1:]), generator=generator) for _ in range(max(batch_index) + 1)]
    return torch.cat([drawn[index] for index in batch_index]).to(samples.dtype)


@dataclass(frozen=True)
class RandomNoise:
    """A NOISE: what a seed gives."""

    seed: int

    def draw(self, latent: dict[str, Any]) -> Tensor:
        """The noise for a LATENT."""
        return prepare_noise(latent["samples"], self.seed, latent.get("batch_index"))


@dataclass(frozen=True)
class EmptyNoise:
    """A NOISE that is none: sampling goes on from the latent as it is."""

    seed: int = 0

    def draw(self, latent: dict[str, Any]) -> Tensor:
        """Zeros for a LATENT."""
        return torch.zeros(latent["samples"].shape, dtype=latent["samples"].dtype)


def independent(x: Tensor, generator: torch.Generator) -> NoiseSampler:
    """New normal noise of the shape of ``x`` for every step, drawn where the generator is."""

    def noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, device=generator.device, generator=generator).to(x.device)

    return noise


def brownian(x: Tensor, sigmas: Tensor, entropy: int, device: torch.device | str = "cpu") -> NoiseSampler:
    """Increments of one Brownian path over ``sigmas``, so that noise depends on the interval and not on the steps.

    Where steps are halved the two parts add up to the same noise. The path is torchsde's virtual Brownian tree (Li et
    al. 2020, "Scalable Gradients for Stochastic Differential Equations"), built on ``device``.
    """
    from torchsde import BrownianTree

    low, high = sigmas[sigmas > 0].min().to(device), sigmas.max().to(device)
    tree = BrownianTree(low, torch.zeros_like(x, device=device), high, entropy=entropy)

    def noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        start, end = torch.minimum(sigma, sigma_next).to(device), torch.maximum(sigma, sigma_next).to(device)
        with warnings.catch_warnings():
            # The tree has rounded its ends, and complains of the last digit.
            warnings.filterwarnings("ignore", "Should have t", UserWarning)
            increment = tree(start.float(), end.float()).to(x)
        return torch.sign(sigma_next - sigma) * increment / (sigma_next - sigma).abs().sqrt()

    return noise
