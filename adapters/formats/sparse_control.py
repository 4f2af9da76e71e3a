"""SparseCtrl files: AnimateDiff's key names to diffusers' SparseControlNetModel's, and the config from shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mahlstick.adapters.formats import controlnet, motion
from mahlstick.adapters.formats.bases import per_level
from mahlstick.errors import MahlstickError

_EMBEDDING = "controlnet_cond_embedding"
# A ControlNet's fields that SparseControlNetModel has not.
_ABSENT = (
    "encoder_hid_dim", "encoder_hid_dim_type", "num_class_embeds", "class_embed_type", "addition_embed_type",
    "addition_embed_type_num_heads", "addition_time_embed_dim", "projection_class_embeddings_input_dim",
    "mid_block_type",
)  # fmt: skip
# What no file tells, as published.
_DEFAULTS = {
    "motion_num_attention_heads": 8,
    "transformer_layers_per_mid_block": None,
    "concat_conditioning_mask": True,
    "norm": "clip",
}


def from_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AnimateDiff's names to diffusers': the motion modules have others, and a training run's prefixes go."""
    plain = {re.sub(r"^(module\.|controlnet\.)+", "", name): value for name, value in tensors.items()}
    return {motion.diffusers_name(name) or name: value for name, value in plain.items()}


def to_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Back to AnimateDiff's names."""
    return {motion.original_name(name) or name: value for name, value in state_dict.items()}


def config_of(tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """SparseControlNetModel's config from shapes and from what is given, and ``norm`` as in a motion module's.

    A condition of latents goes through one convolution, a picture through a ControlNet's hint encoder.
    """
    latents = f"{_EMBEDDING}.weight" in tensors
    in_space = {name: value for name, value in tensors.items() if ".motion_modules." not in name}
    if latents:
        in_space[f"{_EMBEDDING}.conv_in.weight"] = tensors[f"{_EMBEDDING}.weight"]
    config = controlnet.config_of(in_space, {}) | _DEFAULTS
    mask = given.get("concat_conditioning_mask", config["concat_conditioning_mask"])
    config["conditioning_channels"] -= bool(mask)
    if latents:
        config["conditioning_embedding_out_channels"] = [16, 32, 96, 256]  # diffusers' default, which goes unused
    config |= {
        "use_simplified_condition_embedding": latents,
        "motion_max_seq_length": next((v.shape[1] for k, v in tensors.items() if k.endswith(".pos_embed.pe")), 0),
        "temporal_transformer_layers_per_block": _depths(tensors, len(config["block_out_channels"])),
    }
    config |= {"attention_head_dim" if name == "heads" else name: value for name, value in given.items()}
    config["down_block_types"] = [name.replace("2D", "Motion") for name in config["down_block_types"]]
    return {name: value for name, value in config.items() if name not in _ABSENT}


def _depths(tensors: Mapping[str, Tensor], levels: int) -> int | list[int]:
    """Temporal blocks of each motion module, one number if all levels have as many."""
    block = r"down_blocks\.{}\.motion_modules\.0\.transformer_blocks\.\d+\.norm1\.weight"
    depths = [sum(bool(re.fullmatch(block.format(level), name)) for name in tensors) for level in range(levels)]
    return depths[0] if len(set(depths)) == 1 else depths


def check_heads(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise MahlstickError unless the heads, in space and in time, divide the channels of every level."""
    controlnet.check_heads(config, tensors)
    channels = config["block_out_channels"]
    heads = per_level(config["motion_num_attention_heads"], len(channels))
    if len(heads) != len(channels) or any(h < 1 or c % h for c, h in zip(channels, heads, strict=False)):
        raise MahlstickError(
            f"{config['motion_num_attention_heads']} heads of the motion modules do not divide its {tuple(channels)} "
            "channels: give motion_num_attention_heads="
        )


def expected(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Name and shape of every tensor of a SparseControlNetModel of this config."""
    return controlnet.shapes_of("SparseControlNetModel", {k: v for k, v in config.items() if k != "norm"})
