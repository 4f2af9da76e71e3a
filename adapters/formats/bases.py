"""Base families, and whether an adapter fits a UNet, from configs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mahlstick.errors import MahlstickError

BASE_NAMES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL", "unknown": "another base"}
_BY_CROSS_ATTENTION = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_BY_WIDTHS = {(320, 640, 1280, 1280): "sd1", (320, 640, 1280): "sdxl"}
_KIND_NAMES = {
    "controlnet": "ControlNet",
    "sparse_controlnet": "SparseCtrl encoder",
    "ip_adapter": "IP-Adapter",
    "motion_adapter": "motion module",
}


def base_of(cross_attention_dim: int | None, added_conditions: bool = False) -> str:
    """``sd1 | sd2 | sdxl | unknown``: by the text features' width, and by SDXL's size and crop conditions."""
    return "sdxl" if added_conditions else _BY_CROSS_ATTENTION.get(cross_attention_dim or 0, "unknown")


def base_by_widths(channels: Sequence[int]) -> str:
    """The same by the channels of the UNet's levels, which SD 1.x and 2.x share."""
    return _BY_WIDTHS.get(tuple(channels), "unknown")


def require_fit(kind: str, config: Mapping[str, Any], unet_config: Mapping[str, Any]) -> None:
    """Raise MahlstickError, naming both bases, if an adapter of this config cannot act on a UNet of that config.

    Both are config dicts: the adapter's as ``inspect`` gives it, the UNet's as diffusers keeps it.
    """
    differences = _DIFFERENCES[kind](config, unet_config)
    if differences:
        ours, theirs = _describe(config), _describe(unet_config)
        raise MahlstickError(
            f"this {_KIND_NAMES[kind]} was made for {ours}, the UNet is {theirs}, and they differ in "
            f"{'; '.join(differences)}: use one made for this base."
        )


def _describe(config: Mapping[str, Any]) -> str:
    if "cross_attention_dim" not in config:
        channels = config["block_out_channels"]
        return f"{BASE_NAMES[base_by_widths(channels)]} (channels {', '.join(map(str, channels))})"
    cross = config.get("cross_attention_dim")
    cross = cross[0] if isinstance(cross, Sequence) else cross
    return f"{BASE_NAMES[base_of(cross, _is_xl(config))]} (cross-attention {cross})"


def _is_xl(config: Mapping[str, Any]) -> bool:
    return config.get("addition_embed_type") == "text_time"


def _controlnet_differences(config: Mapping[str, Any], unet_config: Mapping[str, Any]) -> list[str]:
    fields = ("cross_attention_dim", "block_out_channels", "layers_per_block", "projection_class_embeddings_input_dim")
    levels = len(unet_config["block_out_channels"])
    found = []
    for field in fields:
        ours, theirs = config.get(field), unet_config.get(field)
        # A scalar stands for the same value at each level.
        if per_level(ours, levels) != per_level(theirs, levels):
            found.append(f"{field} ({_plain(ours)} and {_plain(theirs)})")
    # An inpainting UNet takes mask and masked picture after the latents; a ControlNet sees the first channels.
    if config.get("in_channels", 4) > unet_config.get("in_channels", 4):
        found.append(f"in_channels ({config['in_channels']} and {unet_config.get('in_channels', 4)})")
    return found


def _ip_adapter_differences(config: Mapping[str, Any], unet_config: Mapping[str, Any]) -> list[str]:
    cross = unet_config["cross_attention_dim"]
    if per_level(config["cross_attention_dim"], 1) != per_level(cross, 1):
        return [f"cross_attention_dim ({config['cross_attention_dim']} and {_plain(cross)})"]
    ours = [width for _, width in sorted((int(index), width) for index, width in config["layers"].items())]
    theirs = cross_attention_widths(unet_config)
    if len(ours) != len(theirs):
        return [f"the number of cross-attention layers ({len(ours)} and {len(theirs)})"]
    if ours != theirs:
        return [f"the widths of the cross-attention layers ({max(ours)} and {max(theirs)} at the widest)"]
    return []


def _motion_differences(config: Mapping[str, Any], unet_config: Mapping[str, Any]) -> list[str]:
    levels = len(unet_config["block_out_channels"])
    found = []
    if config["use_motion_mid_block"] and not unet_config.get("mid_block_type", True):
        found.append("the middle block, which this UNet has not")
    for ours, theirs in (("block_out_channels",) * 2, ("motion_layers_per_block", "layers_per_block")):
        mine, its = config[ours], unet_config[theirs]
        if per_level(mine, levels) != per_level(its, levels):
            found.append(f"{theirs} ({_plain(mine)} and {_plain(its)})")
    return found


_DIFFERENCES = {
    "controlnet": _controlnet_differences,
    "sparse_controlnet": _controlnet_differences,
    "ip_adapter": _ip_adapter_differences,
    "motion_adapter": _motion_differences,
}


def cross_attention_widths(unet_config: Mapping[str, Any]) -> list[int]:
    """Channels of each cross-attention of a UNet2DConditionModel, in diffusers' order: down, up, middle."""
    channels = list(unet_config["block_out_channels"])
    levels = len(channels)
    layers = per_level(unet_config.get("layers_per_block", 2), levels)
    depths = per_level(unet_config.get("transformer_layers_per_block", 1), levels)
    up_depths = unet_config.get("reverse_transformer_layers_per_block") or depths[::-1]
    widths: list[int] = []
    for kind, width, count, depth in zip(unet_config["down_block_types"], channels, layers, depths, strict=True):
        widths += [width] * _blocks(kind, count, depth)
    up = zip(unet_config["up_block_types"], channels[::-1], layers[::-1], per_level(up_depths, levels), strict=True)
    for kind, width, count, depth in up:
        widths += [width] * _blocks(kind, count + 1, depth)
    middle = depths[-1] if isinstance(depths[-1], int) else depths[-1][0]
    return widths + [channels[-1]] * _blocks(unet_config.get("mid_block_type") or "", 1, middle)


def _blocks(kind: str, attentions: int, depth: int | Sequence[int]) -> int:
    if "CrossAttn" not in kind:
        return 0
    return attentions * depth if isinstance(depth, int) else sum(depth)


def per_level(value: Any, levels: int) -> list[Any]:
    """A field of a config that may stand for every level, as a list with one for each."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * levels


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
