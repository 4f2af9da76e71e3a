"""The one list of annotators."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from PIL import Image

from mahlstick import pictures
from mahlstick.annotators import colours, edges, geometry, regions
from mahlstick.annotators.options import Option, read_options
from mahlstick.errors import MahlstickError

if TYPE_CHECKING:
    from mahlstick.pictures import PictureSource


@dataclass(frozen=True)
class Annotator:
    """A function from an RGB picture to an RGB picture of the same size, and what to know about it.

    ``weights`` is (what, licence) for a learned one, whose option ``model`` says where from.
    ``alpha``: it is handed a varying alpha channel, and the picture is then RGBA.
    """

    name: str
    function: Callable[..., Image.Image]
    weights: tuple[str, str] | None = None
    alpha: bool = False

    @property
    def description(self) -> str:
        """One line."""
        return (self.function.__doc__ or "").partition("\n")[0]

    @property
    def needs(self) -> str:
        """``nothing``, or ``weights: what, where from, licence``."""
        if self.weights is None:
            return "nothing"
        what, licence = self.weights
        return f"weights: {what}, {self.options['model'].default}, {licence}"

    @cached_property
    def options(self) -> dict[str, Option]:
        """What it can be told, by name."""
        return read_options(self.function)

    def __call__(self, picture: PictureSource, **options: Any) -> Image.Image:
        """The control picture. Raises MahlstickError for a bad picture, an unknown option or a bad value."""
        unknown = [name for name in options if name not in self.options]
        if unknown:
            known = ", ".join(self.options) or "no options"
            raise MahlstickError(f"annotator {self.name!r} has no option {unknown[0]!r}; it takes {known}")
        try:
            values = {name: self.options[name].read(value) for name, value in options.items()}
            return self.function(pictures.load_picture(picture, alpha=self.alpha), **values)
        except MahlstickError as error:
            raise MahlstickError(f"annotator {self.name!r}: {error}") from error


_ANNOTATORS = {
    annotator.name: annotator
    for annotator in (
        Annotator("canny", edges.canny),
        Annotator("softedge", edges.softedge, ("HED network, 29 MB", "see its model card")),
        Annotator("lineart", edges.lineart),
        Annotator("lineart_realistic", edges.lineart_realistic, ("two line networks, 34 MB", "see its model card")),
        Annotator("scribble", edges.scribble),
        Annotator("mlsd", edges.mlsd, ("M-LSD network, 6 MB", "see its model card")),
        Annotator("depth", geometry.depth, ("depth model, 100 MB", "Apache-2.0")),
        Annotator("normal", geometry.normal, ("depth model, 100 MB", "Apache-2.0")),
        Annotator("pose", geometry.pose, ("person detector and whole-body pose network", "Apache-2.0")),
        Annotator("segmentation", regions.segmentation, ("segmentation model, 330 MB", "MIT")),
        Annotator("tile", colours.tile),
        Annotator("shuffle", colours.shuffle),
        Annotator("color", colours.color),
        Annotator("grey", colours.grey),
        Annotator("mask", regions.mask, alpha=True),
        Annotator("inpaint", regions.inpaint, alpha=True),
    )
}

#: Names from sd-webui-controlnet and controlnet-aux.
ALIASES = {
    "hed": "softedge",
    "softedge_hed": "softedge",
    "lineart_standard": "lineart",
    "depth_anything_v2": "depth",
    "openpose": "pose",
    "dwpose": "pose",
    "seg": "segmentation",
    "tile_resample": "tile",
    "colour": "color",
    "gray": "grey",
}


def names() -> list[str]:
    """The names of all annotators, without aliases."""
    return list(_ANNOTATORS)


def get(name: str) -> Annotator:
    """The annotator of that name or alias. Raises MahlstickError with the nearest names."""
    found = _ANNOTATORS.get(ALIASES.get(name, name))
    if found is None:
        near = difflib.get_close_matches(name, [*_ANNOTATORS, *ALIASES], cutoff=0.5) or names()
        raise MahlstickError(f"annotator {name!r} is unknown; did you mean {' or '.join(near)}?")
    return found


def annotate(name: str, picture: PictureSource, /, **options: Any) -> Image.Image:
    """The control picture that annotator ``name`` makes of ``picture``: RGB, of the same size."""
    return get(name)(picture, **options)
