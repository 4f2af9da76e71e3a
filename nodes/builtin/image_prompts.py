"""Pictures as prompts: ComfyUI's CLIP vision, and the IP-Adapter nodes of ComfyUI_IPAdapter_plus.

The pack's doses are exact: weights that differ from layer to layer, and its ways to scale keys and values. Masks are
resampled bicubically, as in diffusers and in the rest of the suite, where the pack does so bilinearly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mahlstick.adapters.base import Clock, Window
from mahlstick.adapters.image_encoder import pooled
from mahlstick.adapters.ip_adapter import ImageAttachment, cross_attentions
from mahlstick.adapters.ip_adapter import IPAdapter as Adapter
from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders
from mahlstick.nodes.builtin.loaders import EMBEDDED, clip_vision, current, embedded_vision
from mahlstick.nodes.resample import from_picture, to_picture
from mahlstick.nodes.schema import Socket, Widget, node
from mahlstick.nodes.values import ClipVision, ClipVisionT, EmbedsT, ImageT, MaskT, Model, ModelT
from mahlstick.pipelines.load import adapter_path, embedded_adapters
from mahlstick.pipelines.units import Unit, as_mask

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
_SIDE = 224  # of pictures that are prepared for CLIP

_LIGHT, _STANDARD, _VIT_G = "LIGHT - SD1.5 only (low strength)", "STANDARD (medium strength)", "VIT-G (medium strength)"
_PLUS, _PLUS_FACE = "PLUS (high strength)", "PLUS FACE (portraits)"
_FULL_FACE = "FULL FACE - SD1.5 only (portraits stronger)"
# How the published files of each preset are named, for Stable Diffusion 1.5 and for XL.
_FILES: dict[str, tuple[str, str | None]] = {
    _LIGHT: (r"sd15.light(.v11)?", None),
    _STANDARD: (r"ip.adapter.sd15", r"ip.adapter.sdxl.vit.h"),
    _VIT_G: (r"sd15.vit.g", r"ip.adapter.sdxl"),
    _PLUS: (r"ip.adapter.plus.sd15", r"plus.sdxl.vit.h"),
    _PLUS_FACE: (r"plus.face.sd15", r"plus.face.sdxl.vit.h"),
    _FULL_FACE: (r"full.face.sd15", None),
}
_VISION_H = r"(ViT.H.14.*s32B.b79K|ipadapter.*sd15|sd1.?5.*model)"
_VISION_G = r"(ViT.bigG.14.*39B.b160k|ipadapter.*sdxl|sdxl.*model)"
_ENDING = r"(\.safetensors|\.bin)?$"

# The share of the weight that a type gives to the transformers of style, of layout, and to the rest.
_ROLES: dict[str, tuple[float, float, float]] = {
    "style transfer": (1, 0, 0),
    "composition": (0, 1, 0),
    "strong style transfer": (1, 0, 1),
    "style and composition": (1, 1, 0),
    "style transfer precise": (1, 1, 0),
    "composition precise": (1, 1, 0.1),
}
# By the number of transformers, in the order in which they run: those of layout with their shares, and those of style.
_STYLE_AND_LAYOUT: dict[int, tuple[dict[int, float], set[int]]] = {
    16: ({4: 0.25, 5: 1.0}, {0, 1, 2, 3, *range(9, 16)}),  # Stable Diffusion 1 and 2
    11: ({3: 1.0}, {6}),  # XL
}
# From 0 to 1 along the transformers.
_RAMPS: dict[str, Callable[[float], float]] = {
    "ease in": lambda place: 1 - place,
    "ease out": lambda place: place,
    "ease in-out": lambda place: 1 - abs(2 * place - 1),
    "reverse in-out": lambda place: abs(2 * place - 1),
}
_WEAK = 0.2
_WEAKENED = {
    "weak input": ("down_blocks",),
    "weak output": ("up_blocks",),
    "weak middle": ("mid_block",),
    "strong middle": ("down_blocks", "up_blocks"),
}
_WEIGHT_TYPES = (
    "linear", "ease in", "ease out", "ease in-out", "reverse in-out", "weak input", "weak output", "weak middle",
    "strong middle", "style transfer", "composition", "strong style transfer", "style and composition",
    "style transfer precise", "composition precise",
)  # fmt: skip
_SIMPLE_TYPES = {"standard": "linear", "prompt is more important": "ease out", "style transfer": "style transfer"}
_COMBINATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "concat": lambda rows: rows,
    "add": lambda rows: rows.sum(0, keepdim=True),
    "subtract": lambda rows: rows[:1] - rows[1:].mean(0, keepdim=True),
    "average": lambda rows: rows.mean(0, keepdim=True),
    "norm average": lambda rows: (rows / rows.norm(dim=0, keepdim=True)).mean(0, keepdim=True),
    "max": lambda rows: rows.amax(0, keepdim=True),
    "min": lambda rows: rows.amin(0, keepdim=True),
}


@dataclass(frozen=True)
class Seen:
    """What an image encoder makes of pictures: ComfyUI's CLIP_VISION_OUTPUT.

    ``image_embeds`` is ``(n, dim)``, the hidden states of the last layer and of the one before are
    ``(n, length, width)``.
    """

    last_hidden_state: Tensor
    image_embeds: Tensor
    penultimate_hidden_states: Tensor


@dataclass(frozen=True)
class Loaded:
    """An IP-Adapter, and the image encoder that belongs to it where a loader found that."""

    adapter: Adapter
    vision: ClipVision | None = None


@dataclass(eq=False)
class Doses(Unit):
    """An IP-Adapter with the features of pictures, dosed as the pack does.

    ``features`` and ``negative`` are an image encoder's output, ``(n, …)`` each; every picture sees all n.
    ``weights``: of each transformer by its name in the UNet; others stay as they are. ``scaling``: one of the pack's.
    ``swapped``: the unconditional half sees the pictures, and the conditional half nothing.
    """

    adapter: Adapter
    features: Tensor
    negative: Tensor
    weights: Mapping[str, float]
    start: float
    end: float
    mask: Tensor | None
    scaling: str
    swapped: bool

    @torch.no_grad()
    def prepare(self, unet: Any, clock: Clock, pipe: Any) -> ImageAttachment:
        adapter, blocks = self.adapter, self.weights
        if self.scaling != "V only":
            adapter, blocks = self._scaled(unet), dict.fromkeys(self.weights, 1.0)
        window = Window(self.start, self.end, "noise")
        attachment = ImageAttachment(
            adapter, unet, torch.empty(0), None, 1.0, as_mask(self.mask), blocks, window, clock
        )
        adapter.widen(unet.dtype)
        tokens, negative = (adapter.tokens(each).flatten(0, 1)[None] for each in (self.features, self.negative))
        attachment.use(*((torch.zeros_like(tokens), tokens) if self.swapped else (tokens, negative)))
        return attachment

    def _scaled(self, unet: Any) -> Adapter:
        """The adapter, its weights shared, with keys and values scaled by each layer's weight."""
        with torch.device("meta"):
            scaled = Adapter.from_config(self.adapter.config).eval()
        scaled.image_proj = self.adapter.image_proj
        layers = zip(sorted(self.adapter.ip_adapter, key=int), cross_attentions(unet), strict=True)
        scaled.ip_adapter = nn.ModuleDict(
            {
                index: _ScaledPair(self.adapter.ip_adapter[index], self.scaling, self.weights.get(_of(name), 1.0))
                for index, (name, _) in layers
            }
        )
        return scaled


