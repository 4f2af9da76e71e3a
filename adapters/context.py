"""Windows over a clip that is longer than a motion module can see: which frames they hold, and how they are joined.

Every window is a call of the UNet of its own, and where windows overlap, their outputs are averaged, as MultiDiffusion
(arXiv 2302.08113, eq. 5) does in space. Memory is that of one window, however long the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from mahlstick.adapters.base import Attachment, Clock, Excerpt, Timestep, by_position, unet_arguments
from mahlstick.errors import MahlstickError

if TYPE_CHECKING:
    from mahlstick.adapters.motion import MotionAttachment

Schedule = Literal["uniform", "static", "looped"]
Fuse = Literal["pyramid", "flat"]


@dataclass(frozen=True)
class Context:
    """Windows of ``length`` frames, of which ``overlap`` are the next one's too.

    ``uniform``: the borders move from step to step, so that none of them shows. ``static``: they stay. ``looped``: as
    uniform, and the last frames share windows with the first, for clips that are played round and round.
    ``fuse``: where windows overlap, a frame counts more in the middle of one (``pyramid``), or the same (``flat``).
    """

    length: int
    overlap: int
    schedule: Schedule = "uniform"
    fuse: Fuse = "pyramid"

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or self.length < 2:
            raise MahlstickError(f"context must be a whole number of at least 2 frames; got {self.length!r}.")
        if not isinstance(self.overlap, int) or not 0 <= self.overlap < self.length:
            raise MahlstickError(f"overlap must be a whole number from 0 to {self.length - 1}; got {self.overlap!r}.")
        if self.schedule not in get_args(Schedule):
            raise MahlstickError(f"schedule must be one of {', '.join(get_args(Schedule))}; got {self.schedule!r}.")
        if self.fuse not in get_args(Fuse):
            raise MahlstickError(f"fuse must be one of {', '.join(get_args(Fuse))}; got {self.fuse!r}.")

    def windows(self, frames: int, step: int = 0) -> list[list[int]]:
        """The windows of one step over ``frames`` frames; together they hold every frame."""
        if frames <= self.length:
            return [list(range(frames))]
        stride = self.length - self.overlap
        shift = 0 if self.schedule == "static" else int(halving(step) * stride)
        if self.schedule == "looped":
            return [
                [(start + i) % frames for i in range(self.length)] for start in range(shift, shift + frames, stride)
            ]
        last = frames - self.length
        inside = sorted({min(max(start, 0), last) for start in range(-shift, frames - self.overlap, stride)})
        return [list(range(start, start + self.length)) for start in inside]

    def borders(self, frames: int) -> list[int]:
        """Where windows begin that stay: frames at which to look for seams."""
        static = Context(self.length, self.overlap, "static")
        return [window[0] for window in static.windows(frames)[1:]]


def halving(step: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8, …: van der Corput's sequence, by which neighbouring steps lie far from each other."""
    bits = f"{step:b}"[::-1]
    return int(bits, 2) / 2 ** len(bits)


def weights(length: int, fuse: Fuse = "pyramid") -> Tensor:
    """What each frame of a window counts where windows overlap: 1, 2, … and down again to 1; ``flat``, 1 each."""
    if fuse == "flat":
        return torch.ones(length)
    rising = torch.arange(1, length + 1)
    return torch.minimum(rising, rising.flip(0)).float()


