"""Optimisers behind one name, the rate as a function of the step, and the moving average of the weights."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mahlstick.errors import MahlstickError
from mahlstick.training.config import TrainConfig
from mahlstick.training.muon import Muon

BETAS = (0.9, 0.999)


def build(config: TrainConfig, module: nn.Module) -> Any:
    """The optimiser that the config names, of what learns in a module. Raises ``MahlstickError`` where its package is
    missing."""
    if config.optimiser == "muon":
        return Muon(module, config.peak_rate, BETAS, config.weight_decay)
    known = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in known if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in known if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimiser == "adamw8bit":
        return _package("bitsandbytes", "bitsandbytes").optim.AdamW8bit(groups, lr=config.peak_rate, betas=BETAS)
    if config.optimiser == "schedule-free":
        free = _package("schedulefree", "schedulefree").AdamWScheduleFree
        return free(groups, lr=config.peak_rate, betas=BETAS, warmup_steps=config.warmup)
    return torch.optim.AdamW(groups, lr=config.peak_rate, betas=BETAS, fused=True)


def _package(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MahlstickError(f"optimiser: needs {package}; install it, or take adamw") from error


def rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step: a linear rise, then constant, linear or a half cosine to zero."""
    if config.optimiser == "schedule-free":
        return config.peak_rate  # it warms up by itself, and needs no end
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    done = max(0, step - config.warmup) / max(1, config.steps - config.warmup)
    fall = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.schedule]
    return config.peak_rate * rise * fall


@contextmanager
def applied(free: Any, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The weights are those that a schedule-free optimiser has found inside, and to the bit what they were after: its
    own way there and back rounds."""
    kept = [p.detach().clone() for p in parameters]
    free.eval()
    try:
        yield
    finally:
        free.train()
        put(parameters, kept)


class Average:
    """The exponential moving average of weights; short at first, so that the start is soon forgotten."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = [p for p in parameters if p.requires_grad]
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The weights are the average inside, and what they were after."""
        kept = [p.detach().clone() for p in self.parameters]
        put(self.parameters, self.values)
        try:
            yield
        finally:
            put(self.parameters, kept)

    def state_dict(self) -> dict[str, Any]:
        return {str(i): value for i, value in enumerate(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, value in enumerate(self.values):
            value.copy_(state[str(i)])


@torch.no_grad()
def put(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Each parameter takes its value."""
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)
