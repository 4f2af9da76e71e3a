"""What diffusers loads for ``custom_pipeline``: one pipeline class and nothing else."""

from __future__ import annotations

from diffusers import StableDiffusionXLPipeline

from mahlstick.pipelines.custom import UnitsMixin


class StableDiffusionXLUnitsPipeline(UnitsMixin, StableDiffusionXLPipeline):
    """diffusers' StableDiffusionXLPipeline, called with ``units=[...]``."""
