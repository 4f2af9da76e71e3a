"""IP-Adapter files: every layout to the original repository's flat keys, and the config from shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mahlstick.adapters import projectors
from mahlstick.errors import MahlstickError

# Published resamplers have heads of 64 channels; the file cannot tell.
_HEAD_WIDTH = 64
# A video projector's table of positions has a row for every patch of every frame; the file cannot tell one from the
# other. Eight frames are usual.
_FRAMES = 8
# MiniGPT-v2 joins four patches; the file cannot tell.
_JOIN = 4
# The published MLP projector ("full") takes all hidden states of a ViT-H/14: 256 patches and the class token.
_MLP_TOKENS = 257

_PROJECTOR = "encoder_hid_proj.image_projection_layers."
_TRAINING_PROJECTOR = "image_proj_model."
# diffusers' module names inside the UNet to the original's, one list per projector.
_DIFFUSERS_LINEAR = {"image_embeds": "proj"}
_DIFFUSERS_MLP = {"ff.net.0.proj": "proj.0", "ff.net.2": "proj.2", "norm": "proj.3"}
_DIFFUSERS_RESAMPLER = {
    "ln0": "0.norm1",
    "ln1": "0.norm2",
    "attn.to_q": "0.to_q",
    "attn.to_out.0": "0.to_out",
    "ff.0": "1.0",
    "ff.1.net.0.proj": "1.1",
    "ff.1.net.2": "1.3",
}
_BLOCK_ORDER = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}


def from_training(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original training script's checkpoint (``unet.*``, ``image_proj_model.*``, ``adapter_modules.*``).

    Saved as safetensors, the shared attention weights may stand under their ``unet.*`` names only.
    """
    projector = _below(tensors, _TRAINING_PROJECTOR, "image_proj.")
    layers = _below(tensors, "adapter_modules.", "ip_adapter.")
    if not layers:
        layers = _layers_by_name({k: v for k, v in tensors.items() if re.search(r"\.to_[kv]_ip\.weight$", k)})
    return projector | {name: value for name, value in layers.items() if "_ip." in name}


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' UNet state dict after ``load_ip_adapter``: the projector and attention weights of its one adapter."""
    adapters = {name[len(_PROJECTOR) :].split(".")[0] for name in tensors if name.startswith(_PROJECTOR)}
    if adapters != {"0"}:
        raise MahlstickError(f"it holds {len(adapters)} IP-Adapters in one UNet: save it with one of them loaded")
    projector = _below(tensors, f"{_PROJECTOR}0.", "")
    if "image_embeds.weight" in projector:
        renamed = {_swap(name, _DIFFUSERS_LINEAR): value for name, value in projector.items()}
    elif "latents" in projector:
        renamed = _resampler_from_diffusers(projector)
    else:
        renamed = {_swap(name, _DIFFUSERS_MLP): value for name, value in projector.items()}
    layers = _layers_by_name({k: v for k, v in tensors.items() if re.search(r"\.to_[kv]_ip\.0\.weight$", k)})
    return {f"image_proj.{name}": value for name, value in renamed.items()} | layers


