"""What every adapter shares: weights with a config, and the attachment that clips them on a UNet.

An :class:`Adapter` holds weights and nothing of any run. Everything a run needs (the condition, the dose, caches)
lives in an :class:`Attachment`, and goes with it. An attachment speaks to the UNet through module hooks only: no
method is replaced and no attention processor is exchanged, so whatever else changes the UNet (LoRA, attention
slicing, offload) keeps working, and taking the hooks off leaves the UNet as it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from mahlstick.adapters import formats
from mahlstick.errors import MahlstickError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

Timestep = Tensor | float | int


class Adapter(nn.Module, ABC):
    """Weights that steer a UNet, with the config that rebuilds them."""

    kind: ClassVar[str]
    config: dict[str, Any]

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build the adapter with fresh weights."""

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str], *, dtype: torch.dtype | None = None, **config: Any) -> Self:
        """Load a file, folder or hub id in any published layout.

        ``config`` gives what a file cannot tell (``heads=``), ``dtype`` casts the weights; left out, they stay as they
        are stored. Halves become float32 when they run on a float32 UNet. Raises ``MahlstickError`` where the file is
        not this kind of adapter, is damaged, or has missing or unexpected keys.
        """
        settings, state = formats.read(path, cls.kind, **config)
        return cls._from_state(settings, state, dtype)

    @classmethod
    def _from_state(cls, config: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype | None = None) -> Self:
        # On the meta device nothing is allocated or initialised that the state dict replaces anyway.
        with torch.device("meta"):
            adapter = cls.from_config(config)
        if dtype is not None:
            state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        adapter.load_state_dict(state, strict=True, assign=True)
        return adapter.eval().requires_grad_(True)

    def save_pretrained(self, path: str | PathLike[str], layout: str | None = None) -> Path:
        """Write weights and config to ``path``; returns the file or folder written.

        The default layout is the one that diffusers' own loaders read.
        """
        options = {} if layout is None else {"layout": layout}
        return formats.write(path, self.kind, dict(self.config), self.state_dict(), **options)

    def widen(self, dtype: torch.dtype) -> None:
        """Cast half-precision weights to ``dtype`` where that is float32, which loses nothing; leave others alone.

        Most published files are halves. A CPU computes in them many times slower, and nowhere as exactly. An adapter in
        training mode stays as it is, for its optimiser knows it so.
        """
        if dtype == torch.float32 and self.dtype in (torch.float16, torch.bfloat16) and not self.training:
            with torch.inference_mode(False):  # or the weights could never be trained
                self.to(dtype)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class Clock:
    """What an attachment may ask of the run that a UNet call belongs to. This one is a bare UNet's, which knows little.

    ``parts`` names the equal parts of the batch in order: ``("cond",)`` without guidance, ``("uncond", "cond")`` with
    it, None where nobody told. ``train_timesteps`` is the length of the noise schedule.
    """

    train_timesteps: int = 1000

    def __init__(self, parts: tuple[str, ...] | None = None) -> None:
        self._parts = parts

    @property
    def parts(self) -> tuple[str, ...] | None:
        return self._parts

    def position(self, timestep: Timestep) -> tuple[int, int]:
        """This call's step and the number of steps."""
        raise MahlstickError(
            "a window in steps needs a pipeline to count them: attach to the pipeline, not to its bare UNet."
        )

    def done(self, timestep: Timestep) -> float:
        """How much of the noise schedule lies behind this call: 0 at the noisiest timestep, 1 at the cleanest."""
        return 1.0 - float(torch.as_tensor(timestep).flatten()[0]) / (self.train_timesteps - 1)


