"""ControlNet: a trainable copy of the encoder behind zero convolutions (Zhang et al., arXiv 2302.05543).

Equation 2 of the paper, for each block: y = F(x; Θ) + Z(F(x + Z(c; Θz1); Θc); Θz2). The copy's F(·; Θc) lives here;
the frozen F(·; Θ) is the UNet's own block, and the sum happens in the UNet, which takes the Z(…; Θz2) as *residuals*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from itertools import pairwise
from typing import Any, Literal, Self, cast, get_args

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from mahlstick.adapters.base import (
    Adapter,
    Attachment,
    Clock,
    Excerpt,
    Timestep,
    Window,
    area_mask,
    number,
    spread,
    unwrap,
)
from mahlstick.errors import MahlstickError

Mode = Literal["balanced", "prompt", "control", "guess"]

# The pictures at (height, width) in pixels, as (n, channels, height, width) in [0, 1]; of an excerpt, its own.
Picture = Callable[[int, int, Excerpt | None], Tensor]

_ENCODER = (
    "conv_in",
    "time_embedding",
    "add_embedding",
    "class_embedding",
    "encoder_hid_proj",
    "down_blocks",
    "mid_block",
)


class HintEncoder(nn.Module):
    """The control picture brought to the latents' size and the UNet's width.

    Convolutions 3x3 with SiLU: for every step in ``channels`` one that keeps the size and one of stride 2; the last
    one is zero (section 3.2 of the paper). ``(n, conditioning_channels, f·h, f·w)`` to ``(n, width, h, w)`` with
    f = 2^(len(channels) - 1).
    """

    def __init__(self, width: int, conditioning_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(conditioning_channels, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in pairwise(channels):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        self.conv_out = zero(nn.Conv2d(channels[-1], width, 3, padding=1))
        self.factor = 2 ** (len(channels) - 1)

    def forward(self, image: Tensor) -> Tensor:
        hidden = F.silu(self.conv_in(image))
        for block in self.blocks:
            hidden = F.silu(block(hidden))
        return cast(Tensor, self.conv_out(hidden))


def zero(module: nn.Conv2d) -> nn.Conv2d:
    """A zero convolution: weight and bias 0, so that a fresh copy adds nothing."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class ControlNet(Adapter):
    """A copy of a UNet's encoder that turns a control picture into residuals.

    Parameter names and config fields are those of diffusers' ``ControlNetModel``.
    """

    kind = "controlnet"
    conv_in: nn.Conv2d
    time_proj: nn.Module
    time_embedding: nn.Module
    add_time_proj: nn.Module
    add_embedding: nn.Module
    class_embedding: nn.Module | None
    encoder_hid_proj: nn.Module | None
    down_blocks: nn.ModuleList
    mid_block: nn.Module | None

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from diffusers.configuration_utils import FrozenDict

        # JSON has lists where Python has tuples.
        self.config = FrozenDict({name: tuple(v) if isinstance(v, list) else v for name, v in config.items()})
        with torch.device("meta"):  # only the structure of the encoder is wanted
            unet = UNet2DConditionModel.from_config(_encoder_config(config))
        self.time_proj = unet.time_proj
        if hasattr(unet, "add_time_proj"):
            self.add_time_proj = unet.add_time_proj
        for name in _ENCODER:
            setattr(self, name, getattr(unet, name, None))
        channels = _residual_channels(self.down_blocks, unet.conv_in.out_channels)
        mid = config["block_out_channels"][-1]
        self.controlnet_cond_embedding = HintEncoder(
            unet.conv_in.out_channels,
            config.get("conditioning_channels", 3),
            config.get("conditioning_embedding_out_channels") or (16, 32, 96, 256),
        )
        self.controlnet_down_blocks = nn.ModuleList(zero(nn.Conv2d(c, c, 1)) for c in channels)
        self.controlnet_mid_block = zero(nn.Conv2d(mid, mid, 1))
        if torch.get_default_device().type != "meta":
            _materialise(self, torch.get_default_device(), torch.get_default_dtype())

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build from config fields with fresh weights (those of the encoder random, the zero convolutions zero)."""
        return cls(config)

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        conditioning_channels: int = 3,
        conditioning_embedding_out_channels: Sequence[int] = (16, 32, 96, 256),
    ) -> Self:
        """A fresh copy of ``unet``'s encoder behind zero convolutions: attached as it is, it changes nothing.

        ``conditioning_embedding_out_channels`` has one step of stride 2 for each halving that the VAE does. Of an
        inpainting or editing UNet's wider input the copy sees the latents, which come first.
        """
        unet = cast(UNet2DConditionModel, unwrap(unet))
        config = {
            **{name: value for name, value in unet.config.items() if name in _controlnet_fields()},
            "in_channels": unet.config.out_channels,
            "conditioning_channels": conditioning_channels,
            "conditioning_embedding_out_channels": tuple(conditioning_embedding_out_channels),
            "controlnet_conditioning_channel_order": "rgb",
            "global_pool_conditions": False,
        }
        with torch.device("meta"):
            net = cls(config)
        source = unet.state_dict()
        copied = [name for name in net.state_dict() if not name.startswith("controlnet_")]
        if any(name not in source or source[name].is_meta for name in copied):
            raise MahlstickError(
                "the UNet's own weights are not in their places: unload its LoRA and switch offload off before "
                "from_unet."
            )
        state = {name: source[name].detach().clone() for name in copied}
        state["conv_in.weight"] = state["conv_in.weight"][:, : unet.config.out_channels].clone()
        net.load_state_dict(state, strict=False, assign=True)
        _materialise(net, unet.device, unet.dtype)
        return net.eval().requires_grad_(True)

    def encode_hint(self, image: Tensor) -> Tensor:
        """Control pictures ``(n, conditioning_channels, f·h, f·w)`` in [0, 1] as features ``(n, width, h, w)``."""
        if self.config.get("controlnet_conditioning_channel_order", "rgb") == "bgr":
            image = image.flip(1)
        weight = self.controlnet_cond_embedding.conv_in.weight
        if image.ndim != 4 or image.shape[1] != weight.shape[1]:
            raise MahlstickError(
                f"this ControlNet takes control pictures (n, {weight.shape[1]}, H, W); got {tuple(image.shape)}."
            )
        return cast(Tensor, self.controlnet_cond_embedding(image.to(weight.device, weight.dtype)))

    @property
    def hint_factor(self) -> int:
        """Pixels of the control picture for one latent, along one side."""
        return self.controlnet_cond_embedding.factor

    def forward(
        self,
        sample: Tensor,
        timestep: Timestep,
        encoder_hidden_states: Tensor,
        image: Tensor | None = None,
        *,
        hint: Tensor | None = None,
        class_labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Residuals for the UNet's skip connections, in the order of the network, and for its middle block.

        ``sample`` is ``(batch, 4, h, w)``, ``encoder_hidden_states`` ``(batch, length, cross_attention_dim)``; give
        the control picture as ``image`` ``(batch, 3, f·h, f·w)`` in [0, 1] or, already encoded by
        :meth:`encode_hint`, as ``hint``. The other arguments are those of diffusers' UNet.
        """
        if hint is None:
            if image is None:
                raise MahlstickError("ControlNet.forward needs the control picture: give image= or hint=.")
            hint = self.encode_hint(image)
        arguments = {
            "class_labels": class_labels,
            "attention_mask": attention_mask,
            "encoder_attention_mask": encoder_attention_mask,
            "added_cond_kwargs": added_cond_kwargs or {},
        }
        down, mid = self.residuals(sample, timestep, encoder_hidden_states, hint, **arguments)
        if self.config.get("global_pool_conditions"):
            return [residual.mean((2, 3), keepdim=True) for residual in down], mid.mean((2, 3), keepdim=True)
        return down, mid

    def residuals(
        self, sample: Tensor, timestep: Timestep, text: Tensor, hint: Tensor, **arguments: Any
    ) -> tuple[list[Tensor], Tensor]:
        """As :meth:`forward` with ``hint``, before global pooling."""
        emb = self._time_embedding(sample, timestep, text, arguments)
        context = {
            "encoder_hidden_states": self._text(text),
            "attention_mask": _bias(arguments["attention_mask"], sample.dtype),
            "encoder_attention_mask": _bias(arguments["encoder_attention_mask"], sample.dtype),
        }
        hidden = self.conv_in(sample) + hint
        skips = [hidden]
        for block in self.down_blocks:
            hidden, outputs = block(hidden, emb, **(context if getattr(block, "has_cross_attention", False) else {}))
            skips.extend(outputs)
        if self.mid_block is not None:
            crosses = getattr(self.mid_block, "has_cross_attention", False)
            hidden = self.mid_block(hidden, emb, **(context if crosses else {}))
        down = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return down, self.controlnet_mid_block(hidden)

    def _text(self, text: Tensor) -> Tensor:
        return text if self.encoder_hid_proj is None else cast(Tensor, self.encoder_hid_proj(text))

    def _time_embedding(self, sample: Tensor, timestep: Timestep, text: Tensor, arguments: dict[str, Any]) -> Tensor:
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])
        emb = self.time_embedding(self.time_proj(t).to(sample.dtype))
        if self.class_embedding is not None:
            labels = arguments["class_labels"]
            if labels is None:
                raise MahlstickError("this ControlNet is class-conditioned: give class_labels=.")
            if self.config.get("class_embed_type") == "timestep":
                labels = self.time_proj(labels).to(sample.dtype)
            emb = emb + self.class_embedding(labels).to(sample.dtype)
        if self.config.get("addition_embed_type") == "text":
            emb = emb + self.add_embedding(text)
        elif self.config.get("addition_embed_type") == "text_time":
            pooled, time_ids = _sdxl_conditions(arguments["added_cond_kwargs"])
            sizes = self.add_time_proj(time_ids.flatten()).reshape(pooled.shape[0], -1)
            emb = emb + self.add_embedding(torch.cat([pooled, sizes], dim=-1).to(emb.dtype))
        return cast(Tensor, emb)

    def attach(
        self,
        unet: UNet2DConditionModel,
        image: Tensor | Picture,
        *,
        scale: float | Sequence[float] = 1.0,
        mask: Tensor | None = None,
        mode: Mode = "balanced",
        window: Window | None = None,
        clock: Clock | None = None,
    ) -> ControlAttachment:
        """Clip the net on ``unet`` with a control picture ``(n, 3, H, W)`` in [0, 1], or a function of the size.

        ``scale`` is a number or one for each residual in the order of the network, the middle block last; ``mask``
        ``(n, 1, H, W)`` is 1 where the net acts.
        """
        return ControlAttachment(self, unet, image, scale, mask, mode, window, clock).fasten()


