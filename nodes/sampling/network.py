"""A UNet as samplers see it: estimates of x0 under conditionings, as many in one call as fit together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mahlstick.adapters.base import Clock, Timestep, Window
from mahlstick.adapters.controlnet import ControlAttachment
from mahlstick.nodes.resample import repeat_to, resample
from mahlstick.nodes.sampling.conditions import Condition
from mahlstick.nodes.sampling.schedules import percent_to_sigma, timestep_at
from mahlstick.nodes.values import ControlHint, Model
from mahlstick.pipelines.attach import clip
from mahlstick.pipelines.units import as_mask

_NEGLIGIBLE = 1e-37  # a weight for places that no conditioning covers, so that these get an estimate of 0
_REPEATS = 4  # more of them, and a short text is better run by itself
_LCM_SCALE, _LCM_DEVIATION = 10.0, 0.5  # of the time, and of the data, in the weights of consistency models


class SamplingClock(Clock):
    """Where a sampling stands: ``sigma`` of the present call among those of the run and of the training."""

    def __init__(self, model: Model, sigmas: Tensor) -> None:
        super().__init__()
        self.model, self.sigmas, self.sigma = model, sigmas.cpu(), float(sigmas[0])
        self.train_timesteps = len(model.sigmas)
        self._logs = model.table.cpu().double().log().numpy()

    def tell(self, sigma: float, parts: tuple[str, ...]) -> None:
        """The next call of the UNet is at ``sigma``, and these are the parts of its batch."""
        self.sigma, self._parts = sigma, parts

    def position(self, timestep: Timestep) -> tuple[int, int]:
        """The step whose sigma is nearest, and the number of steps."""
        steps = max(1, len(self.sigmas) - 1)
        return min(int((self.sigmas - self.sigma).abs().argmin()), steps - 1), steps

    def done(self, timestep: Timestep) -> float:
        """As in the base class, with sigma's place between two timesteps, found in its logarithm.

        Beside a percent of three digits it lies where ComfyUI's comparison of sigmas puts it, rounding and all.
        """
        steps = np.arange(self.model.stride - 1, self.train_timesteps, self.model.stride)
        step = np.interp(math.log(max(self.sigma, 1e-10)), self._logs, steps)
        done = 1.0 - float(step) / (self.train_timesteps - 1)
        near = round(done, 3)
        there = percent_to_sigma(self.model.table, near, self.model.stride)
        if there == self.sigma:
            return near
        return max(done, math.nextafter(near, 2)) if there > self.sigma else min(done, math.nextafter(near, -1))


@contextmanager
def clipped_on(model: Model, sigmas: Tensor) -> Iterator[Network]:
    """The model's patches and units on its UNet."""
    clock = SamplingClock(model, sigmas)
    with ExitStack() as stack:
        for patch in model.patches:
            stack.enter_context(patch(model.unet))
        stack.enter_context(clip(model.unet, model.units, clock))
        controls = _Controls(model.unet, clock)
        stack.callback(controls.detach)
        yield Network(model, clock, controls)


class _Controls:
    """The ControlNets of conditionings: on the UNet for the whole run, where those of one group at a time act."""

    def __init__(self, unet: Any, clock: Clock) -> None:
        self.unet, self.clock = unet, clock
        self._made: dict[tuple[Any, ...], list[_Hinted]] = {}

    def show(self, hints: Sequence[ControlHint], height: int, width: int, batch: int) -> None:
        """Let these act, and no others, on latents of this size."""
        shown = (_identity(hints), height, width, batch)
        if shown not in self._made:
            self._made[shown] = [_hinted(hint, self.unet, self.clock, height, width, batch) for hint in hints]
            for attachment in self._made[shown]:
                attachment.fasten()
        for group, attachments in self._made.items():
            for attachment in attachments:
                attachment.shown = group == shown

    def detach(self) -> None:
        for attachments in self._made.values():
            for attachment in attachments:
                attachment.detach()


class _Hinted(ControlAttachment):
    """A ControlNet that acts in those calls that it is shown in."""

    shown = False

    @property
    def acts(self) -> bool:
        return self.shown and super().acts


def _identity(hints: Sequence[ControlHint]) -> tuple[Any, ...]:
    """Equal for hints that do the same, also where they were made one by one."""
    return tuple(
        (id(hint.net), id(hint.image), id(hint.mask), hint.strength, hint.start, hint.end, hint.mode) for hint in hints
    )


def _hinted(hint: ControlHint, unet: Any, clock: Clock, height: int, width: int, batch: int) -> _Hinted:
    factor = hint.net.hint_factor
    picture = resample(hint.image.movedim(-1, 1), width * factor, height * factor, "nearest-exact", "center")
    picture = picture if len(picture) == 1 else repeat_to(picture, batch)
    window = Window(hint.start, hint.end, "noise")
    return _Hinted(hint.net, unet, picture, hint.strength, as_mask(hint.mask), hint.mode, window, clock)