@dataclass(frozen=True)
class Window:
    """The part of a run in which a unit acts.

    Counted in ``steps`` a unit acts at step i of n where ``start <= i / n`` and ``(i + 1) / n <= end``, as in
    diffusers. Counted in ``noise`` the fractions are of the noise schedule, as ComfyUI counts percent: 0 is the
    noisiest training timestep and 1 the cleanest.
    """

    start: float = 0.0
    end: float = 1.0
    unit: Literal["steps", "noise"] = "steps"

    def __post_init__(self) -> None:
        if number(self.start, "start", 0, 1) >= number(self.end, "end", 0, 1):
            raise MahlstickError(f"start must be smaller than end; got {self.start} and {self.end}.")
        if self.unit not in ("steps", "noise"):
            raise MahlstickError(f"window must be 'steps' or 'noise'; got {self.unit!r}.")

    @property
    def whole(self) -> bool:
        return self.start == 0.0 and self.end == 1.0

    def holds(self, clock: Clock, timestep: Timestep) -> bool:
        """Whether a UNet call at this timestep lies inside."""
        if self.whole:
            return True
        if self.unit == "noise":
            return self.start <= clock.done(timestep) <= self.end
        step, steps = clock.position(timestep)
        return self.start <= step / steps and (step + 1) / steps <= self.end


