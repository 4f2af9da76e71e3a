"""Motion modules: temporal transformers after a UNet's spatial blocks, with the frames of a clip folded into the batch.

Source: AnimateDiff (arXiv 2307.04725). Each module is
    x + proj_out(blocks(proj_in(norm(x)))),
where the blocks attend along the frames at every place of the picture, and proj_out starts at zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from mahlstick.adapters import formats, motion_lora, positions
from mahlstick.adapters.base import Adapter, Attachment, Clock, Excerpt, Window, area_mask, number, unwrap
from mahlstick.adapters.context import Context, Fuse, Schedule, WindowedCall, step_of
from mahlstick.adapters.formats.bases import per_level
from mahlstick.adapters.positions import Extension, Positions
from mahlstick.adapters.projectors import multihead
from mahlstick.errors import MahlstickError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

Norm = Literal["frame", "clip"]

#: Frames of the clips on which the published modules learned (section 4.1), however long their tables are.
TRAINED = 16

#: Places of a picture that attend at once: kernels of GPUs take at most 65,535 rows, counted with the heads.
_ROWS = 65_535


class TemporalAttention(nn.Module):
    """Self-attention along the frames: ``(rows, frames, width)`` to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, turned: Tensor | None = None) -> Tensor:
        """``turned``: places of the frames, by which queries and keys are rotated."""
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        if turned is not None:
            q, k = (self._turn(part, turned) for part in (q, k))
        rows = _ROWS // self.heads
        parts = zip(q.split(rows), k.split(rows), v.split(rows), strict=True)
        return cast(Tensor, self.to_out[0](torch.cat([multihead(*part, self.heads) for part in parts])))

    def _turn(self, x: Tensor, places: Tensor) -> Tensor:
        split = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return positions.rotate(split, places).transpose(1, 2).flatten(2)


class Table(nn.Module):
    """Positions that are added, ``pe`` (1, frames, width)."""

    def __init__(self, width: int, frames: int, learned: bool) -> None:
        super().__init__()
        pe = positions.sinusoidal(torch.arange(frames), width)[None]
        if learned:
            self.pe = nn.Parameter(pe)
        else:
            self.register_buffer("pe", pe)

    def forward(self, frames: int, extend: Extension) -> Tensor:
        return positions.extend(cast(Tensor, self.pe), frames, extend)


class TemporalBlock(nn.Module):
    """Two attentions along the frames (SparseCtrl has one) and a feed-forward, each behind a normalisation."""

    def __init__(self, width: int, config: dict[str, Any]) -> None:
        from diffusers.models.attention import FeedForward

        super().__init__()
        heads, kind = config["motion_num_attention_heads"], config["positions"]
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = TemporalAttention(width, heads), TemporalAttention(width, heads)
        self.twice: bool = config.get("temporal_double_self_attention", True)
        if not self.twice:
            del self.norm2, self.attn2
        self.ff = FeedForward(width, activation_fn="geglu")
        if kind != "rotary":
            self.pos_embed = Table(width, config["motion_max_seq_length"], kind == "learned")

    def forward(self, x: Tensor, extend: Extension) -> Tensor:
        frames = x.shape[1]
        rotary = not hasattr(self, "pos_embed")
        places = torch.arange(frames, device=x.device) if rotary else None
        table = 0 if rotary else self.pos_embed(frames, extend).to(x)
        x = x + self.attn1(self.norm1(x) + table, places)
        if self.twice:
            x = x + self.attn2(self.norm2(x) + table, places)
        return cast(Tensor, x + self.ff(self.norm3(x)))