class _ScaledPair(nn.Module):
    """W′k and W′v of a layer, whose keys and values are scaled by ``weight``."""

    def __init__(self, pair: Any, scaling: str, weight: float) -> None:
        super().__init__()
        if scaling.endswith("w/ C penalty"):
            weight *= pair.to_k_ip.out_features / 1280
        self.to_k_ip = _Scaled(pair.to_k_ip, weight, of_mean=False)
        self.to_v_ip = _Scaled(pair.to_v_ip, weight, of_mean=scaling.startswith("K+mean(V)"))


class _Scaled(nn.Module):
    """A linear layer whose output is scaled, or only that output's mean over the tokens."""

    def __init__(self, linear: nn.Linear, factor: float, of_mean: bool) -> None:
        super().__init__()
        self.linear, self.factor, self.of_mean = linear, factor, of_mean

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.linear(tokens)
        if not self.of_mean:
            return output * self.factor
        return output + output.mean(1, keepdim=True) * (self.factor - 1)


def see(vision: ClipVision, image: Tensor, crop: bool = True, mask: Tensor | None = None) -> Seen:
    """What the encoder sees in an IMAGE; ``mask`` ``(n, H, W)`` is 1 where it may look. On the CPU, in float32."""
    encoder, side = vision.encoder, vision.encoder.config.image_size
    pixels = _prepared(vision, image, side, crop)
    if mask is not None:
        pixels = pixels * _square(mask, side)[:, None]
    with torch.no_grad():
        found = encoder(pixels.to(encoder.device, encoder.dtype), output_hidden_states=True)
    states = (found.last_hidden_state, pooled(found), found.hidden_states[-2])
    return Seen(*(each.float().cpu() for each in states))


