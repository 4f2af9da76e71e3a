"""Motion module files: AnimateDiff's layouts to diffusers' MotionAdapter names, and the config from shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mahlstick.adapters.formats.bases import per_level
from mahlstick.errors import MahlstickError

# What no file tells, as published: heads of every attention, and groups of the normalisation before it.
_HEADS, _GROUPS = 8, 32

# AnimateDiff's module names inside a transformer block to diffusers'.
_ORIGINAL = {
    "attention_blocks.0.pos_encoder": "pos_embed",
    "attention_blocks.0": "attn1",
    "attention_blocks.1": "attn2",
    "norms.0": "norm1",
    "norms.1": "norm2",
    "ff_norm": "norm3",
}
_SECOND_TABLE = ".attention_blocks.1.pos_encoder."
_PLACE = re.compile(r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)\.motion_modules\.\d+\.")


def diffusers_name(name: str) -> str | None:
    """AnimateDiff's name of a motion module's weight, after any prefix, as diffusers'; None for other weights."""
    place = _PLACE.search(name)
    if place is None:
        return None
    inside = name[place.start() :].replace(".temporal_transformer.", ".")
    for theirs, ours in _ORIGINAL.items():
        inside = inside.replace(f".{theirs}.", f".{ours}.")
    return inside


def from_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AnimateDiff's names, after any prefix, to diffusers'.

    Both attentions of a block have the same table of positions, which diffusers keeps once. Raises MahlstickError where
    they differ.
    """
    renamed = {}
    for name, value in tensors.items():
        ours = diffusers_name(name)
        if ours is None:
            raise MahlstickError(f"{name} is at no place of a UNet")
        if _SECOND_TABLE in name:
            first = tensors.get(name.replace(_SECOND_TABLE, ".attention_blocks.0.pos_encoder."))
            if first is None:
                raise MahlstickError(f"{name} has no counterpart in the first attention")
            if not value.is_meta and not torch.equal(first, value):
                raise MahlstickError(f"{name} differs from the first attention's table, which is not supported")
            continue
        renamed[ours] = value
    return renamed


def original_name(name: str) -> str | None:
    """diffusers' name of a motion module's weight as AnimateDiff's; None for other weights."""
    place = _PLACE.match(name)
    if place is None:
        return None
    inside = name[place.end() :]
    for theirs, ours in _ORIGINAL.items():
        inside = re.sub(rf"(?<=\.){re.escape(ours)}(?=\.)", theirs, inside)
    return f"{place[0]}temporal_transformer.{inside}"


def to_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Back to AnimateDiff's names, with the table of positions in both attentions."""
    renamed = {}
    for name, value in state_dict.items():
        theirs = original_name(name)
        assert theirs is not None
        renamed[theirs] = value
        if "pos_encoder" in theirs:
            renamed[theirs.replace("attention_blocks.0.", "attention_blocks.1.")] = value
    return renamed


