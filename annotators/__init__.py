"""Annotators: a picture becomes a control picture of the same size.

    from mahlstick import annotators

    edges = annotators.annotate("canny", "photo.jpg", low=50, high=150)

Those that need no weights work everywhere; the learned ones load theirs on first use, from a local folder
or the hub.
"""

from __future__ import annotations

from mahlstick.annotators.options import Option, Range
from mahlstick.annotators.regions import inpaint_condition
from mahlstick.annotators.registry import ALIASES, Annotator, annotate, get, names

__all__ = ["ALIASES", "Annotator", "Option", "Range", "annotate", "get", "inpaint_condition", "names"]