def _prepared(vision: ClipVision, image: Tensor, side: int, crop: bool) -> Tensor:
    """Pictures as CLIP takes them: the shorter side scaled, the middle cut out, 8 bits, mean and deviation removed."""
    pixels = image[..., :3].movedim(-1, 1).float()
    height, width = pixels.shape[-2:]
    if (height, width) != (side, side):
        scale = side / min(height, width)
        size = (round(scale * height), round(scale * width)) if crop else (side, side)
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        pixels = pixels[..., top : top + side, left : left + side]
    pixels = (255 * pixels).clamp(0, 255).round() / 255
    mean = torch.tensor(getattr(vision.processor, "image_mean", None) or _MEAN)
    std = torch.tensor(getattr(vision.processor, "image_std", None) or _STD)
    return (pixels - mean[:, None, None].to(pixels)) / std[:, None, None].to(pixels)


def _square(mask: Tensor, side: int) -> Tensor:
    """The middle of a mask at ``side`` x ``side``."""
    shorter = min(mask.shape[-2:])
    top, left = (round((length - shorter) / 2) for length in mask.shape[-2:])
    middle = mask[:, None, top : top + shorter, left : left + shorter]
    return (
        middle[:, 0] if shorter == side else F.interpolate(middle, (side, side), mode="bicubic", antialias=True)[:, 0]
    )


def _features(loaded: Loaded, vision: ClipVision, image: Tensor, mask: Tensor | None = None) -> Tensor:
    seen = see(vision, image, mask=mask)
    return seen.image_embeds if loaded.adapter.image_proj.pooled else seen.penultimate_hidden_states


def _nothing(loaded: Loaded, vision: ClipVision, like: Tensor) -> Tensor:
    """What stands for no picture: zeros, or the features of a black one."""
    if loaded.adapter.image_proj.pooled:
        return torch.zeros_like(like)
    side = vision.encoder.config.image_size
    return _features(loaded, vision, torch.zeros(1, side, side, 3))


def _vision_of(loaded: Loaded, given: ClipVision | None) -> ClipVision:
    vision = given or loaded.vision
    if vision is None:
        raise MahlstickError(
            "this IP-Adapter has no image encoder: connect clip_vision, or use IPAdapterUnifiedLoader."
        )
    return vision


def _applied(
    model: Model,
    loaded: Loaded,
    features: Tensor,
    negative: Tensor,
    weight: float,
    weight_type: str,
    start_at: float,
    end_at: float,
    embeds_scaling: str,
    attn_mask: Tensor | None,
) -> Model:
    """The model with the units that dose the features so; itself where they would never act."""
    if start_at >= end_at:
        return model
    plain, swapped = _weights(_transformers(model.unet), weight_type, weight)
    rest = (start_at, end_at, attn_mask, embeds_scaling)
    doses = [(weights, place) for place, weights in ((False, plain), (True, swapped)) if weights]
    return model.with_units(*(Doses(loaded.adapter, features, negative, each, *rest, place) for each, place in doses))


def _transformers(unet: Any) -> list[str]:
    """The names of the UNet's transformers in the order in which they run."""
    order = ("down_blocks", "mid_block", "up_blocks")
    names = dict.fromkeys(_of(name) for name, _ in cross_attentions(unet))
    return sorted(names, key=lambda name: order.index(name.split(".")[0]))


def _of(layer: str) -> str:
    return layer.partition(".transformer_blocks")[0]