def _resampler_from_diffusers(projector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in projector.items():
        layer = re.match(r"layers\.\d+\.", name)
        if layer is None:
            renamed[name] = value
        elif name.endswith("attn.to_k.weight"):
            halves = [value, projector.get(name.replace("to_k", "to_v"), value[:0])]
            renamed[f"{layer[0]}0.to_kv.weight"] = torch.cat(halves)
        elif not name.endswith("attn.to_v.weight"):
            renamed[layer[0] + _swap(name[layer.end() :], _DIFFUSERS_RESAMPLER)] = value
    return renamed


def _swap(name: str, modules: Mapping[str, str]) -> str:
    """The name with its module part renamed, where the table has it."""
    module, _, leaf = name.rpartition(".")
    return f"{modules.get(module, module)}.{leaf}" if module else leaf


def _layers_by_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``….attn2.processor.to_k_ip[.0].weight`` to ``ip_adapter.{1,3,5,…}.to_k_ip.weight``.

    The number is the place among the UNet's attention processors, which diffusers lists down, up, middle, each
    cross-attention (odd) behind its self-attention (even).
    """
    places = sorted({name.split(".to_")[0] for name in tensors}, key=_place)
    index = {place: 2 * i + 1 for i, place in enumerate(places)}
    renamed = {}
    for name, value in tensors.items():
        place, _, weight = name.partition(".to_")
        renamed[f"ip_adapter.{index[place]}.to_{weight[0]}_ip.weight"] = value
    return renamed


def _place(name: str) -> tuple[int, ...]:
    block = next((order for part, order in _BLOCK_ORDER.items() if part in name), len(_BLOCK_ORDER))
    return block, *(int(part) for part in name.split(".") if part.isdigit())


def _below(tensors: Mapping[str, Tensor], prefix: str, instead: str) -> dict[str, Tensor]:
    return {instead + name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


# Fields in which the shapes have their say, whatever is given.
_READ_OFF = ("heads", "head_dim", "layers", "frames", "grid", "join")


def config_of(tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's config from the shapes of its tensors, under the original's flat keys, and from what is given.

    A resampler's ``heads`` and ``head_dim`` are None where its width is no multiple of the published heads' and
    neither is given; so are a video projector's, and its ``frames`` and ``grid`` where the rows of its table make no
    square frames. Raises MahlstickError if the projector is none that we know.
    """
    found = re.compile(r"ip_adapter\.(\d+)\.to_k_ip\.weight")
    hidden = {match[1]: value.shape[0] for name, value in tensors.items() if (match := found.fullmatch(name))}
    if not hidden:
        raise MahlstickError("it lacks the attention weights ip_adapter.1.to_k_ip.weight and following")
    shapes = {name.removeprefix("image_proj."): tuple(value.shape) for name, value in tensors.items()}
    config = _projector_of(shapes, given) | {"layers": {index: hidden[index] for index in sorted(hidden, key=int)}}
    return config | {"layer": None} | {name: value for name, value in given.items() if name not in _READ_OFF}


def _projector_of(shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]) -> dict[str, Any]:
    try:
        if "proj.weight" in shapes:
            cross = shapes["norm.weight"][0]
            tokens, features = shapes["proj.weight"][0] // cross, shapes["proj.weight"][1]
            return {"projector": "linear", "tokens": tokens, "feature_dim": features, "cross_attention_dim": cross}
        if "proj.3.weight" in shapes:
            cross, features = shapes["proj.3.weight"][0], shapes["proj.0.weight"][1]
            return {"projector": "mlp", "tokens": _MLP_TOKENS, "feature_dim": features, "cross_attention_dim": cross}
        if "latents" in shapes:
            return _resampler_of(shapes, given)
        if "pool.latents" in shapes:
            return _video_of(shapes, given)
        if "joined.weight" in shapes:
            return _concat_of(shapes, given)
        if "queries" in shapes:
            return {"projector": "cross_attention", "tokens": shapes["queries"][1], **_projected(shapes, given)}
        if "merge.0.weight" in shapes:
            return {"projector": "merger", "depth": _count(shapes, "blocks"), **_projected(shapes, given, "merge.2")}
        if "qformer.queries" in shapes:
            return _qformer_of(shapes, given)
    except KeyError as error:
        raise MahlstickError(f"its projector lacks image_proj.{error.args[0]}") from error
    except IndexError as error:
        raise MahlstickError("its projector has weights of too few dimensions") from error
    raise MahlstickError(
        "its projector is none of linear (image_proj.proj.weight), resampler (image_proj.latents), mlp "
        "(image_proj.proj.3.weight), video (image_proj.pool.latents), concat (image_proj.joined.weight), "
        "cross_attention (image_proj.queries), merger (image_proj.merge.0.weight) and qformer "
        "(image_proj.qformer.queries)"
    )