@dataclass(frozen=True)
class Excerpt:
    """The pictures that one UNet call sees of a run that takes several calls for each step: windows over long clips.

    ``pictures`` are their places among the ``whole`` number of pictures, clip by clip, ``length`` of each clip.
    """

    pictures: tuple[int, ...]
    whole: int
    length: int

    def of(self, n: int) -> list[int]:
        """Which of n conditions (of the pictures or of their prompts) belong to the pictures, in their order."""
        if self.whole % n:
            raise _no_fit(n, self.whole)
        return [picture * n // self.whole for picture in self.pictures]


def _no_fit(n: int, pictures: int) -> MahlstickError:
    return MahlstickError(
        f"{n} conditions do not fit a batch of {pictures}: give one, or one for each picture of the batch."
    )


def spread(rows: Tensor, batch: int, parts: Sequence[str] | None, excerpt: Excerpt | None = None) -> Tensor:
    """Give every row of the batch its condition: ``(n, ...)`` to ``(batch, ...)``.

    One condition serves all rows. n conditions serve n pictures or n prompts: those of a prompt's pictures lie side
    by side, and every part of the batch (see :class:`Clock`) repeats them. Where the call sees an excerpt, n is
    counted over the whole. Raises ``MahlstickError`` where n does not divide.
    """
    n, count = rows.shape[0], len(parts or ("all",))
    if n == 1:
        return rows.expand(batch, *rows.shape[1:])
    if excerpt is not None:
        return rows[excerpt.of(n)].repeat(count, *[1] * (rows.ndim - 1))
    if n != batch if parts is None else batch % (count * n):
        raise _no_fit(n, batch // count)
    return rows.repeat_interleave(batch // (count * n), dim=0).repeat(count, *[1] * (rows.ndim - 1))


def area_mask(
    mask: Tensor,
    size: Sequence[int],
    batch: int,
    parts: Sequence[str] | None,
    kept: dict[tuple[Any, ...], Tensor],
    excerpt: Excerpt | None = None,
) -> Tensor:
    """A mask ``(n, 1, H, W)`` at a layer's size ``(h, w)`` for every row, ``(batch, 1, h, w)``, by area: the share of
    each cell in which the unit acts. ``kept`` holds those made before."""
    key = (*size, batch, tuple(parts or ()))
    if key not in kept:
        small = torch.nn.functional.interpolate(mask.float(), size=tuple(size), mode="area")
        kept[key] = spread(small, batch, parts, excerpt)
    return kept[key]


def number(value: Any, name: str, low: float = -100.0, high: float = 100.0) -> float:
    """``value`` as a float between ``low`` and ``high``; ``MahlstickError`` for anything else, NaN included."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not low <= found <= high:
        raise MahlstickError(f"{name} must be a number between {low:g} and {high:g}; got {value!r}.")
    return found


def unwrap(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def unet_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """One UNet call's arguments by name."""
    return {**dict(zip(_unet_parameters(), args, strict=False)), **kwargs}


def by_position(arguments: dict[str, Any], count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What came by position stays there, for later hooks may look for it: of ``count``, sample, time, text."""
    names = list(arguments)[: min(count, 3)]
    return tuple(arguments[name] for name in names), {k: v for k, v in arguments.items() if k not in names}


def _unet_parameters() -> tuple[str, ...]:
    if not _UNET_PARAMETERS:
        from diffusers import UNet2DConditionModel

        _UNET_PARAMETERS.extend(list(signature(UNet2DConditionModel.forward).parameters)[1:])
    return tuple(_UNET_PARAMETERS)


_UNET_PARAMETERS: list[str] = []


def _windows_first(unet: nn.Module) -> None:
    """Bring hooks that call the UNet themselves before those that are to run in each of these calls."""
    hooks = cast("OrderedDict[int, Any]", unet._forward_pre_hooks)
    for key, hook in list(hooks.items()):
        if getattr(getattr(hook, "__self__", None), "before_all", False):
            hooks.move_to_end(key, last=False)


class Attachment(ABC):
    """An adapter clipped on a UNet: owns the run's state and the hooks; a context manager that detaches.

    Building one only checks; :meth:`fasten` changes the UNet. ``detach`` may be called again and in any order.
    Text that changes with the frames needs hooks and no ``adapter``.
    """

    adapter: Adapter | None

    #: Whether it changes what the other units of a call read.
    before_others: ClassVar[bool] = False

    def __init__(
        self, adapter: Adapter | None, unet: UNet2DConditionModel, window: Window | None, clock: Clock | None
    ) -> None:
        if adapter is not None:
            formats.require_fit(adapter.kind, dict(adapter.config), dict(unet.config))
        self.adapter = adapter
        self.unet = cast("UNet2DConditionModel", unwrap(unet))
        self.window = window or Window()
        self.clock = clock or Clock()
        self.compiled = unet is not self.unet or unet._compiled_call_impl is not None
        self.excerpt: Excerpt | None = None
        self._handles: list[Any] = []
        self._home: torch.device | None = None

    def fasten(self) -> Self:
        """Register the hooks; all of them or none."""
        try:
            hook = self.unet.register_forward_pre_hook(self._before_unet, with_kwargs=True, prepend=self.before_others)
            self._handles.append(hook)
            _windows_first(self.unet)
            self._fasten()
        except BaseException:
            self.detach()
            raise
        return self

    def _fasten(self) -> None:  # noqa: B027 - nothing more by default
        """Register hooks beyond the one on the UNet's call."""

    def detach(self) -> None:
        """Take every hook off and let go of the run's tensors."""
        while self._handles:
            self._handles.pop().remove()
        if self.adapter is not None and self._home is not None:
            self.adapter.to(self._home)
            self._home = None
        self.see(None)
        self._forget()

    def _forget(self) -> None:  # noqa: B027 - nothing kept by default
        """Drop cached tensors."""

    def see(self, excerpt: Excerpt | None) -> None:
        """The next calls of the UNet hold these pictures of the run; None: all of them."""
        if excerpt != self.excerpt:
            self.excerpt = excerpt
            self._forget()

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def _before_unet(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        arguments = unet_arguments(args, kwargs)
        sample, parts = arguments["sample"], self.clock.parts
        if parts is not None and sample.shape[0] % len(parts):
            raise MahlstickError(
                f"a batch of {sample.shape[0]} has no {len(parts)} equal parts ({', '.join(parts)}): tell attach "
                "whether the UNet is called with guidance."
            )
        acts = self.acts and self.window.holds(self.clock, arguments["timestep"])
        if acts and self.adapter is not None:
            self._place(self.adapter, sample.device)
        changes = self._contribute(arguments, parts, acts)
        return by_position({**arguments, **changes}, len(args)) if changes else None

    def _place(self, adapter: Adapter, device: torch.device) -> None:
        # A module outside pipe.components does not follow the pipeline's device moves, so we place it.
        if adapter.device != device:
            self._home = self._home or adapter.device
            adapter.to(device)
        adapter.widen(self.unet.conv_in.weight.dtype)  # the sample's is another under autocast

    @property
    @abstractmethod
    def acts(self) -> bool:
        """Whether the dose is more than nothing."""

    @abstractmethod
    def _contribute(self, arguments: dict[str, Any], parts: tuple[str, ...] | None, acts: bool) -> dict[str, Any]:
        """Prepare this UNet call: returns the arguments to change."""
