"""mahlstick as a custom pipeline of diffusers: ``pipe(prompt, units=[...])``.

>>> pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=custom.STABLE_DIFFUSION)  # doctest: +SKIP

For any other task, put :class:`UnitsMixin` before diffusers' class.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mahlstick.pipelines.attach import attach
from mahlstick.pipelines.units import Unit

STABLE_DIFFUSION = str(Path(__file__).with_name("stable_diffusion.py"))
STABLE_DIFFUSION_XL = str(Path(__file__).with_name("stable_diffusion_xl.py"))


class UnitsMixin:
    """Gives a diffusers pipeline the argument ``units``: clipped on for the one call."""

    def __call__(self, *args: Any, units: Sequence[Unit] = (), **kwargs: Any) -> Any:
        """As diffusers' pipeline, with ``units`` attached. Raises ``MahlstickError`` where a unit does not fit."""
        with attach(self, *units):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
