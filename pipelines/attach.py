"""Clip units on any diffusers pipeline that has a ``UNet2DConditionModel``, or on the bare UNet."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from inspect import signature
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from mahlstick.adapters.base import Attachment, Clock, Timestep, unwrap
from mahlstick.errors import MahlstickError
from mahlstick.pipelines.units import Unit


class Attached:
    """Units clipped on a pipeline. A context manager; ``detach`` may be called again and in any order."""

    def __init__(self, attachments: list[Attachment]) -> None:
        self.attachments = attachments

    def detach(self) -> None:
        """Take every unit off: the UNet is bit for bit what it was."""
        for attachment in reversed(self.attachments):
            attachment.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()


def attach(target: DiffusionPipeline | UNet2DConditionModel, *units: Unit, guidance: bool | None = None) -> Attached:
    """Clip ``units`` on ``target``: they act from now until ``detach``, or to the end of the ``with`` block.

    ``target`` is a pipeline or a bare UNet. ``guidance`` tells of a UNet, and of the older pipelines that do not tell
    themselves, whether its batches hold the unconditional half before the conditional one. A UNet that several
    pipelines share carries the units in all of them, but steps and guidance are counted by the pipeline given here.
    Raises ``MahlstickError`` before anything has changed.
    """
    unet = _unet_of(target)
    pipe = target if isinstance(target, DiffusionPipeline) else None
    clock = PipelineClock(pipe, guidance) if pipe is not None else Clock(("uncond", "cond") if guidance else None)
    return clip(unet, units, clock, pipe)


def clip(unet: UNet2DConditionModel, units: Sequence[Unit], clock: Clock, pipe: Any = None) -> Attached:
    """As :func:`attach`, for a run that ``clock`` tells of; ``pipe`` is asked for an image encoder."""
    for unit in units:
        if not isinstance(unit, Unit):
            raise MahlstickError(f"attach takes units (Control, ImagePrompt, Motion, …); got {type(unit).__name__}.")
    attachments = [unit.prepare(unet, clock, pipe) for unit in units]
    attached = Attached(attachments)
    try:
        for attachment in attachments:
            attachment.fasten()
    except BaseException:
        attached.detach()
        raise
    return attached


def _unet_of(target: Any) -> UNet2DConditionModel:
    unet = getattr(target, "unet", target)
    if not isinstance(unwrap(unet), UNet2DConditionModel):
        found = type(unet).__name__ if unet is not target else "no UNet"
        raise MahlstickError(
            f"units clip onto pipelines with a UNet2DConditionModel; {type(target).__name__} has {found}."
        )
    return unet


def tells_guidance(pipeline: type[DiffusionPipeline]) -> bool:
    """Whether pipelines of this class let others know that a call is guided."""
    return hasattr(pipeline, "do_classifier_free_guidance")


class PipelineClock(Clock):
    """Reads from a pipeline and its scheduler where a UNet call stands."""

    def __init__(self, pipe: DiffusionPipeline, guidance: bool | None = None) -> None:
        super().__init__()
        self.pipe, self.guidance = pipe, guidance
        if guidance is None and not tells_guidance(type(pipe)):
            warnings.warn(
                f"{type(pipe).__name__} does not tell whether it is run with guidance: give attach guidance=True or "
                "guidance=False",
                stacklevel=4,
            )
        self._timesteps: torch.Tensor | None = None
        self._first = 0

    @property
    def train_timesteps(self) -> int:  # type: ignore[override]
        return int(self.pipe.scheduler.config.get("num_train_timesteps", 1000))

    @property
    def parts(self) -> tuple[str, ...] | None:
        """The parts of the batch, in the order in which diffusers' pipelines stack them."""
        pipe = self.pipe
        guided = getattr(pipe, "do_classifier_free_guidance", self.guidance)  # some know it only once they are called
        if guided is None:
            return None
        if guided and "image_guidance_scale" in signature(type(pipe).__call__).parameters:
            return ("cond", "uncond", "uncond")  # InstructPix2Pix: words and picture, picture alone, neither
        parts = ("uncond", "cond") if guided else ("cond",)
        return (*parts, "cond") if getattr(pipe, "do_perturbed_attention_guidance", False) else parts

    def position(self, timestep: Timestep) -> tuple[int, int]:
        """Step and number of steps, counted as diffusers' ControlNet pipelines count them."""
        timesteps = self.pipe.scheduler.timesteps
        index = self._index(timestep)
        # set_timesteps makes a new tensor for every run; a run may start behind its beginning (image to image).
        if timesteps is not self._timesteps:
            self._timesteps, self._first = timesteps, index
        steps = getattr(self.pipe, "_num_timesteps", None) or len(timesteps) - self._first
        return index - self._first, steps

    def _index(self, timestep: Timestep) -> int:
        """Position in ``scheduler.timesteps``, where a timestep may stand twice (second-order samplers)."""
        scheduler = self.pipe.scheduler
        for name in ("step_index", "begin_index", "counter"):
            index = getattr(scheduler, name, None)
            if index is not None:
                return int(index)
        t = torch.as_tensor(timestep).flatten()[0].to(scheduler.timesteps)
        found = (scheduler.timesteps == t).nonzero()
        if not len(found):
            raise MahlstickError(
                f"the scheduler knows no timestep {float(t):g}: use start=0 and end=1 with this pipeline."
            )
        return int(found[0])