def config_of(tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of diffusers' MotionAdapter and two of ours (``positions``, ``norm``), from shapes and from what is given.

    Raises MahlstickError where the modules are not those of a UNet's down blocks.
    """
    widths: dict[int, list[int]] = {}
    for name, value in tensors.items():
        if found := re.fullmatch(r"down_blocks\.(\d+)\.motion_modules\.\d+\.norm\.weight", name):
            widths.setdefault(int(found[1]), []).append(value.shape[0])
    if sorted(widths) != list(range(len(widths))) or not widths:
        raise MahlstickError("it lacks the weights down_blocks.0.motion_modules.0.norm.weight and following")
    block = re.compile(r"down_blocks\.0\.motion_modules\.0\.transformer_blocks\.(\d+)\.norm1\.weight")
    table = next((value for name, value in tensors.items() if name.endswith(".pos_embed.pe")), None)
    layers = [len(widths[level]) for level in sorted(widths)]
    config = {
        "block_out_channels": [widths[level][0] for level in sorted(widths)],
        "motion_layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "motion_transformer_layers_per_block": sum(block.fullmatch(name) is not None for name in tensors),
        "motion_num_attention_heads": _HEADS,
        "motion_norm_num_groups": _GROUPS,
        "motion_max_seq_length": None if table is None else table.shape[1],
        "use_motion_mid_block": any(name.startswith("mid_block.") for name in tensors),
        "positions": "rotary" if table is None else "sinusoidal",
        "norm": "clip",
    }
    told = {"motion_num_attention_heads" if name == "heads" else name: value for name, value in given.items()}
    read_off = ("block_out_channels", "motion_layers_per_block", "motion_transformer_layers_per_block",
                "use_motion_mid_block")  # fmt: skip
    heads = told.get("motion_num_attention_heads")
    if isinstance(heads, Sequence) and len(set(heads)) == 1:  # diffusers lets every level have its own
        told["motion_num_attention_heads"] = heads[0]
    return config | {name: value for name, value in told.items() if name in config and name not in read_off}


def check_heads(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise MahlstickError unless heads and groups are numbers that divide every width."""
    for field, word, name in (
        ("motion_num_attention_heads", "heads", "heads"),
        ("motion_norm_num_groups", "groups", "motion_norm_num_groups"),
    ):
        count = config[field]
        if not isinstance(count, int) or count < 1:
            raise MahlstickError(f"{field} is {count!r}, which is no whole number of at least 1: give {name}=")
        bad = [width for width in config["block_out_channels"] if width % count]
        if bad:
            raise MahlstickError(f"{count} {word} do not divide its {bad[0]} channels: give {name}=")
        if word == "heads" and config["positions"] == "rotary":
            odd = [width // count for width in config["block_out_channels"] if width // count % 2]
            if odd:
                raise MahlstickError(f"rotary positions turn pairs, and {count} heads are {odd[0]} wide: give heads=")


def expected(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Name and shape of every tensor of a motion module of this config."""
    channels = list(config["block_out_channels"])
    layers = per_level(config["motion_layers_per_block"], len(channels))
    places = [(f"down_blocks.{i}", width, count) for i, (width, count) in enumerate(zip(channels, layers, strict=True))]
    places += [
        (f"up_blocks.{i}", width, count + 1)
        for i, (width, count) in enumerate(zip(channels[::-1], layers[::-1], strict=True))
    ]
    places += [("mid_block", channels[-1], 1)] if config["use_motion_mid_block"] else []
    shapes: dict[str, torch.Size] = {}
    for place, width, count in places:
        for number in range(count):
            prefix = f"{place}.motion_modules.{number}"
            shapes |= {f"{prefix}.{name}": torch.Size(shape) for name, shape in _module(config, width).items()}
    return shapes


def _module(config: Mapping[str, Any], width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("norm", "proj_in", "proj_out"):
        shapes |= {f"{name}.weight": (width,) if name == "norm" else (width, width), f"{name}.bias": (width,)}
    for number in range(config["motion_transformer_layers_per_block"]):
        block = f"transformer_blocks.{number}"
        for norm in ("norm1", "norm2", "norm3"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        for attn in ("attn1", "attn2"):
            shapes |= {f"{block}.{attn}.to_{name}.weight": (width, width) for name in "qkv"}
            shapes |= {f"{block}.{attn}.to_out.0.weight": (width, width), f"{block}.{attn}.to_out.0.bias": (width,)}
        shapes |= {f"{block}.ff.net.0.proj.weight": (8 * width, width), f"{block}.ff.net.0.proj.bias": (8 * width,)}
        shapes |= {f"{block}.ff.net.2.weight": (width, 4 * width), f"{block}.ff.net.2.bias": (width,)}
        if config["positions"] != "rotary":
            shapes[f"{block}.pos_embed.pe"] = (1, config["motion_max_seq_length"], width)
    return shapes