class WindowedCall:
    """A UNet's call in windows: hooks that stand before and behind those of every unit.

    The first hook calls the UNet for each window but the last, for which the call under way goes on; the second puts
    the parts together. In each of these calls all units see their excerpt of the clip.
    """

    before_all = True

    def __init__(self, owner: MotionAttachment, unet: Any, clock: Clock) -> None:
        self.owner, self.unet, self.clock = owner, unet, clock
        self._inside = False
        self._last: Excerpt | None = None
        self._sum: Tensor | None = None
        self._weight: Tensor | None = None

    def hooks(self) -> list[Any]:
        """Register both; returns their handles."""
        return [
            self.unet.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            self.unet.register_forward_hook(self._after),
        ]

    def reset(self) -> None:
        """Let every unit see the whole again."""
        self._inside, self._last, self._sum, self._weight = False, None, None, None
        self._show(None)

    # A window's call differs from the next one's in nothing that could be compiled.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._inside:
            return None
        if self._last is not None:  # the last call failed on its way
            self.reset()
        if self.owner.excerpt is not None:  # of another motion module's windows
            return None
        arguments = unet_arguments(args, kwargs)
        excerpts = self.owner.excerpts(arguments)
        if excerpts is None:
            return None
        parts = len(self.clock.parts or ("all",))
        if len(excerpts) > 1:
            self._run(excerpts[:-1], arguments, parts)
            self._last = excerpts[-1]
            self._show(excerpts[-1])
        return by_position(_selected(arguments, excerpts[-1], parts), len(args))

    def _run(self, excerpts: Sequence[Excerpt], arguments: dict[str, Any], parts: int) -> None:
        self._inside = True
        try:
            for excerpt in excerpts:
                self._show(excerpt)
                output = self.unet(**_selected(arguments, excerpt, parts) | {"return_dict": False})[0]
                self._add(output, excerpt)
        except BaseException:
            self.reset()
            raise
        self._inside = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, unet: nn.Module, args: Any, output: Any) -> Any:
        if self._inside or self._last is None:
            return None
        sample = output[0]
        self._add(sample, self._last)
        assert self._sum is not None and self._weight is not None
        joined = (self._sum / self._weight).flatten(0, 1).to(sample.dtype)
        self.reset()
        return (joined, *output[1:]) if isinstance(output, tuple) else type(output)(sample=joined)

    def _add(self, output: Tensor, excerpt: Excerpt) -> None:
        """Sum up one window's output ``(parts · pictures, …)``, weighted."""
        pictures = torch.tensor(excerpt.pictures, device=output.device)
        by_part = output.float().unflatten(0, (-1, len(pictures)))
        weight = weights(excerpt.length, self.owner.context.fuse).to(output.device)
        weight = weight.repeat(len(pictures) // excerpt.length).view(-1, *[1] * (output.ndim - 1))
        if self._sum is None or self._weight is None:
            self._sum = by_part.new_zeros(by_part.shape[0], excerpt.whole, *output.shape[1:])
            self._weight = weight.new_zeros(excerpt.whole, *weight.shape[1:])
        self._sum.index_add_(1, pictures, by_part * weight)
        self._weight.index_add_(0, pictures, weight)

    def _show(self, excerpt: Excerpt | None) -> None:
        for hook in self.unet._forward_pre_hooks.values():
            unit = getattr(hook, "__self__", None)
            if isinstance(unit, Attachment):
                unit.see(excerpt)


def _selected(arguments: dict[str, Any], excerpt: Excerpt, parts: int) -> dict[str, Any]:
    """A UNet call's arguments for the pictures of an excerpt alone."""
    kept = {"cross_attention_kwargs"}  # what it holds is no batch
    return {name: value if name in kept else _rows(value, excerpt, parts) for name, value in arguments.items()}


def _rows(value: Any, excerpt: Excerpt, parts: int) -> Any:
    """The rows of every tensor that belong to the excerpt's pictures: of n rows for each part of the batch, that of the
    picture's prompt."""
    if isinstance(value, dict):
        return {name: _rows(inner, excerpt, parts) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rows(inner, excerpt, parts) for inner in value)
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] % parts:
        return value
    each = value.shape[0] // parts
    index = [part * each + row for part in range(parts) for row in excerpt.of(each)]
    return value[index]


def step_of(clock: Clock, timestep: Timestep) -> int:
    """The number of the step, or 0 on a bare UNet, which does not know."""
    try:
        return clock.position(timestep)[0]
    except MahlstickError:
        return 0