class TemporalTransformer(nn.Module):
    """One motion module: pictures ``(clips · frames, width, H, W)`` to what is added to them."""

    def __init__(self, width: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config["motion_norm_num_groups"], width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        blocks = range(config["motion_transformer_layers_per_block"])
        self.transformer_blocks = nn.ModuleList(TemporalBlock(width, config) for _ in blocks)

    def forward(self, x: Tensor, frames: int, norm: Norm, extend: Extension) -> Tensor:
        clips, (height, width) = x.shape[0] // frames, x.shape[-2:]
        clip = x.unflatten(0, (clips, frames))
        normed = self.norm(clip.transpose(1, 2)).transpose(1, 2) if norm == "clip" else self.norm(x).view_as(clip)
        rows = self.proj_in(normed.permute(0, 3, 4, 1, 2).flatten(0, 2))  # (clips · H · W, frames, width)
        for block in self.transformer_blocks:
            rows = block(rows, extend)
        rows = self.proj_out(rows).unflatten(0, (clips, height, width))
        return cast(Tensor, rows.permute(0, 3, 4, 1, 2).flatten(0, 1))


class MotionBlock(nn.Module):
    """The motion modules of one block of the UNet."""

    def __init__(self, width: int, count: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.motion_modules = nn.ModuleList(TemporalTransformer(width, config) for _ in range(count))


class MotionAdapter(Adapter):
    """A motion module for each spatial block of a UNet. Parameter names are those of diffusers' MotionAdapter."""

    kind = "motion_adapter"

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        channels = list(config["block_out_channels"])
        layers = per_level(config["motion_layers_per_block"], len(channels))
        pairs = list(zip(channels, layers, strict=True))
        self.down_blocks = nn.ModuleList(MotionBlock(width, count, config) for width, count in pairs)
        self.up_blocks = nn.ModuleList(MotionBlock(width, count + 1, config) for width, count in reversed(pairs))
        self.mid_block = MotionBlock(channels[-1], 1, config) if config["use_motion_mid_block"] else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build from config fields with fresh weights."""
        return cls(config)

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        max_frames: int = 32,
        *,
        positions: Positions = "sinusoidal",
        heads: int = 8,
        mid_block: bool = True,
        norm: Norm = "clip",
    ) -> Self:
        """Fresh, for ``unet``'s blocks; changes nothing until it has learned.

        ``max_frames``: the longest clip that its positions tell apart; rotary ones have no end. ``norm``: see
        `MotionAttachment`. Raises ``MahlstickError`` for heads that do not divide the UNet's widths.
        """
        unet = cast("UNet2DConditionModel", unwrap(unet))
        if positions not in get_args(Positions):
            raise MahlstickError(f"positions must be one of {', '.join(get_args(Positions))}; got {positions!r}.")
        channels, layers = list(unet.config.block_out_channels), unet.config.layers_per_block
        config = {
            "block_out_channels": channels,
            "motion_layers_per_block": layers if isinstance(layers, int) else list(layers),
            "motion_transformer_layers_per_block": 1,
            "motion_num_attention_heads": heads,
            "motion_norm_num_groups": unet.config.norm_num_groups,
            "motion_max_seq_length": None if positions == "rotary" else max_frames,
            "use_motion_mid_block": mid_block and unet.mid_block is not None,
            "positions": positions,
            "norm": norm,
        }
        formats.check_heads(cls.kind, config)
        adapter = cls(config)
        for module in adapter.modules():
            if isinstance(module, TemporalTransformer):
                nn.init.zeros_(module.proj_out.weight)
                nn.init.zeros_(module.proj_out.bias)
        return adapter.to(unet.device, unet.dtype).eval()

    def with_lora(self, path: str | PathLike[str], scale: float = 1.0) -> Self:
        """A new module with the motion LoRA in ``path`` merged into the weights, see `motion_lora.merged`; this one
        stays as it is."""
        return self._from_state(self.config, motion_lora.merged(self.state_dict(), path, number(scale, "scale")))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises: a motion module acts inside a UNet."""
        raise MahlstickError("a motion module acts inside a UNet: clip it on with attach.")

    def attach(
        self,
        unet: UNet2DConditionModel,
        frames: int | None = None,
        *,
        scale: float = 1.0,
        norm: Norm | None = None,
        extend: Extension = "none",
        context: int | None = None,
        overlap: int | None = None,
        schedule: Schedule = "uniform",
        fuse: Fuse = "pyramid",
        mask: Tensor | None = None,
        window: Window | None = None,
        clock: Clock | None = None,
    ) -> MotionAttachment:
        """Clip the modules on ``unet``; see `MotionAttachment`."""
        return MotionAttachment(
            self, unet, frames, scale, norm, extend, context, overlap, schedule, fuse, mask, window, clock
        ).fasten()


class MotionAttachment(Attachment):
    """A motion module clipped on a UNet: pictures that lie side by side in the batch are the frames of a clip.

    ``frames``: of a clip; None takes each part of the batch for one clip, so give it with several prompts. ``scale``:
    of what is added. ``norm``: each ``frame`` normalised by itself, as the published modules were trained, or over the
    ``clip``, as diffusers computes; left out, what the file's layout says.
    Longer clips than the module's table of positions has places are made in windows of ``context`` frames with
    ``overlap`` (left out, 16 and a quarter of it), see `Context`; or ``extend`` gives it more places, see
    `positions.extend`. Given, ``context`` counts for every longer clip. Rotary positions have no end.
    The text may have fewer rows than there are pictures: one for each prompt.
    ``mask`` ``(n, 1, H, W)``: 1 where frames mix, by area at each layer.
    """

    adapter: MotionAdapter

    def __init__(
        self,
        adapter: MotionAdapter,
        unet: UNet2DConditionModel,
        frames: int | None = None,
        scale: float = 1.0,
        norm: Norm | None = None,
        extend: Extension = "none",
        context: int | None = None,
        overlap: int | None = None,
        schedule: Schedule = "uniform",
        fuse: Fuse = "pyramid",
        mask: Tensor | None = None,
        window: Window | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(adapter, unet, window, clock)
        self.frames, self.scale, self.extend, self.mask = frames, number(scale, "scale"), extend, mask
        self.norm: Norm = norm or adapter.config["norm"]
        if self.norm not in get_args(Norm):
            raise MahlstickError(f"norm must be one of {', '.join(get_args(Norm))}; got {self.norm!r}.")
        if extend not in get_args(Extension):
            raise MahlstickError(f"extend must be one of {', '.join(get_args(Extension))}; got {extend!r}.")
        if extend == "ntk" and adapter.config["positions"] == "learned":
            raise MahlstickError("extend='ntk' is for sinusoidal positions, and these were learned: use 'interpolate'.")
        if frames is not None and (not isinstance(frames, int) or frames < 1):
            raise MahlstickError(f"frames must be a whole number of at least 1; got {frames!r}.")
        self.places: int | None = adapter.config["motion_max_seq_length"] if extend == "none" else None
        self.given, self._told = context is not None, False
        length = context if context is not None else min(TRAINED, self.places or TRAINED)
        if context is not None and self.places is not None and context > self.places:
            raise positions.too_many(context, self.places)
        self.context = Context(length, length // 4 if overlap is None else overlap, schedule, fuse)
        self.active = 0  # frames of a clip in the call under way; 0: the modules rest
        self.parts: tuple[str, ...] | None = None
        self._windows = WindowedCall(self, self.unet, self.clock)
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def _fasten(self) -> None:
        self._handles += self._windows.hooks()
        for place, module in places(self.unet, self.adapter):
            self._handles.append(place.register_forward_hook(self._hook(module)))
        if self.compiled:
            # Dynamo does not guard the hooks of inner modules: compiled code would go on without these.
            torch._dynamo.reset()

    def detach(self) -> None:
        self._windows.reset()
        super().detach()

    def _forget(self) -> None:
        self.active = 0
        self._masks.clear()

    @property
    def acts(self) -> bool:
        return self.scale != 0.0

    def excerpts(self, arguments: dict[str, Any]) -> list[Excerpt] | None:
        """The windows in which this call of the UNet is made; None where it may be made as it is."""
        whole = self._pictures(arguments)
        frames = self._frames(whole)
        windows = [list(range(frames))]
        self._tell(frames)
        if self.windowed(frames):
            windows = self.context.windows(frames, step_of(self.clock, arguments["timestep"]))
        if len(windows) == 1 and arguments["encoder_hidden_states"].shape[0] == arguments["sample"].shape[0]:
            return None
        starts = range(0, whole, frames)
        clips = [tuple(start + frame for start in starts for frame in window) for window in windows]
        return [Excerpt(clip, whole, len(window)) for clip, window in zip(clips, windows, strict=True)]

    def _tell(self, frames: int) -> None:
        """Say once that windows were chosen that nobody asked for."""
        if self.windowed(frames) and not self.given and not self._told:
            self._told = True
            warnings.warn(
                f"{frames} frames are more than the {self.places} that this motion module knows, so they are made in "
                f"windows of {self.context.length} that share {self.context.overlap}; context= and overlap= choose "
                "others",
                stacklevel=2,
            )

    def windowed(self, frames: int) -> bool:
        """Whether a clip of so many frames is made in windows."""
        if self.given:
            return frames > self.context.length
        return self.places is not None and frames > self.places

    def _pictures(self, arguments: dict[str, Any]) -> int:
        return int(arguments["sample"].shape[0]) // len(self.clock.parts or ("cond",))

    def _frames(self, pictures: int) -> int:
        frames = self.frames or pictures
        if pictures % frames:
            raise MahlstickError(
                f"{pictures} pictures are no clips of {frames} frames: ask the pipeline for "
                f"num_images_per_prompt={frames}, or give Motion(frames=…)."
            )
        return frames

    def _contribute(self, arguments: dict[str, Any], parts: tuple[str, ...] | None, acts: bool) -> dict[str, Any]:
        self.active, self.parts = 0, parts
        if not acts:
            return {}
        whole = self.excerpt.whole if self.excerpt is not None else self._pictures(arguments)
        if self.mask is not None and self.mask.shape[0] not in (1, whole):
            raise MahlstickError(f"{self.mask.shape[0]} masks for {whole} pictures: give one, or one for each.")
        self.active = self.excerpt.length if self.excerpt is not None else self._frames(whole)
        return {}

    def _hook(self, module: TemporalTransformer) -> Any:
        def mix(_: nn.Module, args: Any, output: Any) -> Any:
            if not self.active:
                return None
            x = output[0] if isinstance(output, tuple) else output
            more = module(x.to(module.proj_in.weight.dtype), self.active, self.norm, self.extend).to(x)
            if self.mask is not None:
                mask = area_mask(self.mask, more.shape[-2:], more.shape[0], self.parts, self._masks, self.excerpt)
                more = more * mask.to(more)
            mixed = x + self.scale * more
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        return mix


def places(unet: nn.Module, adapter: MotionAdapter) -> Iterator[tuple[nn.Module, TemporalTransformer]]:
    """Each layer of the UNet behind which a motion module stands, with the module: a spatial attention, or a residual
    block where there is none, and in the middle the attention."""
    pairs: list[tuple[Any, Any]] = []
    for name in ("down_blocks", "up_blocks"):
        pairs += zip(cast(Any, getattr(unet, name)), cast(Any, getattr(adapter, name)), strict=True)
    if adapter.mid_block is not None:
        pairs.append((unet.mid_block, adapter.mid_block))
    for block, motion in pairs:
        spatial = getattr(block, "attentions", None) or block.resnets
        yield from zip(spatial, motion.motion_modules, strict=True)
