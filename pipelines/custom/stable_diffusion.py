"""What diffusers loads for ``custom_pipeline``: one pipeline class and nothing else."""

from __future__ import annotations

from diffusers import StableDiffusionPipeline

from mahlstick.pipelines.custom import UnitsMixin


class StableDiffusionUnitsPipeline(UnitsMixin, StableDiffusionPipeline):
    """diffusers' StableDiffusionPipeline, called with ``units=[...]``."""