def _resampler_of(shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "projector": "resampler",
        "tokens": shapes["latents"][1],
        "feature_dim": shapes["proj_in.weight"][1],
        "cross_attention_dim": shapes["proj_out.weight"][0],
        "depth": _count(shapes, "layers"),
        **_heads_of(shapes["layers.0.0.to_q.weight"][0], given),
    }


def _heads_of(inner: int, given: Mapping[str, Any]) -> dict[str, Any]:
    head_dim = given.get("head_dim") or (None if inner % _HEAD_WIDTH else _HEAD_WIDTH)
    heads = given.get("heads") or (inner // head_dim if head_dim else None)
    return {"heads": heads, "head_dim": inner // heads if heads else None}


def _video_of(shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]) -> dict[str, Any]:
    frames, rows = given.get("frames", _FRAMES), shapes["positions"][1] - 1
    grid = math.isqrt(rows // frames) if isinstance(frames, int) and 0 < frames <= rows else 0
    known = grid > 0 and frames * grid**2 == rows
    return {
        "projector": "video",
        "tokens": shapes["pool.latents"][1],
        "feature_dim": shapes["proj_in.weight"][1],
        "cross_attention_dim": shapes["pool.proj_out.weight"][0],
        "depth": _count(shapes, "blocks"),
        **_heads_of(shapes["proj_in.weight"][0], given),
        "frames": frames if known else None,
        "grid": grid if known else None,
    }


def _concat_of(shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]) -> dict[str, Any]:
    cross, joined = shapes["joined.weight"]
    join = given.get("join") or _JOIN
    known = isinstance(join, int) and join > 0 and joined % join == 0
    return {
        "projector": "concat",
        "join": join if known else None,
        "feature_dim": joined // join if known else None,
        "cross_attention_dim": cross,
    }


def _projected(
    shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any], last: str = "proj_out"
) -> dict[str, Any]:
    """What a first and a last layer tell."""
    width, features = shapes["proj_in.weight"]
    cross = shapes[f"{last}.weight"][0]
    return {"feature_dim": features, "cross_attention_dim": cross, **_heads_of(width, given)}


def _qformer_of(shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]) -> dict[str, Any]:
    _, tokens, width = shapes["qformer.queries"]
    config: dict[str, Any] = {
        "projector": "qformer",
        "tokens": tokens,
        "feature_dim": shapes["qformer.blocks.0.look.to_k.weight"][1],
        "cross_attention_dim": shapes["proj_out.weight"][0],
        "depth": _count(shapes, "qformer.blocks"),
        **_heads_of(width, given),
    }
    if "qformer.words.weight" not in shapes:
        return config
    words = {"vocabulary": shapes["qformer.words.weight"][0], "places": shapes["qformer.places.weight"][0]}
    return {**config, "projector": "instruct_qformer", **words}


def _count(shapes: Mapping[str, tuple[int, ...]], layers: str) -> int:
    return len({name[len(layers) + 1 :].split(".")[0] for name in shapes if name.startswith(f"{layers}.")})


def _width(tensors: Mapping[str, Tensor]) -> int:
    """Of a projector that has heads."""
    if "image_proj.proj_in.weight" in tensors:
        return tensors["image_proj.proj_in.weight"].shape[0]
    return tensors["image_proj.qformer.queries"].shape[2]