class ControlAttachment(Attachment):
    """A ControlNet clipped on a UNet: adds its residuals to every call inside its window."""

    adapter: ControlNet

    def __init__(
        self,
        net: ControlNet,
        unet: UNet2DConditionModel,
        image: Tensor | Picture,
        scale: float | Sequence[float] = 1.0,
        mask: Tensor | None = None,
        mode: Mode = "balanced",
        window: Window | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(net, unet, window, clock)
        self.image = image
        self.mask = mask
        # A net whose residuals are pooled over the picture acts on the conditional half alone, in every front end.
        self.conditional_only = mode in ("control", "guess") or bool(net.config.get("global_pool_conditions"))
        self.gains = gains(
            scale, mode, len(net.controlnet_down_blocks) + 1, bool(net.config.get("global_pool_conditions"))
        )
        self._hint: tuple[Any, Tensor] | None = None
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    @property
    def acts(self) -> bool:
        return any(self.gains)

    def _forget(self) -> None:
        self._hint = None
        self._masks.clear()

    def _contribute(self, arguments: dict[str, Any], parts: tuple[str, ...] | None, acts: bool) -> dict[str, Any]:
        rows = _conditional_rows(arguments["sample"].shape[0], parts) if self.conditional_only else None
        if not acts or rows == []:
            return {}
        down, mid = self._residuals(arguments, parts, rows)
        present = arguments.get("down_block_additional_residuals")
        if present is not None:
            down = [a + b for a, b in zip(present, down, strict=True)]
        if arguments.get("mid_block_additional_residual") is not None:
            mid = arguments["mid_block_additional_residual"] + mid
        return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}

    def _residuals(
        self, arguments: dict[str, Any], parts: tuple[str, ...] | None, rows: list[int] | None
    ) -> tuple[list[Tensor], Tensor]:
        sample = arguments["sample"]
        batch, dtype = sample.shape[0], sample.dtype
        hint = self._rows(self._encoded_hint(*sample.shape[-2:]), batch, parts)
        net = self.adapter
        call = {name: _take(arguments.get(name), rows, batch, net.dtype) for name in _CALL}
        call["added_cond_kwargs"] = {
            name: _take(value, rows, batch, net.dtype)
            for name, value in (arguments.get("added_cond_kwargs") or {}).items()
        }
        down, mid = net.residuals(
            call.pop("sample")[:, : net.config["in_channels"]],
            _take(arguments["timestep"], rows, batch, None),
            call.pop("encoder_hidden_states"),
            _take(hint, rows, batch, net.dtype),
            **call,
            **self._more(batch // len(parts or ("all",))),
        )
        dosed = [
            self._dose(residual, gain, rows, batch, parts).to(dtype)
            for residual, gain in zip([*down, mid], self.gains, strict=True)
        ]
        return dosed[:-1], dosed[-1]

    def _rows(self, hint: Tensor, batch: int, parts: tuple[str, ...] | None) -> Tensor:
        """The encoded hint of every row of the batch."""
        return spread(hint, batch, parts)

    def _more(self, pictures: int) -> dict[str, Any]:
        """What else the net wants to know of a call with so many pictures in each part of the batch."""
        return {}

    def _dose(
        self, residual: Tensor, gain: float, rows: list[int] | None, batch: int, parts: tuple[str, ...] | None
    ) -> Tensor:
        size = residual.shape[-2:]
        if self.adapter.config.get("global_pool_conditions"):
            residual = residual.mean((2, 3), keepdim=True)
        if gain != 1.0:
            residual = residual * gain
        if rows is not None:
            residual = residual.new_zeros(batch, *residual.shape[1:]).index_copy(
                0, torch.tensor(rows, device=residual.device), residual
            )
        if self.mask is not None:
            residual = residual * area_mask(self.mask, size, batch, parts, self._masks, self.excerpt).to(residual)
        return residual

    def _encoded_hint(self, height: int, width: int) -> Tensor:
        net = self.adapter
        key = (height, width, net.device, net.dtype)
        # Neither a hint of an earlier graph nor one made under inference_mode can serve a backward pass.
        if self._hint is not None and self._hint[0] == key and not torch.is_grad_enabled():
            return self._hint[1]
        size = height * net.hint_factor, width * net.hint_factor
        image = self.image(*size, self.excerpt) if callable(self.image) else shown(self.image, self.excerpt)
        if tuple(image.shape[-2:]) != size:
            raise MahlstickError(
                f"the control picture is a tensor of shape {tuple(image.shape)}, but pictures of {size[1]}x{size[0]} "
                "are made: "
                f"give (n, {image.shape[1]}, {size[0]}, {size[1]}), or a PIL picture of any size."
            )
        hint = self._encode(image)
        self._hint = None if torch.is_grad_enabled() else (key, hint)
        return hint

    def _encode(self, image: Tensor) -> Tensor:
        return self.adapter.encode_hint(image)


def shown(rows: Tensor, excerpt: Excerpt | None) -> Tensor:
    """Of one row for each picture (or for all of them) those that an excerpt shows."""
    return rows if excerpt is None or rows.shape[0] == 1 else rows[excerpt.of(rows.shape[0])]


# Without timestep_cond: a UNet distilled to take its guidance as an input has it, a ControlNet never does.
_CALL = ("sample", "encoder_hidden_states", "class_labels", "attention_mask", "encoder_attention_mask")


def gains(scale: Any, mode: Mode, count: int, pooled: bool = False) -> list[float]:
    """The factor of each of ``count`` residuals, in the order of the network.

    ``prompt`` and ``control`` weigh residual i of n by 0.825^(n-1-i) (sd-webui-controlnet's soft weights), ``guess``
    by values evenly spaced in the logarithm from 0.1 to 1 (section 3.4 of the first version of the paper; diffusers
    does not apply them to nets with global pooling). Raises ``MahlstickError`` for a wrong number of scales or a
    scale that is no number.
    """
    if mode not in get_args(Mode):
        raise MahlstickError(f"mode must be one of {', '.join(get_args(Mode))}; got {mode!r}.")
    several = isinstance(scale, Iterable) and not isinstance(scale, str)
    scales = [number(s, "scale") for s in (scale if several else [scale] * count)]
    if len(scales) != count:
        raise MahlstickError(
            f"scale has {len(scales)} numbers, but this net has {count} residuals (the middle block last)."
        )
    if mode in ("prompt", "control"):
        return [s * 0.825 ** (count - 1 - i) for i, s in enumerate(scales)]
    if mode == "guess" and not pooled:
        return [s * float(g) for s, g in zip(scales, torch.logspace(-1, 0, count), strict=True)]
    return scales


def _conditional_rows(batch: int, parts: tuple[str, ...] | None) -> list[int] | None:
    """The rows of the batch that are not the unconditional part; None for all of them."""
    if parts is None or "uncond" not in parts:
        return None
    size = batch // len(parts)
    return [row for row in range(batch) if parts[row // size] != "uncond"]


def _take(value: Any, rows: list[int] | None, batch: int, dtype: torch.dtype | None) -> Any:
    """The given rows of a batched tensor, in the net's floating dtype."""
    if not isinstance(value, Tensor):
        return value
    if rows is not None and value.ndim > 0 and value.shape[0] == batch:
        value = value[rows]
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask of 1 (attend) and 0 as an additive bias, as diffusers' UNet takes it."""
    if mask is None:
        return None
    return ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


def _sdxl_conditions(added: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    try:
        return added["text_embeds"], added["time_ids"]
    except KeyError as missing:
        raise MahlstickError(
            f"an SDXL ControlNet needs {missing} in added_cond_kwargs, as the SDXL UNet does."
        ) from None


def _residual_channels(down_blocks: Iterable[Any], first: int) -> list[int]:
    """Widths of the skip connections: the input convolution's, each layer's, each downsampler's."""
    channels = [first]
    for block in down_blocks:
        channels += [resnet.out_channels for resnet in block.resnets]
        channels += [downsampler.out_channels for downsampler in block.downsamplers or []]
    return channels


def _materialise(net: ControlNet, device: torch.device, dtype: torch.dtype) -> None:
    """Give storage and fresh values to the parameters that are still on the meta device."""
    for module in net.modules():
        fresh = {name: p for name, p in module.named_parameters(recurse=False) if p.is_meta}
        for name, parameter in fresh.items():
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device, dtype=dtype)))
        if fresh and hasattr(module, "reset_parameters"):
            cast(nn.Linear, module).reset_parameters()
    for conv in [net.controlnet_cond_embedding.conv_out, *net.controlnet_down_blocks, net.controlnet_mid_block]:
        zero(conv)


def _controlnet_fields() -> set[str]:
    from diffusers import ControlNetModel

    return set(signature(ControlNetModel.__init__).parameters) - {"self"}


def _encoder_config(config: dict[str, Any]) -> dict[str, Any]:
    """A UNet config whose encoder is the one wanted; its decoder stays on the meta device and is thrown away."""
    fields = set(signature(UNet2DConditionModel.__init__).parameters) - {"self"}
    encoder = {name: value for name, value in config.items() if name in fields}
    # The UNet knows the number of heads only by the name that diffusers once gave it by mistake.
    heads = encoder.pop("num_attention_heads", None) or config.get("attention_head_dim", 8)
    ups = ("UpBlock2D",) * len(config["block_out_channels"])
    return {**encoder, "attention_head_dim": heads, "up_block_types": ups}