def _weights(transformers: Sequence[str], weight_type: str, weight: float) -> tuple[dict[str, float], dict[str, float]]:
    """The weight of each transformer that has one; in the second those whose two halves are swapped."""
    count = len(transformers)
    if weight_type not in _ROLES:
        weights = [weight * _share(weight_type, name, place / count) for place, name in enumerate(transformers)]
        return _nonzero(transformers, weights), {}
    if count not in _STYLE_AND_LAYOUT:
        raise MahlstickError(
            f"weight_type {weight_type!r} is known for Stable Diffusion 1, 2 and XL, and this UNet is of another "
            "shape: use linear."
        )
    layout, style = _STYLE_AND_LAYOUT[count]
    for_style, for_layout, for_rest = (weight * share for share in _ROLES[weight_type])
    if weight_type == "style and composition":
        for_layout = 1.0  # the pack has a second weight for it, which its general nodes leave at 1
    weights = [
        for_layout * layout[place] if place in layout else for_style if place in style else for_rest
        for place in range(count)
    ]
    found = _nonzero(transformers, weights)
    of_layout = {transformers[place] for place in layout}
    swapped = {
        "style transfer precise": of_layout,
        "composition precise": set(transformers) - of_layout,
    }.get(weight_type, set())
    plain = {name: each for name, each in found.items() if name not in swapped}
    return plain, {name: each for name, each in found.items() if name in swapped}


def _share(weight_type: str, name: str, place: float) -> float:
    if weight_type in _RAMPS:
        return 0.05 + 0.95 * _RAMPS[weight_type](place)
    return _WEAK if name.startswith(_WEAKENED.get(weight_type, ())) else 1.0


