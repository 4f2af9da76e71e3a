"""The nodes that come with mahlstick, by topic."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from mahlstick.nodes.schema import NodeType, catalogue

_TOPICS = (
    "loaders",
    "conditioning",
    "tuning",
    "sampling",
    "samplers",
    "control",
    "image_prompts",
    "latents",
    "images",
    "masks",
    "annotate",
    "primitives",
    "motion",
    "video",
    "suite",
)


@cache
def all_nodes() -> dict[str, NodeType]:
    """Every node that comes with mahlstick, by its class name."""
    return catalogue(*(import_module(f"mahlstick.nodes.builtin.{topic}") for topic in _TOPICS))
