"""What a diffusion model learns from: noise, targets and weights, and random numbers that depend on the step alone."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from mahlstick.errors import MahlstickError
from mahlstick.training.config import Prediction


def generator(*key: int | str) -> torch.Generator:
    """Random numbers that follow from ``key`` (seed, step, row, purpose) and from nothing else.

    So nothing of a random state has to be saved for a run to go on with the same bits, and two processes draw for
    their rows what one process would have drawn.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


def strata(seed: int, step: int, batch: int) -> Tensor:
    """Times u (batch,) in [0, 1), each uniform, together evenly spread: u_i = (u₀ + i/B) mod 1 (2107.00630, I.1)."""
    first = torch.rand((), generator=generator(seed, step, "u"))
    return (first + torch.arange(batch) / batch) % 1.0


class Objective:
    """The noise schedule of a base with the target that its UNet predicts.

    ``epsilon``: ε. ``v_prediction``: v = √ᾱ ε − √(1−ᾱ) z (2202.00512). ``flow_prediction``: ε − z with
    z_σ = (1−σ) z + σ ε (2210.02747).
    """

    def __init__(self, scheduler: Any, prediction: Prediction | None = None, min_snr: float | None = None) -> None:
        self.prediction = prediction or prediction_of(scheduler)
        self.min_snr = min_snr
        self.length = int(scheduler.config.num_train_timesteps)
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if self.prediction != "flow_prediction" and alphas is None:
            raise MahlstickError(
                f"prediction: {type(scheduler).__name__} has no noise schedule for {self.prediction}; "
                "give prediction = 'flow_prediction', or a base with another scheduler"
            )
        if self.prediction == "flow_prediction" and min_snr is not None:
            raise MahlstickError("min_snr: is for epsilon and v_prediction; leave it out with flow_prediction")
        self.alphas: Tensor | None = alphas

    def noised(self, z: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents z (B, 4, h, w), noise ε and times u (B,) → z_t, timesteps (B,), target, and weights (B,)."""
        t = (u * self.length).floor().clamp(max=self.length - 1).to(z.device)
        if self.prediction == "flow_prediction":
            sigma = ((t + 1) / self.length).view(-1, 1, 1, 1)
            return (1 - sigma) * z + sigma * noise, t + 1, noise - z, torch.ones_like(t)
        assert self.alphas is not None
        a = self.alphas.to(z)[t.long()]
        root, rest = a.sqrt().view(-1, 1, 1, 1), (1 - a).sqrt().view(-1, 1, 1, 1)
        target = noise if self.prediction == "epsilon" else root * noise - rest * z
        return root * z + rest * noise, t.long(), target, self._weight(a)

    def _weight(self, a: Tensor) -> Tensor:
        """min(SNR, γ), over SNR for ε and over SNR + 1 for v (2303.09556, section 3.4); SNR = ᾱ/(1−ᾱ)."""
        if self.min_snr is None:
            return torch.ones_like(a)
        snr = a / (1 - a)
        if self.prediction == "epsilon":
            return (self.min_snr / snr).clamp(max=1)  # also where the terminal SNR is zero
        return snr.clamp(max=self.min_snr) / (snr + 1)


def prediction_of(scheduler: Any) -> Prediction:
    """What a UNet with this scheduler predicts."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "flow_prediction"
    found = scheduler.config.get("prediction_type", "epsilon")
    if found not in ("epsilon", "v_prediction", "flow_prediction"):
        raise MahlstickError(f"the base predicts {found!r}; training knows epsilon, v_prediction and flow_prediction")
    return found
