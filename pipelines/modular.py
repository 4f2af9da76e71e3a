"""mahlstick as a block of diffusers' modular pipelines: the denoise step of SDXL, with units clipped on.

>>> blocks = with_units(StableDiffusionXLAutoBlocks())  # doctest: +SKIP
>>> pipe = blocks.init_pipeline(base)  # doctest: +SKIP
>>> pipe(prompt="a red fox", units=[...], output="images")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.modular_pipelines import ModularPipeline, PipelineState, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLAutoDenoiseStep,
)

from mahlstick.adapters.base import Clock, Timestep
from mahlstick.pipelines.attach import clip


class UnitsDenoiseStep(SequentialPipelineBlocks):
    """diffusers' denoise step for every task of SDXL; the input ``units`` is clipped on while it runs."""

    model_name = "stable-diffusion-xl"
    block_classes: ClassVar[list[type]] = [StableDiffusionXLAutoDenoiseStep]
    block_names: ClassVar[list[str]] = ["denoise"]

    @property
    def description(self) -> str:
        return "Denoises the latents with mahlstick's units attached to the UNet."

    @property
    def inputs(self) -> list[InputParam]:
        return [*super().inputs, InputParam("units", description="What to attach: Control, ImagePrompt.")]

    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        clock = GuiderClock(components, len(state.get("timesteps")))
        with clip(components.unet, state.get("units") or (), clock, components):
            return super().__call__(components, state)


class GuiderClock(Clock):
    """Reads from a modular pipeline's guider, which calls the UNet once for each part of the batch."""

    def __init__(self, components: Any, steps: int) -> None:
        super().__init__()
        self.components, self.steps = components, steps

    @property
    def train_timesteps(self) -> int:  # type: ignore[override]
        return int(self.components.scheduler.config.get("num_train_timesteps", 1000))

    @property
    def parts(self) -> tuple[str, ...]:
        return ("cond",) if self.components.guider.is_conditional else ("uncond",)

    def position(self, timestep: Timestep) -> tuple[int, int]:
        return self.components.guider.get_state()["step"], self.steps


def with_units(blocks: StableDiffusionXLAutoBlocks) -> StableDiffusionXLAutoBlocks:
    """Put :class:`UnitsDenoiseStep` in the place of the denoise step, so that the pipeline takes ``units``."""
    blocks.sub_blocks["denoise"].sub_blocks["denoise"] = UnitsDenoiseStep()
    return blocks
