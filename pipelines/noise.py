"""Noise from which a clip begins: independent, reused over a long clip (FreeNoise), or refined (FreeInit)."""

from __future__ import annotations

import torch
from torch import Tensor


def independent(frames: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise (frames, *shape), drawn frame by frame, so that a longer clip begins like a shorter one."""
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(frames)])


def free_noise(noise: Tensor, frames: int, stride: int, generator: torch.Generator) -> Tensor:
    """Noise for ``frames`` frames from that of one window (length, ...): each ``stride`` frames behind it are a shuffle
    of those ``length`` earlier, so that distant frames share what they show (FreeNoise, 2310.15169, section 3.2)."""
    length = noise.shape[0]
    order = list(range(min(length, frames)))
    for start in range(length, frames, stride):
        source = torch.tensor(order[start - length : start - length + stride])
        order += source[torch.randperm(len(source), generator=generator)].tolist()
    return noise[order[:frames]]


def free_init(clip: Tensor, first: Tensor, fresh: Tensor, signal: float) -> Tensor:
    """Better noise for another pass: low frequencies of the clip noised again, high ones fresh (FreeInit, 2312.07537,
    eq. 5 to 7).

    ``clip``: the latents of the last pass (frames, channels, h, w). ``first``: the noise of the first pass. ``signal``:
    ᾱ of the noisiest timestep.
    """
    noised = signal**0.5 * clip + (1 - signal) ** 0.5 * first
    keep = _butterworth((clip.shape[0], *clip.shape[-2:]))[:, None].to(clip.device)
    axes = (0, 2, 3)
    low, high = (torch.fft.fftn(x.float(), dim=axes) for x in (noised, fresh))
    return torch.fft.ifftn(low * keep + high * (1 - keep), dim=axes).real.to(clip.dtype)


def _butterworth(shape: tuple[int, int, int], stop: float = 0.25, order: int = 4) -> Tensor:
    """1 / (1 + (d / stop)^(2 · order)) over the frequencies of an FFT, with d² the sum of the squares of the three
    frequencies in fractions of the highest."""
    axes = [2 * torch.fft.fftfreq(size) for size in shape]
    squared = sum(axis.square() for axis in torch.meshgrid(*axes, indexing="ij"))
    return 1 / (1 + (torch.as_tensor(squared) / stop**2) ** order)