def _nonzero(names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    return {name: weight for name, weight in zip(names, weights, strict=True) if weight}


def _as_many(rows: Tensor, count: int) -> Tensor:
    """``count`` rows: cut, or the last one repeated."""
    return rows[torch.arange(count).clamp(max=len(rows) - 1)]


def _adapter_names() -> list[str]:
    embedded = [f"{EMBEDDED}:{name}" for name in _embedded_names()]
    return [*folders.listed("ipadapter"), *embedded]


def _embedded_names() -> list[str]:
    return [name for name in embedded_adapters() if name.startswith("ip-adapter")]


def _load(name: str) -> Loaded:
    is_embedded = name.startswith(f"{EMBEDDED}:")
    path = adapter_path(name) if is_embedded else str(folders.find("ipadapter", name))
    adapter = current().loader.adapter(path)
    if not isinstance(adapter, Adapter):
        raise MahlstickError(f"{path}: holds a {adapter.kind}, not an IP-Adapter; choose another file.")
    return Loaded(adapter, embedded_vision() if is_embedded else None)


def _stamp(ipadapter_file: str | None) -> str | None:
    if ipadapter_file is None or ipadapter_file.startswith(f"{EMBEDDED}:"):
        return ipadapter_file
    return folders.stamp(folders.find("ipadapter", ipadapter_file))


def _listing(preset: str | None) -> tuple[str, ...] | None:
    """What the choice of a preset's files depends on."""
    if preset in (None, EMBEDDED):
        return None
    found = [folders.find(kind, name) for kind in ("ipadapter", "clip_vision") for name in folders.listed(kind)]
    return tuple(f"{path}:{folders.stamp(path)}" for path in found)


def _chosen(kind: str, pattern: str, preset: str) -> str:
    found = [name for name in folders.listed(kind) if re.search(pattern + _ENDING, name, re.IGNORECASE)]
    if not found:
        folder = folders.current().models / kind
        raise MahlstickError(f"preset {preset!r}: no fitting file below {folder}; put the published one there.")
    return found[-1]


LoadedT = Annotated[Loaded, Socket("IPADAPTER")]
Weight = Annotated[float, Widget(min=-1.0, max=3.0, step=0.05)]
StrongWeight = Annotated[float, Widget(min=-1.0, max=5.0, step=0.05)]
Percent = Annotated[float, Widget(min=0.0, max=1.0, step=0.001)]
WeightType = Annotated[str, Widget(choices=_WEIGHT_TYPES)]
Scaling = Literal["V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"]


@node("conditioning", display_name="CLIP Vision Encode")
def CLIPVisionEncode(
    *, clip_vision: ClipVisionT, image: ImageT, crop: Literal["center", "none"] = "center"
) -> Annotated[Seen, Socket("CLIP_VISION_OUTPUT")]:
    """What an image encoder sees in pictures: in their middle, or with "none" in all of them, out of shape."""
    return see(clip_vision, image, crop == "center")


@node("ipadapter/loaders", display_name="IPAdapter Model Loader", fingerprint=_stamp)
def IPAdapterModelLoader(*, ipadapter_file: Annotated[str, Widget(choices=_adapter_names)]) -> LoadedT:
    """Load an IP-Adapter. Its image encoder comes separately, except with the embedded one."""
    return _load(ipadapter_file)


@node(
    "ipadapter",
    display_name="IPAdapter Unified Loader",
    outputs=("model", "ipadapter"),
    fingerprint=_listing,
)
def IPAdapterUnifiedLoader(
    *,
    model: ModelT,
    preset: Annotated[str, Widget(choices=(*_FILES, EMBEDDED))],
    ipadapter: LoadedT | None = None,
) -> tuple[ModelT, LoadedT]:
    """Find an IP-Adapter that goes with the model, and its image encoder, by their published names."""
    if preset == EMBEDDED:
        return model, _load(f"{EMBEDDED}:{_embedded_names()[0]}")
    is_xl = model.unet.config.addition_embed_type == "text_time"
    pattern = _FILES[preset][is_xl]
    if pattern is None:
        raise MahlstickError(f"preset {preset!r} is for Stable Diffusion 1.5, and the model is XL; choose another.")
    vision = clip_vision(_chosen("clip_vision", _VISION_G if preset == _VIT_G else _VISION_H, preset))
    return model, Loaded(_load(_chosen("ipadapter", pattern, preset)).adapter, vision)


@node("ipadapter", name="IPAdapter", display_name="IPAdapter")
def IPAdapter(
    *,
    model: ModelT,
    ipadapter: LoadedT,
    image: ImageT,
    weight: Weight = 1.0,
    start_at: Percent = 0.0,
    end_at: Percent = 1.0,
    weight_type: Annotated[str, Widget(choices=tuple(_SIMPLE_TYPES))] = "standard",
    attn_mask: MaskT | None = None,
) -> ModelT:
    """Let a picture guide the model beside the text: its subject and its style."""
    vision = _vision_of(ipadapter, None)
    features = _features(ipadapter, vision, image)
    negative = _as_many(_nothing(ipadapter, vision, features), len(features))
    dose = (weight, _SIMPLE_TYPES[weight_type], start_at, end_at, "V only", attn_mask)
    return _applied(model, ipadapter, features, negative, *dose)


@node("ipadapter", display_name="IPAdapter Advanced")
def IPAdapterAdvanced(
    *,
    model: ModelT,
    ipadapter: LoadedT,
    image: ImageT,
    weight: StrongWeight = 1.0,
    weight_type: WeightType = "linear",
    combine_embeds: Literal["concat", "add", "subtract", "average", "norm average"] = "concat",
    start_at: Percent = 0.0,
    end_at: Percent = 1.0,
    embeds_scaling: Scaling = "V only",
    image_negative: ImageT | None = None,
    attn_mask: MaskT | None = None,
    clip_vision: ClipVisionT | None = None,
) -> ModelT:
    """As IPAdapter, with a say in where and how the pictures act, and how several become one."""
    vision = _vision_of(ipadapter, clip_vision)
    features = _features(ipadapter, vision, image)
    if image_negative is not None:
        negative = _features(ipadapter, vision, image_negative)
    else:
        negative = _nothing(ipadapter, vision, features)
    negative = _as_many(negative, len(features))
    if combine_embeds != "concat" and len(features) > 1:
        features, negative = _COMBINATIONS[combine_embeds](features), negative[:1]
    dose = (weight, weight_type, start_at, end_at, embeds_scaling, attn_mask)
    return _applied(model, ipadapter, features, negative, *dose)


@node("ipadapter/embeds", display_name="IPAdapter Embeds")
def IPAdapterEmbeds(
    *,
    model: ModelT,
    ipadapter: LoadedT,
    pos_embed: EmbedsT,
    weight: Weight = 1.0,
    weight_type: WeightType = "linear",
    start_at: Percent = 0.0,
    end_at: Percent = 1.0,
    embeds_scaling: Scaling = "V only",
    neg_embed: EmbedsT | None = None,
    attn_mask: MaskT | None = None,
    clip_vision: ClipVisionT | None = None,
) -> ModelT:
    """As IPAdapter, with pictures that IPAdapterEncoder has encoded."""
    negative = neg_embed
    if negative is None:
        negative = _nothing(ipadapter, _vision_of(ipadapter, clip_vision), pos_embed)
    dose = (weight, weight_type, start_at, end_at, embeds_scaling, attn_mask)
    return _applied(model, ipadapter, pos_embed, _as_many(negative, len(pos_embed)), *dose)


@node("ipadapter/embeds", display_name="IPAdapter Encoder", outputs=("pos_embed", "neg_embed"))
def IPAdapterEncoder(
    *,
    ipadapter: LoadedT,
    image: ImageT,
    weight: Annotated[float, Widget(min=-1.0, max=3.0, step=0.01)] = 1.0,
    mask: MaskT | None = None,
    clip_vision: ClipVisionT | None = None,
) -> tuple[EmbedsT, EmbedsT]:
    """Encode pictures for IPAdapterEmbeds, and what stands for no picture."""
    vision = _vision_of(ipadapter, clip_vision)
    features = _features(ipadapter, vision, image, mask)
    return features * weight, _nothing(ipadapter, vision, features)


@node("ipadapter/embeds", display_name="IPAdapter Combine Embeds")
def IPAdapterCombineEmbeds(
    *,
    embed1: EmbedsT,
    method: Annotated[str, Widget(choices=tuple(_COMBINATIONS))] = "concat",
    embed2: EmbedsT | None = None,
    embed3: EmbedsT | None = None,
    embed4: EmbedsT | None = None,
    embed5: EmbedsT | None = None,
) -> EmbedsT:
    """Several encoded pictures as one."""
    rows = torch.cat([each for each in (embed1, embed2, embed3, embed4, embed5) if each is not None])
    return _COMBINATIONS[method](rows) if len(rows) > 1 else rows


@node("ipadapter/utils", display_name="Prep Image For ClipVision")
def PrepImageForClipVision(
    *,
    image: ImageT,
    interpolation: Literal["LANCZOS", "BICUBIC", "HAMMING", "BILINEAR", "BOX", "NEAREST"] = "LANCZOS",
    crop_position: Literal["top", "bottom", "left", "right", "center", "pad"] = "top",
    sharpening: Annotated[float, Widget(min=0.0, max=1.0, step=0.05)] = 0.0,
) -> ImageT:
    """Make pictures square and small, as image encoders take them, with a choice of what is cut off."""
    squares = _padded(image) if crop_position == "pad" else _cropped(image, crop_position)
    filtering = Image.Resampling[interpolation]
    made = torch.stack([from_picture(to_picture(each).resize((_SIDE, _SIDE), filtering)) for each in squares])
    return _sharpened(made.movedim(-1, 1), sharpening).movedim(1, -1) if sharpening else made


def _cropped(image: Tensor, position: str) -> Tensor:
    height, width = image.shape[1:3]
    side = min(height, width)
    top = {"top": 0, "bottom": height - side}.get(position, (height - side) // 2)
    left = {"left": 0, "right": width - side}.get(position, (width - side) // 2)
    return image[:, top : top + side, left : left + side]


def _padded(image: Tensor) -> Tensor:
    height, width = image.shape[1:3]
    beside, above = max(0, height - width) // 2, max(0, width - height) // 2
    return F.pad(image, (0, 0, beside, beside, above, above))


def _sharpened(image: Tensor, amount: float) -> Tensor:
    """Contrast-adaptive sharpening (AMD FidelityFX CAS) of ``(n, channels, h, w)`` in [0, 1]."""
    height, width = image.shape[-2:]
    padded = F.pad(image, (1, 1, 1, 1))
    around = [[padded[..., y : y + height, x : x + width] for x in range(3)] for y in range(3)]
    centre, beside = around[1][1], torch.stack([around[0][1], around[1][0], around[1][2], around[2][1]])
    cross = torch.cat([beside, centre[None]])
    corners = torch.stack([around[0][0], around[0][2], around[2][0], around[2][2]])
    lowest = cross.amin(0).clamp(min=0) + corners.amin(0).clamp(min=0)
    highest = cross.amax(0).clamp(max=1) + corners.amax(0).clamp(max=1)
    room = (torch.minimum(lowest, 2 - highest) / highest).sqrt()
    weight = -room * (amount * (1 / 5 - 1 / 8) + 1 / 8)
    return ((beside.sum(0) * weight + centre) / (1 + 4 * weight)).nan_to_num().clamp(0, 1)
