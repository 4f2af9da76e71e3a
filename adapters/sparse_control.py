"""SparseCtrl: a ControlNet for clips of which only a few frames have a control picture (arXiv 2311.16933).

The encoder's copy sees no noise, only the condition (section 3.2): a mask beside it says which frames have one, and
motion modules with one attention each carry it to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Never, cast

import torch
from torch import Tensor, nn

from mahlstick.adapters.base import Clock, Excerpt, Timestep, Window
from mahlstick.adapters.controlnet import ControlAttachment, ControlNet, Mode, Picture, _bias, zero
from mahlstick.adapters.formats.bases import per_level
from mahlstick.adapters.motion import TemporalTransformer
from mahlstick.errors import MahlstickError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class SparseControlNet(ControlNet):
    """A ControlNet with motion modules behind its spatial blocks, whose pictures stand at single frames of a clip.

    Parameter names and config fields are those of diffusers' ``SparseControlNetModel``, and ``norm`` as in a motion
    module's. With ``use_simplified_condition_embedding`` the condition is a picture's latents, scaled as the UNet's.
    """

    kind = "sparse_controlnet"

    def __init__(self, config: dict[str, Any]) -> None:
        in_space = [name.replace("Motion", "2D") for name in config["down_block_types"]]
        masked = bool(config["concat_conditioning_mask"])
        channels = config["conditioning_channels"] + masked
        super().__init__({**config, "down_block_types": in_space, "conditioning_channels": channels})
        said = {"down_block_types": tuple(config["down_block_types"]), "conditioning_channels": channels - masked}
        self.config = type(self.config)({**self.config, **said})
        widths = config["block_out_channels"]
        if self.takes_latents:
            self.controlnet_cond_embedding = cast(Any, zero(nn.Conv2d(channels, widths[0], 3, padding=1)))
        heads = per_level(config["motion_num_attention_heads"], len(widths))
        depths = per_level(config["temporal_transformer_layers_per_block"], len(widths))
        for block, width, head, depth in zip(self.down_blocks, widths, heads, depths, strict=True):
            motion = _motion_config(config, head, depth)
            block.motion_modules = nn.ModuleList(TemporalTransformer(width, motion) for _ in cast(Any, block).resnets)

    @classmethod
    def from_unet(cls, *args: Any, **kwargs: Any) -> Never:
        """Raises: there is no task that would train a fresh one."""
        raise MahlstickError("a SparseCtrl encoder is not made from a UNet: load one with load_adapter.")

    @property
    def takes_latents(self) -> bool:
        """Whether the condition is latents, not pictures."""
        return bool(self.config["use_simplified_condition_embedding"])

    @property
    def hint_factor(self) -> int:
        """Pixels of the condition for one latent, along one side."""
        return 1 if self.takes_latents else super().hint_factor

    def encode_hint(self, image: Tensor, places: Sequence[int] | None = None, frames: int | None = None) -> Tensor:
        """The features of every frame of a clip, ``(frames, width, h, w)``, from the conditions of some.

        ``image``: ``(n, conditioning_channels, f·h, f·w)``, pictures in [0, 1] or latents. ``places``: the frame of
        each, from 0 on, or from the end if negative; left out, ``image`` has a row for every frame.
        """
        return self.encode_given(image)[rows_of(len(image), places, len(image) if frames is None else frames)]

    def encode_given(self, image: Tensor) -> Tensor:
        """The features of n conditions, and last those of a frame without one, ``(n + 1, width, h, w)``."""
        weight = next(self.controlnet_cond_embedding.parameters())
        wanted = self.config["conditioning_channels"]
        if image.ndim != 4 or image.shape[1] != wanted:
            raise MahlstickError(
                f"this SparseCtrl encoder takes {'latents' if self.takes_latents else 'control pictures'} "
                f"(n, {wanted}, H, W); got {tuple(image.shape)}."
            )
        if self.config["controlnet_conditioning_channel_order"] == "bgr":
            image = image.flip(1)
        if self.config["concat_conditioning_mask"]:
            image = torch.cat([image, torch.ones_like(image[:, :1])], dim=1)
        every = torch.cat([image, torch.zeros_like(image[:1])]).to(weight.device, weight.dtype)
        return cast(Tensor, self.controlnet_cond_embedding(every))

    def residuals(
        self,
        sample: Tensor,
        timestep: Timestep,
        text: Tensor,
        hint: Tensor,
        *,
        frames: int | None = None,
        **arguments: Any,
    ) -> tuple[list[Tensor], Tensor]:
        """As a ControlNet's, of a batch of clips that lie one after the other, ``frames`` of each (None: one clip).

        ``hint`` is one for each row, as `encode_hint` gives it. Of ``sample`` only the shape counts.
        """
        frames = sample.shape[0] if frames is None else frames
        if frames > self.config["motion_max_seq_length"]:
            raise MahlstickError(
                f"{frames} frames are more than the {self.config['motion_max_seq_length']} that this SparseCtrl "
                "encoder was trained on: make the clip in windows, Motion(module, context=16)."
            )
        emb = self._time_embedding(sample, timestep, text, arguments)
        context = {
            "encoder_hidden_states": self._text(text),
            "attention_mask": _bias(arguments.get("attention_mask"), sample.dtype),
            "encoder_attention_mask": _bias(arguments.get("encoder_attention_mask"), sample.dtype),
        }
        hidden = self.conv_in(torch.zeros_like(sample)) + hint
        skips = [hidden]
        for block in self.down_blocks:
            skips += self._block(block, skips[-1], emb, context, frames)
        assert self.mid_block is not None
        hidden = self.mid_block(skips[-1], emb, **context)
        down = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return down, self.controlnet_mid_block(hidden)

    def attach(
        self,
        unet: UNet2DConditionModel,
        image: Tensor | Picture,
        places: Sequence[int] | None = None,
        frames: int | None = None,
        *,
        scale: float | Sequence[float] = 1.0,
        mask: Tensor | None = None,
        mode: Mode = "balanced",
        window: Window | None = None,
        clock: Clock | None = None,
    ) -> SparseAttachment:
        """Clip the encoder on ``unet`` with conditions at some ``places`` of a clip; see `SparseAttachment`."""
        return SparseAttachment(self, unet, image, places, frames, scale, mask, mode, window, clock).fasten()

    def _block(self, block: Any, hidden: Tensor, emb: Tensor, context: dict[str, Any], frames: int) -> list[Tensor]:
        """What each layer of a level gives, and its downsampler."""
        outputs = []
        attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
        for resnet, attention, motion in zip(block.resnets, attentions, block.motion_modules, strict=True):
            hidden = resnet(hidden, emb)
            if attention is not None:
                hidden = attention(hidden, **context, return_dict=False)[0]
            hidden = hidden + motion(hidden, frames, self.config["norm"], "none")
            outputs.append(hidden)
        for downsampler in block.downsamplers or ():
            outputs.append(downsampler(outputs[-1]))
        return outputs


class SparseAttachment(ControlAttachment):
    """A SparseCtrl encoder clipped on a UNet: control pictures at some frames of every clip.

    ``image``: the conditions, in pixels or latents, see `SparseControlNet.encode_hint`; ``places``: their frames.
    ``frames``: of a clip, as for a motion module; None takes each part of the batch for one clip.
    """

    adapter: SparseControlNet

    def __init__(
        self,
        net: SparseControlNet,
        unet: UNet2DConditionModel,
        image: Tensor | Picture,
        places: Sequence[int] | None = None,
        frames: int | None = None,
        scale: float | Sequence[float] = 1.0,
        mask: Tensor | None = None,
        mode: Mode = "balanced",
        window: Window | None = None,
        clock: Clock | None = None,
    ) -> None:
        def given(height: int, width: int, excerpt: Excerpt | None) -> Tensor:
            return image(height, width, None) if callable(image) else image  # all of them, whatever a window shows

        super().__init__(net, unet, given, scale, mask, mode, window, clock)
        self.places, self.frames = places, frames

    def see(self, excerpt: Excerpt | None) -> None:
        self.excerpt = excerpt
        self._masks.clear()  # and not the hint, which holds all conditions

    def _encode(self, image: Tensor) -> Tensor:
        return self.adapter.encode_given(image)

    def _rows(self, hint: Tensor, batch: int, parts: tuple[str, ...] | None) -> Tensor:
        count = len(parts or ("all",))
        whole = self.excerpt.whole if self.excerpt is not None else batch // count
        frames = self._clip(whole)
        rows = rows_of(hint.shape[0] - 1, self.places, frames) * (whole // frames)
        if self.excerpt is not None:
            rows = [rows[picture] for picture in self.excerpt.pictures]
        return hint[rows * count]

    def _more(self, pictures: int) -> dict[str, Any]:
        return {"frames": self.excerpt.length if self.excerpt is not None else self._clip(pictures)}

    def _clip(self, pictures: int) -> int:
        frames = self.frames or pictures
        if pictures % frames:
            raise MahlstickError(f"{pictures} pictures are no clips of {frames} frames: give the length of a clip.")
        return frames


def _motion_config(config: dict[str, Any], heads: int, depth: int) -> dict[str, Any]:
    return {
        "motion_num_attention_heads": heads,
        "motion_norm_num_groups": config["norm_num_groups"],
        "motion_max_seq_length": config["motion_max_seq_length"],
        "motion_transformer_layers_per_block": depth,
        "temporal_double_self_attention": False,
        "positions": "sinusoidal",
    }


def rows_of(given: int, places: Sequence[int] | None, frames: int) -> list[int]:
    """For each frame the row of its condition; ``given`` for those without."""
    places = range(given) if places is None else places
    if len(places) != given:
        raise MahlstickError(f"{given} control pictures cannot stand at {len(places)} frames: give a frame for each.")
    wrong = next((place for place in places if not -frames <= place < frames), None)
    if wrong is not None:
        raise MahlstickError(
            f"frame {wrong} is not in a clip of {frames}: the first is 0, the last {frames - 1} or -1."
        )
    standing = {place % frames: row for row, place in enumerate(places)}
    if len(standing) < given:
        raise MahlstickError(f"two control pictures stand at one frame of {frames} ({', '.join(map(str, places))}).")
    return [standing.get(frame, given) for frame in range(frames)]
