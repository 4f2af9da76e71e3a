"""mahlstick as a custom pipeline of diffusers: ``pipe(prompt, units=[...])``.

>>> pipe = DiffusionPipeline.from_pretrained(
...     base, custom_pipeline=custom.STABLE_DIFFUSION, trust_remote_code=True
... )  # doctest: +SKIP

For any other task, put :class:`UnitsMixin` before diffusers' class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mahlstick.pipelines.attach import attach
from mahlstick.pipelines.units import Unit

STABLE_DIFFUSION = str(Path(__file__).with_name("stable_diffusion.py"))
STABLE_DIFFUSION_XL = str(Path(__file__).with_name("stable_diffusion_xl.py"))


class UnitsMixin:
    """Gives a diffusers pipeline the argument ``units``: clipped on for the one call."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if UnitsMixin in cls.__bases__ and "__call__" not in vars(cls):
            cls.__call__ = _signed(super().__call__)  # type: ignore[misc, method-assign]

    def __call__(self, *args: Any, units: Sequence[Unit] = (), **kwargs: Any) -> Any:
        """As diffusers' pipeline, with ``units`` attached. Raises ``MahlstickError`` where a unit does not fit."""
        with attach(self, *units):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


def _signed(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Our call under the pipeline's own signature, in which others look up names and defaults."""
    signature = inspect.signature(plain)
    units = inspect.signature(UnitsMixin.__call__).parameters["units"]

    @functools.wraps(plain)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return UnitsMixin.__call__(self, *args, **kwargs)

    parameters = sorted([*signature.parameters.values(), units], key=lambda parameter: parameter.kind)
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call
