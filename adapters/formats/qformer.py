"""Q-Former files: transformers' names (BLIP-2's and InstructBLIP's) to ours and back, and the config from shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mahlstick.adapters.qformer import ImageText
from mahlstick.errors import MahlstickError

_HEAD_WIDTH = 64  # of the published ones, which are BERT's; the file cannot tell

_LAYER = re.compile(r"qformer\.encoder\.layer\.(\d+)\.(.+)")
_BLOCK = re.compile(r"qformer\.blocks\.(\d+)\.(.+)")
_LOOK = re.compile(r"qformer\.blocks\.(\d+)\.look\.norm\.weight")
_MODULES = {
    **{
        f"{theirs}.{module}": f"{ours}.{part}"
        for theirs, ours in (("attention", "attention"), ("crossattention", "look"))
        for module, part in (
            ("attention.query", "to_q"),
            ("attention.key", "to_k"),
            ("attention.value", "to_v"),
            ("output.dense", "to_out"),
            ("output.LayerNorm", "norm"),
        )
    },
    **{
        f"{module}{theirs}{leaf}": f"{ours}.{part}"
        for theirs, ours in (("", "of_words"), ("_query", "of_queries"))
        for module, leaf, part in (
            ("intermediate", ".dense", "proj_in"),
            ("output", ".dense", "proj_out"),
            ("output", ".LayerNorm", "norm"),
        )
    },
}
_OUTSIDE = {
    "qformer.layernorm": "qformer.norm",
    "embeddings.word_embeddings": "qformer.words",
    "embeddings.position_embeddings": "qformer.places",
    "vision_projection": "image_proj",
    "text_projection": "text_proj",
    "itm_head": "match_head",
    # Those of transformers' BERT with such a head: its BLIP-2 has none for captions.
    "cls.predictions.transform.dense": "caption_head.proj",
    "cls.predictions.transform.LayerNorm": "caption_head.norm",
    "cls.predictions": "caption_head",
}
_INSTRUCT = {f"qformer.embeddings.{name}": f"qformer.{ours}" for name, ours in (
    ("word_embeddings", "words"), ("position_embeddings", "places"), ("layernorm", "norm"))}  # fmt: skip

#: Of a whole BLIP-2, what is the Q-Former's.
MEMBERS = r"query_tokens$|(qformer|embeddings|cls)\..*(weight|bias)$|(vision_projection|text_projection|itm_head)\."


def from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names. The second stage's projection into a language model is left out by ``MEMBERS``."""
    return {_ours(name): value for name, value in tensors.items()}


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of transformers' BLIP-2 for retrieval, which has the most heads."""
    modules, outside = ({ours: theirs for theirs, ours in table.items()} for table in (_MODULES, _OUTSIDE))
    renamed = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if name == "qformer.queries":
            renamed["query_tokens"] = value
        elif inside := _BLOCK.fullmatch(module):
            renamed[f"qformer.encoder.layer.{inside[1]}.{modules[inside[2]]}.{leaf}"] = value
        else:
            renamed[f"{outside[module]}.{leaf}"] = value
    return renamed


def _ours(name: str) -> str:
    if name == "query_tokens":
        return "qformer.queries"
    module, _, leaf = name.rpartition(".")
    if inside := _LAYER.fullmatch(module):
        return f"qformer.blocks.{inside[1]}.{_MODULES.get(inside[2], inside[2])}.{leaf}"
    return f"{(_OUTSIDE | _INSTRUCT).get(module, module)}.{leaf}"


def config_of(tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """The config from the shapes of its tensors, under our names; what is given is ``heads``, left out 64 wide each.

    Raises MahlstickError where it is no Q-Former.
    """
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    try:
        _, queries, width = shapes["qformer.queries"]
        looks = [int(found[1]) for name in shapes if (found := _LOOK.fullmatch(name))]
        config = {
            "feature_dim": shapes["qformer.blocks.0.look.to_k.weight"][1],
            "queries": queries,
            "depth": len({name.split(".")[2] for name in shapes if name.startswith("qformer.blocks.")}),
            "heads": given.get("heads") or (None if width % _HEAD_WIDTH else width // _HEAD_WIDTH),
            "width": width,
            "inner": shapes["qformer.blocks.0.of_queries.proj_in.weight"][0],
            "every": min((i for i in looks if i), default=0),
            "vocabulary": shapes.get("qformer.words.weight", (0,))[0],
            "places": shapes.get("qformer.places.weight", (0,))[0],
            "contrast_dim": shapes.get("image_proj.weight", (0,))[0],
            "match": "match_head.weight" in shapes,
            "caption": "caption_head.bias" in shapes,
        }
    except (KeyError, IndexError, ValueError) as error:
        raise MahlstickError(f"it makes no Q-Former ({error.args[0]} is missing or misshapen)") from error
    return config | {"every": config["every"] or config["depth"]}


def check_heads(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise MahlstickError unless the heads are known and divide the width."""
    if not config["heads"] or config["width"] % config["heads"]:
        raise MahlstickError(
            f"the file cannot tell the heads of its Q-Former ({config['width']} channels): give heads="
        )


def expected(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Name and shape of every tensor, under our names."""
    with torch.device("meta"):
        return {name: value.shape for name, value in ImageText(dict(config)).state_dict().items()}