class Network:
    """The UNet as ComfyUI sees a model: x0 under conditionings, as many in one call as fit together."""

    def __init__(self, model: Model, clock: SamplingClock, controls: _Controls) -> None:
        self.model, self.clock, self.controls = model, clock, controls
        self.table = model.table.to(model.unet.device)

    def estimates(self, x: Tensor, sigma: Tensor, conditions: Mapping[str, Sequence[Condition]]) -> dict[str, Tensor]:
        """By name the weighted mean of the estimates under its conditions; 0 where none acts."""
        sums = {name: torch.zeros_like(x) for name in conditions}
        weights = {name: torch.full_like(x, _NEGLIGIBLE) for name in conditions}
        level = float(sigma[0])
        # The negative comes first in a batch.
        rows = [(name, condition) for name in reversed(list(conditions)) for condition in conditions[name]]
        acting = [(name, condition) for name, condition in rows if condition.begins >= level >= condition.ends]
        for group in _grouped(acting, x):
            names, members = zip(*group, strict=True)
            self.clock.tell(level, tuple("uncond" if name == "negative" else "cond" for name in names))
            for name, condition, estimate in zip(names, members, self._call(x, sigma, members), strict=True):
                condition.of(sums[name]).add_(estimate * condition.weight)
                condition.of(weights[name]).add_(condition.weight)
        return {name: sums[name] / weights[name] for name in conditions}

    def _call(self, x: Tensor, sigma: Tensor, conditions: Sequence[Condition]) -> Sequence[Tensor]:
        """The estimates under each of the conditions, from one call of the UNet."""
        count, batch, dtype = len(conditions), len(x), self.model.unet.dtype
        part = torch.cat([condition.of(x) for condition in conditions])
        sigma = sigma.repeat(count)
        timestep = timestep_at(self.table, sigma, self.model.stride)
        self.controls.show(conditions[0].hints, part.shape[-2], part.shape[-1], batch)
        sample = part / torch.sqrt(column(sigma) ** 2 + 1)
        beside = [condition.of(condition.concat) for condition in conditions if condition.concat is not None]
        added = {
            name: torch.cat([repeat_to(condition.added[name], batch) for condition in conditions])
            for name in conditions[0].added
        }
        output = self.model.unet(
            (torch.cat([sample, torch.cat(beside)], dim=1) if beside else sample).to(dtype),
            timestep,
            encoder_hidden_states=_texts(conditions, batch).to(dtype),
            added_cond_kwargs=added or None,
        ).sample
        return _x0(self.model.prediction, part, output.float(), column(sigma), column(timestep)).chunk(count)


def _x0(prediction: str, x: Tensor, output: Tensor, sigma: Tensor, timestep: Tensor) -> Tensor:
    """The estimate of x0 in the UNet's output (Karras et al., arXiv 2206.00364, table 1).

    ``lcm``: mixed with x so that it is x where there is no noise (Luo et al., arXiv 2310.04378).
    """
    if prediction == "epsilon":
        return x - output * sigma
    if prediction == "lcm":
        scaled = timestep * (_LCM_SCALE / _LCM_DEVIATION)
        c_skip, c_out = 1 / (scaled**2 + 1), scaled / torch.sqrt(scaled**2 + 1)
        return c_skip * x + c_out * (x - output * sigma)
    if prediction == "v_prediction":
        return x / (sigma**2 + 1) - output * sigma / torch.sqrt(sigma**2 + 1)
    return output


def _texts(conditions: Sequence[Condition], batch: int) -> Tensor:
    """All texts, each for its rows. Shorter ones are repeated: that changes no attention."""
    length = math.lcm(*(condition.text.shape[1] for condition in conditions))
    texts = [repeat_to(condition.text, batch) for condition in conditions]
    return torch.cat([text.repeat(1, length // text.shape[1], 1) for text in texts])


def _grouped(acting: list[tuple[str, Condition]], x: Tensor) -> Iterator[list[tuple[str, Condition]]]:
    """Those that can share a call of the UNet."""
    while acting:
        first = acting[0][1]
        together = [_fits(first, condition, x) for _, condition in acting]
        yield [each for each, fitting in zip(acting, together, strict=True) if fitting]
        acting = [each for each, fitting in zip(acting, together, strict=True) if not fitting]


def _fits(one: Condition, other: Condition, x: Tensor) -> bool:
    """Whether two conditions may be rows of one batch: the same size, ControlNets and kind of text."""
    lengths = one.text.shape[1], other.text.shape[1]
    return (
        one.of(x).shape == other.of(x).shape
        and _identity(one.hints) == _identity(other.hints)
        and one.text.shape[2] == other.text.shape[2]
        and math.lcm(*lengths) // min(lengths) <= _REPEATS
    )


def column(sigma: Tensor) -> Tensor:
    """``(batch,)`` against ``(batch, channels, h, w)``."""
    return sigma.view(-1, 1, 1, 1)