def check_heads(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise MahlstickError unless the heads of a projector that has some are known and divide its width, and so a video
    projector's frames and the rows of its table, and how many patches are joined."""
    if config["projector"] == "concat" and config["join"] is None:
        raise MahlstickError("the file cannot tell how many patches its projector joins: give join=")
    if "heads" not in config:
        return
    width = _width(tensors)
    if not config["heads"] or config["heads"] * config["head_dim"] != width:
        raise MahlstickError(
            f"the file cannot tell the heads of its {config['projector']} projector ({width} channels): give heads="
        )
    if config["projector"] == "video" and config["frames"] is None:
        raise MahlstickError("the file cannot tell for how many frames its positions are: give frames=")


def expected(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Name and shape of every tensor of an adapter of this config, under the original's flat keys."""
    try:
        cross = config["cross_attention_dim"]
        shapes = {f"image_proj.{name}": shape for name, shape in _PROJECTORS[config["projector"]](config).items()}
        for position, hidden in enumerate(config["layers"].values()):
            for side in "kv":
                shapes[f"ip_adapter.{2 * position + 1}.to_{side}_ip.weight"] = (hidden, cross)
    except KeyError as error:
        raise MahlstickError(f"its config makes no IP-Adapter ({error.args[0]} is missing or unknown)") from error
    return {name: torch.Size(shape) for name, shape in shapes.items()}


_Shapes = dict[str, tuple[int, ...]]


def _layer_norm(name: str, width: int) -> _Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inputs: int, outputs: int) -> _Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _linear_projector(config: Mapping[str, Any]) -> _Shapes:
    cross = config["cross_attention_dim"]
    return _linear("proj", config["feature_dim"], config["tokens"] * cross) | _layer_norm("norm", cross)


def _mlp_projector(config: Mapping[str, Any]) -> _Shapes:
    features, cross = config["feature_dim"], config["cross_attention_dim"]
    return _linear("proj.0", features, features) | _linear("proj.2", features, cross) | _layer_norm("proj.3", cross)


def _resampler(config: Mapping[str, Any]) -> _Shapes:
    cross = config["cross_attention_dim"]
    width = config["heads"] * config["head_dim"]
    shapes: _Shapes = {"latents": (1, config["tokens"], width)}
    shapes |= _linear("proj_in", config["feature_dim"], width) | _linear("proj_out", width, cross)
    shapes |= _layer_norm("norm_out", cross)
    for layer in range(config["depth"]):
        attention, feed_forward = f"layers.{layer}.0", f"layers.{layer}.1"
        shapes |= _layer_norm(f"{attention}.norm1", width) | _layer_norm(f"{attention}.norm2", width)
        shapes[f"{attention}.to_q.weight"] = shapes[f"{attention}.to_out.weight"] = (width, width)
        shapes[f"{attention}.to_kv.weight"] = (2 * width, width)
        shapes |= _layer_norm(f"{feed_forward}.0", width)
        shapes |= {f"{feed_forward}.1.weight": (4 * width, width), f"{feed_forward}.3.weight": (width, 4 * width)}
    return shapes


def _video(config: Mapping[str, Any]) -> _Shapes:
    width = config["heads"] * config["head_dim"]
    shapes: _Shapes = _linear("proj_in", config["feature_dim"], width) | {"class_token": (1, 1, width)}
    shapes["positions"] = (1, 1 + config["frames"] * config["grid"] ** 2, width)
    for layer in range(config["depth"]):
        block = f"blocks.{layer}"
        shapes |= _layer_norm(f"{block}.norm1", width) | _layer_norm(f"{block}.norm3", width)
        shapes |= {f"{block}.attn1.to_{name}.weight": (width, width) for name in "qkv"}
        shapes |= _linear(f"{block}.attn1.to_out.0", width, width)
        shapes |= _linear(f"{block}.ff.net.0.proj", width, 4 * width) | _linear(f"{block}.ff.net.2", 4 * width, width)
    pool = _resampler({**config, "feature_dim": width, "depth": 1})
    return shapes | {f"pool.{name}": shape for name, shape in pool.items()}


def _ours(config: Mapping[str, Any]) -> _Shapes:
    """Of projectors that nobody has published for an IP-Adapter: as we build them."""
    with torch.device("meta"):
        return {name: value.shape for name, value in projectors.build(dict(config)).state_dict().items()}


_PROJECTORS = {
    "linear": _linear_projector,
    "mlp": _mlp_projector,
    "resampler": _resampler,
    "video": _video,
    "concat": _ours,
    "cross_attention": _ours,
    "merger": _ours,
    "qformer": _ours,
    "instruct_qformer": _ours,
}
