"""ControlNet files: the original repository's key names to diffusers' and back, and the config from shapes alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mahlstick.errors import MahlstickError

# What no shape tells, as in the published nets (and as ControlNetModel's own defaults).
DEFAULTS: dict[str, Any] = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "upcast_attention": False,
    "resnet_time_scale_shift": "default",
    "controlnet_conditioning_channel_order": "rgb",
    "global_pool_conditions": False,
    "addition_embed_type_num_heads": 64,
}
# SDXL embeds each of its six size and crop numbers in 256 channels (2307.01952, section 2.2).
SDXL_TIME_EMBED_DIM = 256
_SDXL_CROSS_ATTENTION = 2048
_HEAD_WIDTH = 64
_SD1_HEADS = 8

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_modules(levels: int, layers: int, hint_steps: int, label: str | None) -> dict[str, str]:
    """diffusers' module names to the original's, for ``levels`` of ``layers`` residual blocks each.

    ``hint_steps`` counts the hint encoder's halvings; ``label`` is the embedding that the original's ``label_emb``
    is: ``add_embedding`` (SDXL), ``class_embedding`` or None.
    """
    names = {"conv_in": "input_blocks.0.0", "controlnet_mid_block": "middle_block_out.0"}
    for ours, theirs in (("time_embedding", "time_embed"), *(((label, "label_emb.0"),) if label else ())):
        names |= {f"{ours}.linear_1": f"{theirs}.0", f"{ours}.linear_2": f"{theirs}.2"}

    hint = ["conv_in", *(f"blocks.{i}" for i in range(2 * hint_steps)), "conv_out"]
    names |= {f"controlnet_cond_embedding.{part}": f"input_hint_block.{2 * i}" for i, part in enumerate(hint)}

    position = 1
    for level in range(levels):
        for layer in range(layers):
            names |= _resnet(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{position}.0")
            names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{position}.1"
            position += 1
        if level < levels - 1:
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{position}.0.op"
            position += 1
    names |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(position)}

    names |= _resnet("mid_block.resnets.0", "middle_block.0") | _resnet("mid_block.resnets.1", "middle_block.2")
    return names | {"mid_block.attentions.0": "middle_block.1"}


def _resnet(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{part}": f"{theirs}.{original}" for part, original in _RESNET.items()}


def from_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original key names, without prefix, to diffusers'. Names it does not know stay, for the check to report."""
    levels = 1 + sum(name.endswith(".0.op.weight") for name in tensors)
    # Each level holds its residual blocks and, but for the last, one downsampler; the first convolution is block 0.
    blocks = _count(tensors, r"input_blocks\.(\d+)\.")
    hint_steps = _count(tensors, r"input_hint_block\.(\d*[02468])\.") // 2 - 1
    cross = next((v.shape[1] for k, v in tensors.items() if k.endswith("attn2.to_k.weight")), _SDXL_CROSS_ATTENTION)
    label = "class_embedding" if cross in (768, 1024) else "add_embedding"
    modules = original_modules(levels, (blocks - levels) // levels, hint_steps, label)
    return _rename(tensors, {theirs: ours for ours, theirs in modules.items()})


def to_original(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """diffusers' key names to the original's, without prefix."""
    label = "class_embedding" if config.get("class_embed_type") else "add_embedding"
    hint_steps = len(config["conditioning_embedding_out_channels"]) - 1
    modules = original_modules(len(config["block_out_channels"]), config["layers_per_block"], hint_steps, label)
    return _rename(tensors, modules)


def _rename(tensors: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in tensors.items():
        parts = name.split(".")
        heads = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
        head = next((head for head in heads if head in modules), None)
        renamed[name if head is None else modules[head] + name[len(head) :]] = value
    return renamed


def add_base(tensors: Mapping[str, Tensor], base: Any) -> dict[str, Tensor]:
    """A difference file's weights plus the base UNet's, which it was taken from (all but hint encoder and zero
    convolutions). ``base`` is a UNet, a pipeline that has one, or a UNet's state dict, in diffusers' key names.
    """
    if base is None:
        raise MahlstickError(
            "it holds only the difference from its base model: give the UNet it was taken from as base=pipe.unet"
        )
    unet = getattr(base, "unet", base)
    weights: Mapping[str, Tensor] = unet.state_dict() if hasattr(unet, "state_dict") else unet
    whole = dict(tensors)
    for name, value in tensors.items():
        if name.startswith("controlnet_"):
            continue
        if name not in weights or weights[name].shape != value.shape:
            found = tuple(weights[name].shape) if name in weights else "nothing"
            raise MahlstickError(
                f"it is a difference from another base than the one given: {name} is {tuple(value.shape)} here and "
                f"{found} there"
            )
        whole[name] = value + weights[name].to(value.device)
    return whole


def config_of(tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """ControlNetModel's config from shapes, in diffusers' key names, and from what is given.

    ``heads`` is short for ``attention_head_dim``. Without either, heads follow the family: 8 at each level in SD 1.x,
    of 64 channels in SD 2.x and SDXL. ``attention_head_dim`` is the number of heads, as in diffusers' configs.
    """
    levels = _count(tensors, r"down_blocks\.(\d+)\.")
    layers = _count(tensors, r"down_blocks\.0\.resnets\.(\d+)\.")
    channels = [_shape(tensors, f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels)]
    attends = [_has(tensors, f"down_blocks.{i}.attentions.") for i in range(levels)]
    depths = [_depth(tensors, f"down_blocks.{i}.attentions.0") if attends[i] else 1 for i in range(levels)]
    if not attends[-1] and _has(tensors, "mid_block.attentions."):
        depths[-1] = _depth(tensors, "mid_block.attentions.0")
    cross = next((v.shape[1] for k, v in tensors.items() if k.endswith("attn2.to_k.weight")), _SDXL_CROSS_ATTENTION)
    linear = any(k.endswith(".proj_in.weight") and v.ndim == 2 for k, v in tensors.items())
    label = next((e for e in ("add_embedding", "class_embedding") if f"{e}.linear_1.weight" in tensors), None)
    hint_blocks = _count(tensors, r"controlnet_cond_embedding\.blocks\.(\d+)\.")
    hint_in = _shape(tensors, "controlnet_cond_embedding.conv_in.weight")
    widenings = (f"controlnet_cond_embedding.blocks.{i}.weight" for i in range(1, hint_blocks, 2))
    shaped = {
        "in_channels": _shape(tensors, "conv_in.weight")[1],
        "conditioning_channels": hint_in[1],
        "conditioning_embedding_out_channels": [hint_in[0], *(_shape(tensors, name)[0] for name in widenings)],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if attended else "DownBlock2D" for attended in attends],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if _has(tensors, "mid_block.attentions.") else "UNetMidBlock2D",
        "cross_attention_dim": cross,
        "transformer_layers_per_block": 1 if set(depths) == {1} else depths,
        "use_linear_projection": linear,
        "attention_head_dim": [max(1, c // _HEAD_WIDTH) for c in channels] if linear else _SD1_HEADS,
        "class_embed_type": "projection" if label == "class_embedding" else None,
        "addition_embed_type": "text_time" if label == "add_embedding" else None,
        "addition_time_embed_dim": SDXL_TIME_EMBED_DIM if label == "add_embedding" else None,
        "projection_class_embeddings_input_dim": _shape(tensors, f"{label}.linear_1.weight")[1] if label else None,
    }
    named = {"attention_head_dim" if name == "heads" else name: value for name, value in given.items()}
    return DEFAULTS | shaped | named


def expected(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Name and shape of every tensor of a ControlNetModel of this config."""
    return shapes_of("ControlNetModel", config)


def shapes_of(class_name: str, config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Name and shape of every tensor of a model of diffusers; raises MahlstickError for a config that makes none."""
    import diffusers

    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        with torch.device("meta"):
            model = getattr(diffusers, class_name)(**fields)
    except (TypeError, ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
        raise MahlstickError(f"its config makes no ControlNet ({_first_line(error)})") from error
    return {name: value.shape for name, value in model.state_dict().items()}


def check_heads(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise MahlstickError unless the heads divide the channels of every level."""
    channels = config["block_out_channels"]
    heads = config["num_attention_heads"] or config["attention_head_dim"]
    per_level = [heads] * len(channels) if isinstance(heads, int) else list(heads)
    if len(per_level) != len(channels) or any(h < 1 or c % h for c, h in zip(channels, per_level, strict=False)):
        raise MahlstickError(
            f"{heads} attention heads do not divide its {tuple(channels)} channels: give heads= (one number, or one "
            "per level)"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _count(names: Iterable[str], pattern: str) -> int:
    return len({found[1] for name in names if (found := re.match(pattern, name))})


def _has(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _depth(names: Iterable[str], attention: str) -> int:
    return _count(names, re.escape(attention) + r"\.transformer_blocks\.(\d+)\.")


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise MahlstickError(f"it lacks {name}, which every ControlNet has")
    return tuple(tensors[name].shape)
